"""Run a training script in place, unchanged, and keep its weights at given times.

    python benchmarks/timed_script.py DIRECTORY BEGAN MARKS SCRIPT [ARGUMENTS ...]

The weights of the first model that is called (anything with an `lm_head`) are saved after the first
optimizer step that ends later than each of the MARKS (seconds, joined by commas), and once more at
the end of the script. Seconds count from BEGAN, a time of the system clock: imports, preparation of
the data, compilation and the script's own saving are included. Nothing is evaluated meanwhile.

DIRECTORY/times.json lists the weights {"seconds", "steps", "file"} and the seconds at which each
optimizer step ended.
"""

import json
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Recorder:
    """Hooks of torch that see every optimizer step and the first call of a model."""

    def __init__(self, directory: Path, began: float, marks: list[float]):
        self.directory, self.began, self.marks = directory, began, marks
        self.model, self.steps, self.weights = None, [], []
        self.depth = 0  # an optimizer may consist of others
        self.handle = register_module_forward_pre_hook(self.find_model)
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def find_model(self, module, inputs) -> None:
        """Remember the first causal model that is called; a compiled one holds the original."""
        module = getattr(module, "_orig_mod", module)
        if hasattr(module, "lm_head"):
            self.model = module
            self.handle.remove()

    def before_step(self, *_) -> None:
        """Enter a step, or a part of one."""
        self.depth += 1

    def after_step(self, *_) -> None:
        """Record the end of a step, and save the weights if a mark has passed."""
        self.depth -= 1
        if self.depth:
            return
        self.steps.append(time.time() - self.began)
        if self.marks and self.steps[-1] >= self.marks[0]:
            self.marks = [mark for mark in self.marks if mark > self.steps[-1]]
            self.save(self.steps[-1])

    def save(self, seconds: float) -> None:
        """Save the weights as those of this moment."""
        file = self.directory / f"{len(self.weights)}.pt"
        torch.save(self.model.state_dict(), file)
        self.weights.append({"seconds": seconds, "steps": len(self.steps), "file": str(file)})


def main() -> None:
    directory, began, marks, *arguments = sys.argv[1:]
    recorder = Recorder(Path(directory), float(began), [float(mark) for mark in marks.split(",")])
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)  # as python itself sets it
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit_:
        if exit_.code:
            raise
    recorder.save(time.time() - recorder.began)
    times = {"weights": recorder.weights, "steps": recorder.steps}
    Path(directory, "times.json").write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main()
