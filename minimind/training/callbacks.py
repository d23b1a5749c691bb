"""What a run says while it goes on."""

import math
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    IntervalStrategy,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from minimind.common.errors import UserError, decoration
from minimind.common.files import append_json
from minimind.common.language import say, translated
from minimind.model.modeling_minimind import MiniMindTopKRouter


def clock(seconds: float) -> str:
    """Seconds -> h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


MEASURING_SHARE = 0.01  # of the training time, at most, goes into measuring the peak again

# What a line shows of a log, in this order.
SHOWN = {
    "loss": "loss {:.4f}",
    "bits_per_byte": "bpb {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "eval_bits_per_byte": "eval_bpb {:.4f}",
    "rewards/accuracies": "rewards/accuracies {:.4f}",
    "eval_rewards/accuracies": "eval_rewards/accuracies {:.4f}",
    "rewards/margins": "rewards/margins {:.4f}",
    "grad_norm": "grad {:.3f}",
    "router_load/max": "router_load/max {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:>9,.0f} tokens/s",
    "mfu": "MFU {:>5.1%}",
    "memory_gib": "{:.2f} GiB",
}


def reproducible(entry: dict) -> dict:
    """A log's entry without what clocks and the machine decide: all that equal runs have in
    common."""
    measured = (
        "tokens_per_second",
        "mfu",
        "memory_gib",
        "elapsed",
        "eta",
        "_runtime",
        "_per_second",
        "_time",
    )
    return {
        key: value
        for key, value in entry.items()
        if not key.endswith(measured) and not key.startswith("plan/")
    }


class ProgressCallback(TrainerCallback):
    """One line per log, and the same as JSON in train_log.jsonl: step, share done, loss, bits per
    byte, gradient norm, learning rate, tokens/s, MFU, memory, elapsed time, ETA.

    tokens/s counts the tokens that are not padding, of all processes, over training time:
    evaluation is left out. MFU is the model's FLOPs for these tokens over the devices' peak
    (Chowdhery et al., 2022, appendix B). A CPU's peak is measured again now and then, since another
    process may have been busy, and a run that is faster still is the peak. Memory is the most that
    this process ever held, in GiB: of the GPU's where there is one, else resident. What is worth a
    curve is added to the logs, so this has to stand before the trackers' callbacks.

    `bits_per_nat`: loss in nats per token -> bits per byte, where the bytes of the targets are
    known.
    """

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
        """What a resumed run needs, so that tokens/s, elapsed time and ETA go on; see resume.py."""
        return {
            "seconds": self.seconds,
            "last_seconds": self.last_seconds,
            "last_tokens": self.last_tokens,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave; called after `on_train_begin`."""
        self.seconds, self.last_seconds, self.last_tokens = (
            state[name] for name in ("seconds", "last_seconds", "last_tokens")
        )
        self.first_step = self.first_tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.step_began
        if args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            # The library leaves out the last steps where they are not logging_steps
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        times = {}
        if "loss" in logs:
            with decoration("measuring the speed"):
                times = self._measure(state, logs)
        entry = {
            "step": state.global_step,
            **{k: v for k, v in logs.items() if k != "num_tokens"},
            **times,
        }
        entry = {
            key: float(value) if isinstance(value, str) else value for key, value in entry.items()
        }
        say(self._line(entry, state.max_steps))
        append_json(self.log_file, entry)

    def _measure(self, state: TrainerState, logs: dict) -> dict[str, float]:
        """Adds what the trackers draw too to `logs`; returns the times."""
        if self.bits_per_nat:
            logs["bits_per_byte"] = round(float(logs["loss"]) * self.bits_per_nat, 6)
        logs["memory_gib"] = round(peak_memory() / 2**30, 4)
        if self.seconds <= self.last_seconds:
            return {}
        speed = (state.num_input_tokens_seen - self.last_tokens) / (
            self.seconds - self.last_seconds
        )
        logs["tokens_per_second"] = round(speed, 1)
        if self.flops_per_token:
            logs["mfu"] = round(self._mfu(speed * self.flops_per_token), 5)
        self.last_seconds, self.last_tokens = self.seconds, state.num_input_tokens_seen
        done = state.global_step - self.first_step
        left = self.seconds / done * (state.max_steps - state.global_step)
        return {"elapsed": round(self.seconds, 1), "eta": round(left, 1)}

    def _mfu(self, rate: float) -> float:
        """FLOP/s -> their share of the peak, 1 at most."""
        from minimind.costs.this_machine import measure_again, this_device

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
            parts = [
                f"step {entry['step']:>{width},}/{max_steps:,} {entry['step'] / max_steps:>6.1%}"
            ]
        parts += [form.format(entry[key]) for key, form in SHOWN.items() if key in entry]
        if "eta" in entry:
            parts.append(f"{clock(entry['elapsed'])} elapsed, {clock(entry['eta'])} left")
        if "train_loss" in entry:
            parts.append(f"finished training in {clock(entry['train_runtime'])}")
        return "  ".join(map(translated, parts))


