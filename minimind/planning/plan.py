"""The plan of one run: what it takes, whether it fits, and what to change if it does not."""

from dataclasses import dataclass, replace

from minimind.costs.devices import Device
from minimind.costs.prices import Price
from minimind.costs.step import Step
from minimind.costs.units import gib
from minimind.planning.counting import RowCounts

# Tokens per parameter at which a training budget is best spent (Hoffmann et al., 2022, table 3)
CHINCHILLA = 20


@dataclass(frozen=True)
class Plan:
    """What one run will take. Memory in bytes per device; times without evaluation and start-up."""

    recipe: str
    stage: str
    output_dir: str
    device: Device
    step: Step
    parameters: dict[str, int]
    rows: RowCounts
    rows_per_step: int
    steps: int
    tokens: int
    flops_per_token: float
    flops: dict[str, float]
    memory: dict[str, float]
    states: dict[str, float]
    evaluation_peak: float
    peak_under: dict[str, float]
    peak_with_reference: dict[str, float]
    peak_without_checkpointing: float
    peak_with_checkpointing: float
    largest_batch: int
    notes: list[str]
    measured: dict[str, float] | None = None
    time_budget: float | None = None  # seconds

    def within_budget(self) -> "Plan":
        """The plan of as many of these steps as the time budget has room for, if there is one."""
        if not self.time_budget:
            return self
        steps = max(1, int(self.time_budget / self.seconds_per_step))
        times = steps / self.steps
        work = {name: value * times for name, value in self.flops.items()}
        return replace(self, steps=steps, tokens=round(self.tokens * times), flops=work)

    @property
    def utilisation(self) -> float:
        """The MFU that the time is based on: measured, or the one assumed for the device."""
        if not self.measured:
            return self.device.utilisation
        per_step = self.flops["model"] / self.steps / self.step.processes
        peak = self.device.peak(self.step.precision)
        return per_step / self.measured["seconds_per_step"] / peak

    @property
    def seconds_per_step(self) -> float:
        """Seconds of one optimizer step."""
        if self.measured:
            return self.measured["seconds_per_step"]
        rate = self.device.peak(self.step.precision) * self.device.utilisation * self.step.processes
        return self.flops["hardware"] / self.steps / rate

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.seconds_per_step * self.steps / 3600

    @property
    def fits(self) -> bool:
        """Whether the device has the memory for training and evaluation."""
        return max(self.memory["peak"], self.evaluation_peak) <= self.device.usable

    def held_elsewhen(self, part: str) -> float:
        """Bytes of a part that takes no memory at the peak but before or after it; else 0."""
        return 0 if self.memory[part] else self.states.get(part, 0)

    def advice(self) -> str:
        """What to change if the run does not fit."""
        peak, step, device = self.memory["peak"], self.step, self.device
        if peak <= device.usable:
            room = f"{gib(self.evaluation_peak)} of {gib(device.usable)} on {device.name}"
            return f"{self.recipe}: evaluation needs {room}. Lower --per_device_eval_batch_size."
        text = f"{self.recipe}: needs {gib(peak)} of {gib(device.usable)} on {device.name}."
        if self.largest_batch:
            # The fewest micro-batches of equal size that fit
            parts = 2
            while -(-step.batch_size // parts) > self.largest_batch:
                parts += 1
            size = -(-step.batch_size // parts)
            text += (
                f" Try --per_device_train_batch_size {size} --gradient_accumulation_steps"
                f" {parts * step.accumulation}"
            )
        if not step.checkpointing and self.peak_with_checkpointing <= device.usable:
            text += f"{' or' if self.largest_batch else ' Try'} --activation_checkpointing true"
        elif not self.largest_batch:
            text += " Take a smaller model, more processes under ZeRO, or a larger device"
        return text + "."

    def as_json(self, price: Price | None) -> dict:
        """The plan as a JSON object."""
        device_hours = self.hours * self.step.processes
        return {
            "recipe": self.recipe,
            "stage": self.stage,
            "output_dir": self.output_dir,
            "precision": self.step.precision,
            "parameters": self.parameters,
            "rows": self.rows.rows,
            "rows_per_step": self.rows_per_step,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_counted": self.rows.how,
            "tokens_exact": self.rows.exact,
            "tokens_per_parameter": self.tokens / self.parameters["total"],
            "compute_optimal_tokens_per_parameter": CHINCHILLA,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops["model"],
            "hardware_flops": self.flops["hardware"],
            "utilisation": self.utilisation,
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_second": self.tokens / (self.hours * 3600),
            "hours": self.hours,
            "time_budget": self.time_budget,
            "cost": price and price.amount * device_hours,
            "memory": {key: round(value) for key, value in self.memory.items()},
            "states": {key: round(value) for key, value in self.states.items()},
            "peak_under": {name: round(value) for name, value in self.peak_under.items()},
            "evaluation_peak": round(self.evaluation_peak),
            "process": round(self.device.account(self.memory["peak"])),
            "peak_with_checkpointing": round(self.peak_with_checkpointing),
            "peak_without_checkpointing": round(self.peak_without_checkpointing),
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "measured": self.measured,
            "notes": self.notes,
        }
