"""A few real steps in place of an assumption, and the comparison of a run with its plan.

python -m minimind.planning.measuring SCRIPT REPORT ARGS...    # started by `measure`
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, Trainer

from minimind.common.errors import UserError
from minimind.common.files import read_json, write_json
from minimind.planning.planned_runs import PlannedRun
from minimind.tokenizer import DEFAULT_TOKENIZER
from minimind.training.run import ADDITIONAL
from minimind.training.step_meter import MEASURED_STEPS, StepMeter


class StopAndReport(StepMeter):
    """Writes the results of the first steps and ends the process."""

    def __init__(self, trainer: Trainer, report: Path):
        super().__init__(trainer, trainer.args.max_steps)
        self.report = report

    def on_train_begin(self, args, state, control, **kwargs):
        args.eval_on_start = False

    def finished(self, state) -> None:
        write_json(self.report, self.results())
        raise SystemExit(0)


def measure(recipe: PlannedRun, steps: int = MEASURED_STEPS) -> dict[str, float]:
    """Run the first steps of a recipe here with its own script: seconds a step, peak bytes of
    memory.

    A parent that is still to be written is replaced by random weights of its shape.

    Raises:
        UserError: the script refuses the recipe or fails.
    """
    script = Path(__file__).parents[2] / recipe.spec.script
    if not script.is_file():
        raise UserError(
            f"--device measured runs {recipe.spec.script}, which is not at {script}. Run it in a"
            " checkout."
        )
    with tempfile.TemporaryDirectory(prefix="minimind-plan-") as directory:
        report = Path(directory) / "report.json"
        words = [*recipe.words, "--output_dir", f"{directory}/run", "--max_steps", str(steps)]
        words += ["--time_budget", "none"]
        words += ["--report_to", "none", "--save_strategy", "no"]
        parent, tokenizer_dir = recipe.parent, getattr(recipe.options, "tokenizer", None)
        if parent and not Path(parent).is_dir():
            config, tokenizer, _ = recipe.starting_point()
            AutoModelForCausalLM.from_config(config).save_pretrained(f"{directory}/parent")
            tokenizer.save_pretrained(f"{directory}/parent")
            words += ["--model_name_or_path", f"{directory}/parent"]
        elif not parent and tokenizer_dir and not Path(tokenizer_dir).exists():
            words += ["--tokenizer", str(DEFAULT_TOKENIZER)]
        command = [sys.executable, "-m", __name__, str(script), str(report), *words]
        english = os.environ | {"MINIMIND_LANG": "en"}  # its error message is looked for below
        process = subprocess.run(command, capture_output=True, text=True, env=english)
        if process.returncode or not report.is_file():
            _, found, error = process.stderr.strip().rpartition("error: ")
            why = error if found else process.stderr[-2000:]
            raise UserError(f"{recipe.path}: the {steps} steps of --device measured failed: {why}")
        return read_json(report, "It is written by the steps of --device measured.")


def main(script: str, report: str, *words: str) -> None:
    """Run a stage's script up to its first steps; see `measure`."""
    ADDITIONAL.append(lambda trainer: StopAndReport(trainer, Path(report)))
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