def peak_memory() -> int:
    """Bytes that this process held at most: of the GPU's memory as torch allocated it, without a
    GPU resident ones."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def work_of(trainer: Trainer) -> tuple[float, str]:
    """FLOPs of one device for each token that all of them train, and the precision of a run."""
    from minimind.costs.flops import flops
    from minimind.costs.this_machine import this_device
    from minimind.training.step_meter import step_of

    step, _ = step_of(trainer, this_device())
    work = flops(trainer.accelerator.unwrap_model(trainer.model), step)
    return work["model"] / step.tokens / trainer.args.world_size, step.precision


def fingerprint(model: nn.Module) -> int:
    """Sum over the bits of the weights that are trained; of weights that ZeRO-3 divides, those of
    this process."""
    whole_numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    trained = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    return sum(
        t.view(whole_numbers[t.element_size()]).sum(dtype=torch.int64).item() for t in trained
    )


class ChangeCallback(TrainerCallback):
    """Raises UserError at the end of a run, resumed or not, that has left every weight as it was.

    To be added after the guards, which may know why.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.before: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not args.resume_from_checkpoint:  # else it is taken up from the checkpoint
            self.before = fingerprint(model)

    def state_dict(self) -> dict:
        """What a resumed run needs; see resume.py."""
        return {"before": self.before}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        self.before = state["before"]

    def on_train_end(self, args, state, control, model=None, **kwargs):
        changed = torch.tensor([self.before != fingerprint(model)], device=args.device)
        if not self.trainer.accelerator.gather(changed).any():
            raise UserError(
                f"this run trained nothing: after {state.global_step:,} steps no weight has"
                f" changed. Each step was skipped, or the learning rate {args.learning_rate:g} is"
                " lost in the weights' rounding. Raise --learning_rate, or train for more steps."
            )


class EarlyStopping(EarlyStoppingCallback):
    """The library's, except: the evaluation before the first step is what a run has to beat, and a
    resumed run goes on counting where it was."""

    training = True

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved:
            self.early_stopping_patience_counter = saved["attributes"][
                "early_stopping_patience_counter"
            ]

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.training:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        count, name = self.early_stopping_patience_counter, args.metric_for_best_model
        if count >= self.early_stopping_patience and state.is_world_process_zero:
            say(
                f"stopping early: {count} evaluations did not improve {name}"
                f" {state.best_metric:.4f}"
            )


class Baseline(TrainerCallback):
    """Takes the evaluation before the first step as the best so far: what the run has to beat. One
    that is not finite is none: nothing compares with it."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        name = args.metric_for_best_model
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}") if name else None
        if not state.global_step and value is not None and math.isfinite(value):
            state.best_metric = value


class RouterLoadCallback(TrainerCallback):
    """Adds to each log how a mixture of experts spreads its tokens: `router_load/layer_0/expert_1`
    is the share of the visits since the last log, `router_load/max` the busiest expert's of all
    layers. Counted on the device, on the main process's tokens.

    It has to stand before the trackers' callbacks: they report the logs as they find them.
    """

    def __init__(self, model: nn.Module):
        self.routers = [
            module for module in model.modules() if isinstance(module, MiniMindTopKRouter)
        ]

    def on_train_begin(self, args, state, control, **kwargs):
        self.visits = [
            router.weight.new_zeros(len(router.weight), dtype=torch.float)
            for router in self.routers
        ]
        self.hooks = [
            router.register_forward_hook(
                lambda module, inputs, outputs, visits=visits: self._count(module, outputs, visits)
            )
            for router, visits in zip(self.routers, self.visits, strict=True)
        ]

    @staticmethod
    @torch.no_grad()
    def _count(router: MiniMindTopKRouter, outputs: tuple, visits: torch.Tensor) -> None:
        if router.training:
            top_k_index = outputs[-1].flatten()
            visits.scatter_add_(0, top_k_index, torch.ones_like(top_k_index, dtype=visits.dtype))

    def state_dict(self) -> dict:
        """The visits since the last log, for a resumed run; see resume.py."""
        return {"visits": [visits.cpu() for visits in self.visits]}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave; called after `on_train_begin`."""
        for visits, saved in zip(self.visits, state["visits"], strict=True):
            visits.copy_(saved)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        shares = [(visits / visits.sum()).tolist() for visits in self.visits]
        for layer, experts in enumerate(shares):
            logs.update(
                {
                    f"router_load/layer_{layer}/expert_{i}": round(share, 4)
                    for i, share in enumerate(experts)
                }
            )
        logs["router_load/max"] = max(map(max, shares))
        for visits in self.visits:
            visits.zero_()

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()
