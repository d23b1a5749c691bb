"""What keeps a run alive, or ends it with one message: steps that are not finite, lost trackers,
memory that grows.

A step whose loss or gradient is not finite changes nothing: neither weights nor the optimizer's
state. It counts as a step all the same, so that the schedule of the learning rate ends where it was
planned to. After several in a row the run stops, and leaves the batch and the weights it met for
`minimind replay`.
"""

import math
import os
import warnings
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import median

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from minimind.common.errors import UserError, decoration
from minimind.common.files import read_json, write_json
from minimind.common.launch import is_main_process, notice
from minimind.training.checkpoints import doubt
from minimind.training.saving import SaveCallback, Writing, numel

WINDOW, ENOUGH = 64, 16  # steps that a loss is compared with, at most and at least
SPIKE = 6.0  # robust z-score: with normally distributed losses one step in a thousand million
KEPT_BATCHES = 3  # of the streaks of a run; more would tell nothing new
# memory: logs looked back at, share and bytes that are worth a notice
SAMPLES, GROWTH, GROWN_BYTES = 30, 0.1, 200e6
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
# What is read of a kept batch's record, and what of a batch has a value for each token id.
BATCH = {"step": int, "micro_batches": int, "precision": str, "weights": str | None}
BATCH |= dict.fromkeys(("loss", "grad_norm"), str | int | float | None)
PER_TOKEN = ("labels", "attention_mask", "position_ids", "completion_mask")


@dataclass
class Step:
    """What is known of a step. `seen` (3,): whether it was bad, its loss and its gradient norm,
    perhaps on their way from the device; `ready` tells when they are here."""

    number: int
    seen: torch.Tensor
    ready: "torch.cuda.Event | None"
    batches: list[dict]


