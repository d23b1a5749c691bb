"""The first steps of a run, compared with its plan."""

from collections.abc import Callable
from dataclasses import replace

from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.costs.devices import Device
from minimind.costs.flops import flops
from minimind.costs.memory import memory
from minimind.costs.parameters import core, empty_model
from minimind.costs.slowness import explain, usage
from minimind.costs.step import Step
from minimind.costs.this_machine import this_device
from minimind.costs.units import gib
from minimind.training.callback_handler import Decoration
from minimind.training.step_meter import MEASURED_STEPS, StepMeter, step_of

WATCHED_STEPS = 20
# A step is slow that takes so many times the planned seconds and loses so many seconds: smaller
# steps are mostly overhead.
SLOW, LOST = 2.0, 0.25


def costs_of_step(trainer: Trainer) -> tuple[Device, Step, nn.Module, dict[str, float]]:
    """The device and the step of a trainer, its model without weights (those of the real one may be
    divided among processes), and the FLOPs of a micro-batch as the batches hold it."""
    device = this_device()
    step, padded = step_of(trainer, device)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    model = empty_model(core(model).config, adapter)
    work = flops(model, replace(step, length=max(2, round(padded))))
    return device.with_gaps(step.checkpointing), step, model, work


def planned_speed(trainer: Trainer) -> tuple[float, float]:
    """Seconds and tokens of an optimizer step, of all processes, by the plan."""
    device, step, _, work = costs_of_step(trainer)
    rate = device.peak(step.precision) * device.utilisation
    tokens = step.sequences * step_of(trainer, device)[1] * step.accumulation * step.processes
    return work["hardware"] * step.accumulation / rate, tokens


class PlanCallback(Decoration, StepMeter):
    """Compares the first steps of a run with their plan: prints one line, adds the numbers to the
    next log, and warns of much slower steps with the likely reasons.

    It must not end a run: any error in it is reported, and the run continues. It must come before
    the trackers' callbacks, which report the logs as they find them.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(trainer, WATCHED_STEPS)
        self.due = False
        self.figures: dict[str, float] = {}  # for the next log

    def on_train_begin(self, args, state, control, **kwargs):
        left = state.max_steps - state.global_step
        # Weights that ZeRO-3 divides can only be read by all processes together
        watches = left >= MEASURED_STEPS and is_main_process() and not is_deepspeed_zero3_enabled()
        self.steps = min(WATCHED_STEPS, left) if watches else 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.steps:
            self._try(self._note_usage)
            self._try(self._compare_once)
            self._try(super().on_step_begin, args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps:
            self._try(super().on_step_end, args, state, control, **kwargs)

    def finished(self, state) -> None:
        self.due = True  # comparing here would count as time of the step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._try(self._compare_once)
        if self.figures and logs is not None and "loss" in logs:
            logs.update({name: round(value, 4) for name, value in self.figures.items()})
            self.figures = {}

    def _note_usage(self) -> None:
        if not self.seconds:
            self.usage_before = usage()

    def _compare_once(self) -> None:
        if self.due:
            self.due = False
            self.compare()

    def _try(self, action: Callable[..., None], *args, **kwargs) -> None:
        try:
            action(*args, **kwargs)
        except Exception as error:
            say(f"plan: this run cannot be compared with one ({type(error).__name__}: {error})")
            self.steps = 0

    def compare(self) -> None:
        """Plan these steps on the device they ran on, print both, and keep the numbers for the
        log."""
        measured = self.results()
        device, step, model, work = costs_of_step(self.trainer)
        achieved = work["model"] * step.accumulation / measured["seconds_per_step"]
        rate = max(device.peak(step.precision), achieved)
        planned = {
            "seconds_per_step": work["hardware"] * step.accumulation / rate / device.utilisation,
            "peak_memory": device.account(memory(model, step)["peak"]),
        }

        # Both, side by side
        mfu, parts = achieved / rate, []
        self.figures = {"plan/mfu": mfu}
        units = {"seconds_per_step": lambda seconds: f"{seconds:.3g} s a step", "peak_memory": gib}
        if measured["peak_memory"] is None or (
            device.kind == "cpu" and step.zero_stage is not None
        ):
            del units["peak_memory"]  # how much of DeepSpeed's own buffers is resident is unknown
        for name, shown in units.items():
            real, plan = measured[name], planned[name]
            self.figures |= {f"plan/{name}": real, f"plan/{name}_planned": plan}
            parts.append(f"{shown(real)} instead of {shown(plan)} ({real / plan - 1:+.0%})")
        parts.append(f"MFU {mfu:.0%} instead of {device.utilisation:.0%}")
        say(f"plan: over the first {self.steps} steps on {device.name}: {', '.join(parts)}")

        real, plan = measured["seconds_per_step"], planned["seconds_per_step"]
        if real > SLOW * plan and real - plan > LOST:
            reasons = explain(self.usage_before, usage(), device.kind, step.precision)
            say(
                f"warning: a step takes {real:.3g} s instead of the planned {plan:.3g} s "
                f"({real / plan - 1:+.0%}). Likely reasons, and what to try:{reasons}"
            )
