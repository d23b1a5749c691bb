"""Time and memory of the first steps of a run, and their comparison with the plan."""

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.costs.devices import Device, this_device
from minimind.costs.slowness import explain, usage
from minimind.costs.step import Step, core, empty_model, flops, memory
from minimind.costs.units import gib
from minimind.training.callback_handler import Decoration

MEASURED_STEPS = 5
WATCHED_STEPS = 20
LENGTHS = 2_000  # rows whose length is looked at
# Times the planned seconds, and seconds lost a step: smaller steps are mostly overhead
SLOW, LOST = 2.0, 0.25


class PeakMemory:
    """The most memory that this process's tensors take, from now on, in bytes.

    On a GPU the allocator's own account. On a CPU the growth of the process's resident memory,
    which Linux keeps the highest value of, beside the `tensors` (bytes) that are there already;
    None where there is no such account.
    """

    def __init__(self, device: torch.device, tensors: int):
        self.device, self.tensors = device, tensors
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # What was freed before would be used again without being seen
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the highest value begins anew
            self.before = self._resident("VmRSS")
        except (OSError, AttributeError, StopIteration):
            self.before = None

    def read(self) -> int | None:
        """The peak until now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self.before is None else self._resident("VmHWM") - self.before + self.tensors

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


class StepMeter(TrainerCallback):
    """Seconds of each step, and the peak of memory over `steps` of them; then `finished` is called,
    once."""

    def __init__(self, trainer: Trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if len(self.seconds) == 1:  # the first step loads code and makes the optimizer's states
            self.peak = PeakMemory(
                args.device, sum(t.numel() * t.element_size() for t in self._standing())
            )
        self.began = time.perf_counter()

    def _standing(self) -> Iterator[torch.Tensor]:
        """The tensors that are there between two steps."""
        models = [self.trainer.model, getattr(self.trainer, "ref_model", None)]
        yield from {
            parameter for model in models if model is not None for parameter in model.parameters()
        }
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        for part in getattr(optimizer, "parts", [optimizer]):
            for state in part.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.seconds) >= self.steps:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        if len(self.seconds) == self.steps:
            self.finished(state)

    def results(self) -> dict[str, float]:
        """Median seconds of the steps after the first, which sets up more than it computes; the
        peak in bytes."""
        seconds = median(self.seconds[1:] or self.seconds)
        return {
            "steps": len(self.seconds),
            "seconds_per_step": seconds,
            "peak_memory": self.peak.read(),
        }

    def finished(self, state) -> None:
        """What to do with the results."""


class PlanCallback(Decoration, StepMeter):
    """Compares the first steps of a run with what was planned for them: one line, and the numbers
    in the next log; where they are much slower, a warning with the likely reasons.

    It must not end a run: an error in it is reported, and the run continues.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(trainer, WATCHED_STEPS)
        self.due = False
        self.found: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        left = state.max_steps - state.global_step
        # To look at weights that ZeRO-3 divides takes all processes, and this is one.
        watches = left >= MEASURED_STEPS and is_main_process() and not is_deepspeed_zero3_enabled()
        self.steps = min(WATCHED_STEPS, left) if watches else 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.steps:
            self._try(self._note_usage)
            self._try(self._compare_once)
            self._try(
                lambda: super(PlanCallback, self).on_step_begin(args, state, control, **kwargs)
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps:
            self._try(lambda: super(PlanCallback, self).on_step_end(args, state, control, **kwargs))

    def finished(self, state) -> None:
        self.due = True  # not compared here, where the time would count as a step's

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._try(self._compare_once)
        if self.found and logs is not None and "loss" in logs:
            logs.update({name: round(value, 4) for name, value in self.found.items()})
            self.found = {}

    def _note_usage(self) -> None:
        if not self.seconds:
            self.usage_before = usage()

    def _compare_once(self) -> None:
        if self.due:
            self.due = False
            self.compare()

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            say(f"plan: this run cannot be compared with one ({type(error).__name__}: {error})")
            self.steps = 0

    def compare(self) -> None:
        """Plan these steps on the device they ran on, print both, and keep the numbers for the
        log."""
        device, found = this_device(), self.results()
        step, padded = step_of(self.trainer, device)
        device = device.running(step)
        real = self.trainer.accelerator.unwrap_model(self.trainer.model)
        adapter = real.peft_config[real.active_adapter] if isinstance(real, PeftModel) else None
        # The real one's weights may be divided among processes
        model = empty_model(core(real).config, adapter)
        mean = replace(step, length=max(2, round(padded)))
        work = flops(model, mean)
        achieved = work["model"] * step.accumulation / found["seconds_per_step"]
        rate = max(device.peak(step.precision), achieved)
        planned = {
            "seconds_per_step": work["hardware"] * step.accumulation / rate / device.utilisation,
            "peak_memory": device.account(memory(model, step)["peak"]),
        }
        mfu = achieved / rate
        self.found = {"plan/mfu": mfu}
        said = []
        for name, show in (
            ("seconds_per_step", lambda x: f"{x:.3g} s a step"),
            ("peak_memory", gib),
        ):
            if found[name] is None or (
                name == "peak_memory" and device.kind == "cpu" and step.zero_stage is not None
            ):
                continue  # of DeepSpeed's own buffers nobody knows what is resident
            difference = found[name] / planned[name] - 1
            self.found |= {f"plan/{name}": found[name], f"plan/{name}_planned": planned[name]}
            said.append(f"{show(found[name])} instead of {show(planned[name])} ({difference:+.0%})")
        said.append(f"MFU {mfu:.0%} instead of {device.utilisation:.0%}")
        say(f"plan: over the first {self.steps} steps on {device.name}: {', '.join(said)}")
        taken, expected = found["seconds_per_step"], planned["seconds_per_step"]
        if taken > SLOW * expected and taken - expected > LOST:
            why = explain(self.usage_before, usage(), device.kind, step.precision)
            say(
                f"warning: a step takes {taken:.3g} s instead of the planned {expected:.3g} s "
                f"({taken / expected - 1:+.0%}). Likely reasons, and what to try:{why}"
            )


def step_of(trainer: Trainer, device: Device) -> tuple[Step, float]:
    """The step that a trainer makes, and the mean length of its rows as the batches hold them."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    pairs = hasattr(trainer, "ref_model")
    allowed = getattr(args, "block_size", None) or args.max_length
    rows = trainer.train_dataset[:LENGTHS] if hasattr(trainer.train_dataset, "__getitem__") else {}
    if pairs and rows:
        replies = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        both = zip(rows["prompt_ids"], replies, strict=True)
        lengths = [len(prompt) + max(map(len, two)) for prompt, two in both]
    else:
        lengths = [len(row) for row in rows.get("input_ids", [])] or [allowed]
    batch_size = args.per_device_train_batch_size
    batches = [
        max(lengths[start : start + batch_size]) for start in range(0, len(lengths), batch_size)
    ]
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin else {}
    offload = {
        name: zero.get(name, {}).get("device", "none") != "none"
        for name in ("offload_optimizer", "offload_param")
    }
    adapter = isinstance(model, PeftModel)
    return Step(
        batch_size=batch_size,
        length=max(lengths),
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        device=device.kind,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        optimizer="muon" if getattr(args, "use_muon", False) else "adamw",
        checkpointing=bool(args.activation_checkpointing),
        attention=model.config._attn_implementation,
        masked=not hasattr(args, "block_size") or args.document_mask,
        pairs=pairs,
        reference=(
            ("adapter" if adapter else "copy")
            if pairs and not args.precompute_ref_log_probs
            else None
        ),
        weighted=getattr(trainer, "weighted", False),
        zero_stage=zero.get("stage", 0) if plugin else None,
        offload_optimizer=offload["offload_optimizer"],
        offload_parameters=offload["offload_param"],
    ), fmean(batches)