class GuardCallback(TrainerCallback):
    """Skips steps that are not finite, and stops after `max_nonfinite_steps` of them in a row.

    No step waits for the device. Whether a step is skipped is decided there: the fused optimizers
    of torch take `found_inf`, as they do from a gradient scaler; others are asked to wait for the
    flag. The host reads the flag one step late, when the next step is already under way.

    Of several processes all decide alike without a message of their own: a loss that is not finite
    makes the gradient of one parameter so, also where its own gradient is 0 (the mean over no
    token, say). Gradients are summed over the processes anyway, so that the norm of the sum is not
    finite on any of them.

    DeepSpeed steps inside its backward pass. ZeRO 1, 2 and 3 look at the gradients there, and skip,
    by themselves; this callback counts, and moves the schedule on, which DeepSpeed leaves standing.

    With fp16 the loss scale looks for its place by steps that overflow: the library skips these,
    and here only a loss that is not finite counts.
    """

    lasting = ("streak", "skipped", "skipped_since_log", "steps_since_log", "saved", "spike")

    def __init__(self, trainer: Trainer, output_dir: Path, limit: int):
        self.trainer, self.output_dir, self.limit = trainer, output_dir, limit
        self.batches: list[dict] = []
        self.pending: deque[Step] = deque()
        self.lag = 1 if trainer.args.device.type == "cuda" else 0
        self.streak = self.skipped = self.skipped_since_log = self.steps_since_log = self.saved = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.spike = 0.0
        self.bad = self.norm = self.loss_before = self.loss_is_bad = None
        trainer.compute_loss = self._poisoned(trainer.compute_loss)
        trainer._get_grad_norm = self._judged(trainer._get_grad_norm)
        trainer.log = self._counted(trainer.log)

    def _poisoned(self, compute_loss):
        """The trainer's loss; where it is not finite, `_poison` sees to it that the gradient is not
        either."""

        @wraps(compute_loss)
        def wrapped(model, inputs, *args, **kwargs):
            if not model.training:
                return compute_loss(model, inputs, *args, **kwargs)
            self.batches.append({**inputs, "num_items_in_batch": kwargs.get("num_items_in_batch")})
            result = compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.loss_is_bad = ~torch.isfinite(loss.detach())
            return result

        return wrapped

    def _poison(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.where(self.loss_is_bad, torch.nan, gradient)

    def _judged(self, get_grad_norm):
        """The trainer's gradient norm, which tells whether the step that follows is skipped."""

        @wraps(get_grad_norm)
        def wrapped(*args, **kwargs):
            norm = get_grad_norm(*args, **kwargs)
            device = self.trainer.args.device
            # DeepSpeed without ZeRO may tell none.
            self.norm = torch.as_tensor(
                0.0 if norm is None else norm, dtype=torch.float, device=device
            ).detach()
            self.bad = ~torch.isfinite(self.norm)
            if self.fp16:
                self.bad = ~torch.isfinite(self.trainer._tr_loss)
                if self.trainer.args.world_size > 1:
                    flag = self.bad.float()
                    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
                    self.bad = flag > 0
            elif self.fused:
                self.optimizer.found_inf = self.bad.float()
            return norm

        return wrapped

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.fp16 = bool(args.fp16)
        self.deepspeed = trainer.is_deepspeed_enabled
        self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self.fused = not self.deepspeed and bool(self.optimizer.defaults.get("fused"))
        always_used(trainer.model).register_hook(self._poison)
        if not (self.fused or self.deepspeed or self.fp16):
            step = self.optimizer.step

            @wraps(step)
            def unless_bad(*args, **kwargs):
                return None if bool(self.bad) else step(*args, **kwargs)

            self.optimizer.step = unless_bad

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches = []
        self.loss_before = self.trainer._tr_loss.clone()

    def on_optimizer_step(self, args, state, control, **kwargs):
        running = self.trainer._tr_loss
        device = running.device
        bad = self.bad.to(device)
        seen = torch.stack(
            [bad.float(), (running - self.loss_before).float(), self.norm.to(device)]
        )
        running.copy_(torch.where(bad, self.loss_before, running))
        ready = None
        if seen.is_cuda:
            there = torch.empty(3, pin_memory=True)
            seen = there.copy_(seen, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(Step(state.global_step + 1, seen, ready, self.batches))
        if self.deepspeed and not self.fp16 and bool(self.bad):
            self._after_deepspeed_skipped()
        self._read(self.lag)

    def on_train_end(self, args, state, control, **kwargs):
        self._read(0)

    def in_streak(self) -> bool:
        """Whether the last step was bad; waits for the device."""
        self._read(0)
        return self.streak > 0

    def state_dict(self) -> dict:
        """What a run that goes on from a checkpoint has to know, to log what it would have."""
        self._read(0)
        return {name: getattr(self, name) for name in self.lasting} | {"losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave."""
        for name in self.lasting:
            setattr(self, name, state[name])
        self.losses.extend(state["losses"])

    def _after_deepspeed_skipped(self) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            raise UserError(
                f"step {self.trainer.state.global_step + 1}: the gradient norm is not finite, and"
                " this DeepSpeed setup has stepped with it: the weights are spoilt. Take ZeRO 1 or"
                " 2, leave bf16.check_grad_overflow on, and resume from the last checkpoint."
            )
        with warnings.catch_warnings():
            # "before optimizer.step()", which was skipped
            warnings.simplefilter("ignore", UserWarning)
            (self.trainer.model_wrapped.lr_scheduler or self.trainer.lr_scheduler).step()

    def _read(self, lag: int) -> None:
        """Judge the steps that are more than `lag` steps old, at the same step on every process."""
        while len(self.pending) > lag:
            step = self.pending.popleft()
            if step.ready:
                step.ready.synchronize()
            bad, loss, norm = step.seen.tolist()
            self.steps_since_log += 1
            if bad:
                self._on_bad(step, loss, norm)
            else:
                self.streak = 0
                self._watch(step.number, loss)

    def _on_bad(self, step: Step, loss: float, norm: float) -> None:
        self.streak += 1
        self.skipped += 1
        self.skipped_since_log += 1
        found = f"step {step.number}: loss {loss:g}, gradient norm {norm:g}"
        last = self.streak >= self.limit
        directory = self.output_dir / f"bad_batch-{step.number}"
        if last or (self.streak == 1 and self.saved < KEPT_BATCHES):
            save_batch(self.trainer, directory, step, loss, norm, with_weights=last)
            self.saved += 1
            is_kept = (directory / "batch.json").is_file()
            found = (
                f"{found}; the batch is kept in {directory}"
                if is_kept
                else f"{found}; the batch is not kept"
            )
        if not last:
            notice(f"{found}; step skipped ({self.streak} in a row, the run stops at {self.limit})")
            return
        if is_main_process():
            doubt(self.output_dir / f"checkpoint-{step.number - self.streak}", self.streak)
        see = (
            f" See which rows and which layer do it: minimind replay {directory}."
            if is_kept
            else ""
        )
        raise UserError(
            f"{found}. Stopped, since {self.streak} steps in a row had no finite loss and gradient"
            f" (all were skipped; --max_nonfinite_steps).{see} If it is the learning rate rather"
            " than the data: lower it, and go on from the last checkpoint."
        )

    def _watch(self, step: int, loss: float) -> None:
        """Say so where a loss stands far above those before it."""
        if len(self.losses) >= ENOUGH:
            middle = median(self.losses)
            spread = 1.4826 * median(abs(value - middle) for value in self.losses)
            z = (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
            if z > SPIKE and loss > 1.1 * middle:
                if not self.spike:
                    notice(
                        f"step {step}: loss {loss:.4f} stands far above the {middle:.4f} of the"
                        f" {len(self.losses)} steps before (robust z-score {z:.0f})"
                    )
                self.spike = max(self.spike, z)
        self.losses.append(loss)

    def _counted(self, log):
        """The trainer's log, its loss the mean of the steps that were taken."""

        @wraps(log)
        def wrapped(logs, *args, **kwargs):
            if "loss" in logs:
                self._read(0)
                steps, skipped = self.steps_since_log, self.skipped_since_log
                if skipped:
                    mean = logs["loss"] * steps / (steps - skipped) if skipped < steps else math.nan
                    if skipped < steps:
                        self.trainer._total_loss_scalar += (mean - logs["loss"]) * steps
                    logs["loss"] = mean
                if self.skipped:
                    logs["skipped_steps"] = self.skipped
                if self.spike:
                    logs["loss_spike"] = round(self.spike, 1)
                self.steps_since_log = self.skipped_since_log = 0
                self.spike = 0.0
            return log(logs, *args, **kwargs)

        return wrapped


def always_used(model: torch.nn.Module) -> torch.Tensor:
    """The smallest parameter that is trained and no expert's: one that has a gradient in every
    step."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return min(
        ([p for name, p in trained if ".experts." not in name] or [p for _, p in trained]),
        key=numel,
    )


def save_batch(
    trainer: Trainer, directory: Path, step: Step, loss: float, norm: float, with_weights: bool
) -> None:
    """Keep the micro-batches of a step, one file per process, and perhaps the weights; every
    process calls it.

    batch.json (written last, where all else was)  rank-0.safetensors ...  model/ (a stage directory)
    """
    from minimind.training.saving import save_model

    args = trainer.args
    tensors = {
        # Safetensors refuses shared memory
        f"{number}/{name}": value.detach().cpu().clone().contiguous()
        for number, batch in enumerate(step.batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    writing = Writing(directory, 0)
    with writing.part():
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".rank-{args.process_index}.partial"
        save_file(tensors, partial)
        partial.replace(directory / f"rank-{args.process_index}.safetensors")
    if with_weights:
        with writing.part():
            save_model(trainer, directory / "model")
            if is_main_process():
                trainer.processing_class.save_pretrained(directory / "model")
    with decoration("keeping a batch"):
        writing.check()  # waits for all: a launcher ends all processes as soon as one has ended
        if is_main_process():
            record = {
                "step": step.number,
                "loss": repr(loss),  # JSON has no nan
                "grad_norm": repr(norm),
                "micro_batches": len(step.batches),
                "processes": args.world_size,
                "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
                "weights": "model" if with_weights else None,
            }
            write_json(directory / "batch.json", record)


# What only tells about a run.


def shield(handler: CallbackHandler, *decorations: type) -> None:
    """Let no tracker and none of these `decorations` end a run: the first error of one is said. A
    tracker is asked no more then; ours go on, since a disk may have room again."""
    trackers = tuple(INTEGRATION_TO_CALLBACK.values())
    for callback in handler.callbacks:
        if isinstance(callback, (*trackers, *decorations)):
            _shield(callback, once=isinstance(callback, trackers))


def _shield(callback: TrainerCallback, once: bool) -> None:
    name = type(callback).__name__.removesuffix("Callback").lower()
    failed = False

    def shielded(event):
        @wraps(event)
        def wrapped(args, state, control, **kwargs):
            nonlocal failed
            if once and failed:
                return
            with decoration(name):
                try:
                    event(args, state, control, **kwargs)
                except Exception:
                    failed = True
                    raise

        return wrapped

    for event in EVENTS:
        setattr(callback, event, shielded(getattr(callback, event)))


# Memory.


def process_bytes() -> int:
    """Memory that this process holds for itself; files it only reads, such as the rows of a
    dataset, are left out."""
    info = psutil.Process(os.getpid()).memory_info()
    return info.rss - getattr(info, "shared", 0)


class MemoryCallback(TrainerCallback):
    """Says so where the memory of the process, or of its GPU, has grown from log to log."""

    def __init__(self):
        self.samples: dict[str, deque] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        values = {"memory of the process": process_bytes()}
        if args.device.type == "cuda":
            values["memory allocated on the GPU"] = torch.cuda.memory_allocated(args.device)
        for name, value in values.items():
            samples = self.samples.setdefault(name, deque(maxlen=SAMPLES))
            samples.append((state.global_step, value))
            if len(samples) == SAMPLES and (grown := growth(samples)):
                steps = samples[-1][0] - samples[0][0]
                notice(
                    f"step {state.global_step}: the {name} has grown by {grown / 1e6:,.0f} MB in"
                    f" {steps:,} steps, to {value / 1e6:,.0f} MB"
                )
                samples.clear()


def growth(samples) -> float:
    """Bytes that samples (step, bytes) have grown from their first third to their last, 0 unless it
    is much and the second third lies clearly between: a leak grows all the time, a cache that fills
    does not."""
    third = len(samples) // 3
    values = [value for _, value in samples]
    first, second, last = (
        median(values[start : start + third]) for start in (0, third, len(values) - third)
    )
    grown = last - first
    steady = first + grown / 4 < second < last - grown / 4
    return grown if steady and grown > max(GROWTH * first, GROWN_BYTES) else 0.0


def install_guards(trainer: Trainer, output_dir: Path, *decorations: type) -> None:
    """Put all guards around a trainer that is about to train; `decorations` are callbacks that must
    not end it."""
    limit = trainer.args.max_nonfinite_steps
    if limit:
        trainer.add_callback(GuardCallback(trainer, output_dir, limit))
    # First: what it makes up for may fall on the end of an epoch, where `ResumeCallback` puts it
    # off.
    trainer.callback_handler.callbacks.insert(0, SaveCallback(trainer, output_dir))
    trainer.add_callback(MemoryCallback())
    shield(trainer.callback_handler, MemoryCallback, *decorations)


def read_batch(directory: Path) -> tuple[dict, dict[int, list[dict]]]:
    """A kept batch: its record, and the micro-batches of each process.

    Raises:
        UserError: it is no such directory.
    """
    from safetensors.torch import load_file

    expected = (
        "Expected the bad_batch-STEP of a run, with batch.json and rank-N.safetensors inside."
    )
    if not os.path.lexists(directory / "batch.json"):
        raise UserError(f"{directory} is no kept batch: there is no batch.json. {expected}")
    record = read_json(directory / "batch.json", expected, fields=BATCH)
    processes = {}
    for path in sorted(directory.glob("rank-*.safetensors")):
        batches: dict[int, dict] = defaultdict(dict)
        if not path.is_file():
            raise UserError(f"{path} is not a regular file. {expected}")
        try:
            process = int(path.stem.removeprefix("rank-"))
            for key, value in load_file(path).items():
                number, _, name = key.partition("/")
                batches[int(number)][name] = value
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}. {expected}") from error
        for batch in batches.values():
            ids = batch.get("input_ids")
            rows = [batch[name] for name in PER_TOKEN if name in batch]
            if (
                ids is None
                or ids.ndim != 2
                or ids.is_floating_point()
                or any(ids.shape != row.shape for row in rows)
            ):
                raise UserError(f"{path} holds no rows of token ids. {expected}")
        if len(batches) != record["micro_batches"]:
            raise UserError(
                f"{path} holds {len(batches)} micro-batches, batch.json says"
                f" {record['micro_batches']}."
            )
        processes[process] = [batches[number] for number in sorted(batches)]
    if not processes:
        raise UserError(f"{directory} holds no batch. {expected}")
    return record, processes
