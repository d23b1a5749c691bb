"""The progress of a run: a line per log in the terminal, the same as JSON in train_log.jsonl."""

import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import IntervalStrategy, Trainer, TrainerState

from minimind.common.errors import decoration
from minimind.common.files import append_json
from minimind.common.language import say, translated
from minimind.costs.flops import flops
from minimind.costs.this_machine import measure_again, this_device
from minimind.training.callback_handler import Decoration
from minimind.training.step_meter import step_of

MEASURING_SHARE = 0.01  # of the training time, at most, goes into measuring the peak again

# The entries of a log that a line shows, in this order.
SHOWN = {
    "loss": "loss {:.4f}",
    "bits_per_byte": "bpb {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "eval_bits_per_byte": "eval_bpb {:.4f}",
    "rewards/accuracies": "rewards/accuracies {:.4f}",
    "eval_rewards/accuracies": "eval_rewards/accuracies {:.4f}",
    "rewards/margins": "rewards/margins {:.4f}",
    "accuracy": "accuracy {:.4f}",
    "eval_accuracy": "eval_accuracy {:.4f}",
    "margin": "margin {:.4f}",
    "eval_pairs_sum": "eval_pairs_sum {:.4f}",
    "eval_pairs_mean": "eval_pairs_mean {:.4f}",
    "grad_norm": "grad {:.3f}",
    "router_load/max": "router_load/max {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:>9,.0f} tokens/s",
    "mfu": "MFU {:>5.1%}",
    "memory_gib": "{:.2f} GiB",
}
# The entries that a clock or the machine decides, by how their names end.
MEASURED = ("tokens_per_second", "mfu", "memory_gib", "elapsed", "eta")
MEASURED += ("_runtime", "_per_second", "_time", "time_budget")


def clock(seconds: float) -> str:
    """Seconds -> h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def reproducible(entry: dict) -> dict:
    """A log's entry without what clocks and the machine decide: all that equal runs have in
    common."""
    return {
        key: value
        for key, value in entry.items()
        if not key.endswith(MEASURED) and not key.startswith("plan/")
    }


class ProgressCallback(Decoration):
    """One line per log, and the same as JSON in train_log.jsonl: step, share done, loss, bits per
    byte, gradient norm, learning rate, tokens/s, MFU, memory, elapsed time, ETA.

    tokens/s counts the tokens that are not padding, of all processes, over training time without
    evaluations. MFU is the model's FLOPs for these tokens over the devices' peak (Chowdhery et al.,
    2022, appendix B). A CPU's peak is measured again now and then, since another process may have
    been busy; a run that is even faster is the peak. Memory is the most that this process ever
    held, in GiB: of the GPU's where there is one, else resident. What is worth a curve is added to
    the logs.

    `bits_per_nat`: loss in nats per token -> bits per byte, where the bytes of the targets are
    known.
    """

    lasting = ("seconds", "last_seconds", "last_tokens")

    def __init__(
        self, output_dir: Path, trainer: Trainer | None = None, bits_per_nat: float | None = None
    ):
        self.log_file = output_dir / "train_log.jsonl"
        self.trainer, self.bits_per_nat = trainer, bits_per_nat
        self.seconds = 0.0  # spent in training steps
        self.step_began = None
        self.flops_per_token = None  # of one device
        self.peak = 0.0  # FLOP/s of one device
        self.measuring = 0.1  # seconds, about, that it has taken to measure it

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.last_seconds, self.last_tokens = 0.0, self.first_tokens
        if state.is_world_process_zero:
            if self.trainer:
                with decoration("measuring the MFU"):
                    self.flops_per_token, self.precision = work_of(self.trainer)
            if not self.first_step:
                self.log_file.unlink(missing_ok=True)

    def state_dict(self) -> dict:
        """What a resumed run needs to continue tokens/s, elapsed time and ETA."""
        return {name: getattr(self, name) for name in self.lasting}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from `state_dict`; called after `on_train_begin`."""
        for name in self.lasting:
            setattr(self, name, state[name])
        self.first_step = self.first_tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.step_began
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            # The library does not log the last steps where they are fewer than logging_steps
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        times = {}
        if "loss" in logs:
            with decoration("measuring the speed"):
                times = self._measure(state, logs)
        entry = {"step": state.global_step, **logs, **times}
        entry.pop("num_tokens", None)
        entry = {k: float(v) if isinstance(v, str) else v for k, v in entry.items()}
        say(self._line(entry, state.max_steps))
        append_json(self.log_file, entry)

    def _measure(self, state: TrainerState, logs: dict) -> dict[str, float]:
        """Add to `logs` what the trackers draw too; returns the times."""
        if self.bits_per_nat:
            logs["bits_per_byte"] = round(float(logs["loss"]) * self.bits_per_nat, 6)
        logs["memory_gib"] = round(peak_memory() / 2**30, 4)
        if self.seconds <= self.last_seconds:
            return {}
        tokens = state.num_input_tokens_seen - self.last_tokens
        speed = tokens / (self.seconds - self.last_seconds)
        logs["tokens_per_second"] = round(speed, 1)
        if self.flops_per_token:
            logs["mfu"] = round(self._mfu(speed * self.flops_per_token), 5)
        self.last_seconds, self.last_tokens = self.seconds, state.num_input_tokens_seen
        done = state.global_step - self.first_step
        elapsed, left = self.seconds, self.seconds / done * (state.max_steps - state.global_step)
        if self.trainer and (budget := self.trainer.time_budget):
            whole, left = budget.whole_and_left()
            elapsed = whole - left
        return {"elapsed": round(elapsed, 1), "eta": round(left, 1)}

    def _mfu(self, rate: float) -> float:
        """FLOP/s -> their share of the peak, 1 at most."""
        if self.measuring < MEASURING_SHARE * self.seconds:
            began = time.perf_counter()
            measure_again(self.precision)
            self.measuring += time.perf_counter() - began
        self.peak = max(self.peak, rate, this_device().peak(self.precision))
        return rate / self.peak

    def tokens_per_second(self, state: TrainerState) -> float:
        """Mean over all training steps."""
        return (state.num_input_tokens_seen - self.first_tokens) / max(self.seconds, 1e-9)

    def _line(self, entry: dict, max_steps: int) -> str:
        width = len(f"{max_steps:,}")
        parts = ["before training"]
        if max_steps:
            step = entry["step"]
            total = f"{'~' if 'time_budget' in entry and step < max_steps else ''}{max_steps:,}"
            share = entry.get("time_budget", step / max_steps)
            parts = [f"step {step:>{width},}/{total} {share:>6.1%}"]
        parts += [form.format(entry[key]) for key, form in SHOWN.items() if key in entry]
        if "eta" in entry:
            parts.append(f"{clock(entry['elapsed'])} elapsed, {clock(entry['eta'])} left")
        if "train_loss" in entry:
            parts.append(f"finished training in {clock(entry['train_runtime'])}")
        return "  ".join(map(translated, parts))


def peak_memory() -> int:
    """The most bytes that this process ever held: of the GPU's memory, or without a GPU
    resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work_of(trainer: Trainer) -> tuple[float, str]:
    """FLOPs of one device for each token that all of them train, and the precision of a run."""
    step, _ = step_of(trainer, this_device())
    work = flops(trainer.accelerator.unwrap_model(trainer.model), step)
    return work["model"] / (step.tokens * step.counted) / trainer.args.world_size, step.precision
