"""Steps whose loss or gradient is not finite are skipped; after several in a row the run stops.

A skipped step changes neither weights nor the optimizer's state. It counts as a step all the same,
so that the schedule of the learning rate ends where it was planned to. A run that stops leaves the
batch and the weights it met for `minimind replay`.
"""

import math
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import Trainer, TrainerCallback

from minimind.common.errors import UserError
from minimind.common.launch import is_main_process, notice
from minimind.training.checkpoints import record_bad_steps
from minimind.training.kept_batches import save_batch
from minimind.training.saving import numel

WINDOW, ENOUGH = 64, 16  # losses that a new one is compared with, at most and at least
SPIKE = 6.0  # robust z-score: with normally distributed losses one step in a thousand million
KEPT_BATCHES = 3  # per run, of the first steps of its streaks; more would tell nothing new


class GuardedTrainer(Trainer):
    """Mixed into the libraries' trainers; identical to them except: once `guard` is set, it sees
    loss and gradient norm of each training step and skips the step where they are not finite.

    The guard sees the loss of the classes that follow in the method resolution order: a class that
    changes the loss in training has to be one of those.
    """

    guard: "GuardCallback | None" = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        guard = self.guard if model.training else None
        if guard:
            guard.batches.append({**inputs, "num_items_in_batch": num_items_in_batch})
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if guard:
            guard.check_loss(result[0] if isinstance(result, tuple) else result)
        return result

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guard:
            self.guard.check_norm(norm)
        return norm

    def log(self, logs, *args, **kwargs):
        if self.guard and "loss" in logs:
            self.guard.correct(logs)
        super().log(logs, *args, **kwargs)

    def in_streak(self) -> bool:
        """Whether the last step was skipped; waits for the device."""
        return self.guard is not None and self.guard.in_streak()


@dataclass
class ObservedStep:
    """A step that the host has not judged yet.

    `values` (3,): whether it was bad, its loss and its gradient norm, perhaps still on their way
    from the device; `ready` is the event that they have arrived.
    """

    number: int
    values: torch.Tensor
    ready: "torch.cuda.Event | None"
    batches: list[dict]


class GuardCallback(TrainerCallback):
    """Skips steps that are not finite, and ends the run after `max_nonfinite_steps` in a row.

    No step waits for the device, where it is decided whether a step is skipped: torch's fused
    optimizers take `found_inf`, as they do from a gradient scaler. (Other optimizers do wait, and
    then find no gradients.) The host reads the decision one step later, when the next step is
    already under way.

    All processes decide alike without a message of their own. A loss that is not finite makes the
    gradient of one parameter so, even where its own gradient is 0 (the mean over no token, say).
    Gradients are summed over the processes anyway, so the norm of the sum is not finite on any.

    DeepSpeed steps inside its backward pass, where ZeRO 1, 2 and 3 check the gradients and skip.
    This callback then counts, and advances the schedule, which DeepSpeed does not.

    With fp16 the loss scale finds its value by steps that overflow: the library skips these, and
    only a loss that is not finite counts here.
    """

    lasting = ("streak", "skipped", "skipped_since_log", "steps_since_log", "saved", "spike")

    def __init__(self, trainer: GuardedTrainer):
        self.trainer, self.limit = trainer, trainer.args.max_nonfinite_steps
        self.output_dir = Path(trainer.args.output_dir)
        self.batches: list[dict] = []
        self.pending: deque[ObservedStep] = deque()
        self.lag = 1 if trainer.args.device.type == "cuda" else 0
        self.streak = self.skipped = self.skipped_since_log = self.steps_since_log = self.saved = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.spike = 0.0
        self.bad = self.norm = self.loss_before = self.loss_is_bad = None

    # On the device: whether a step is skipped.

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.fp16 = bool(args.fp16)
        self.deepspeed = trainer.is_deepspeed_enabled
        self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self.fused = not self.deepspeed and bool(self.optimizer.defaults.get("fused"))
        always_used(trainer.model).register_hook(self._poison)

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches = []
        self.loss_before = self.trainer._tr_loss.clone()

    def check_loss(self, loss: torch.Tensor) -> None:
        """Called with the loss of each micro-batch, before the backward pass."""
        self.loss_is_bad = ~torch.isfinite(loss.detach())

    def _poison(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.where(self.loss_is_bad, torch.nan, gradient)

    def check_norm(self, norm: torch.Tensor | float | None) -> None:
        """Called with the gradient norm of each step, before the optimizer's."""
        norm = 0.0 if norm is None else norm  # DeepSpeed without ZeRO may return none
        device = self.trainer.args.device
        self.norm = torch.as_tensor(norm, dtype=torch.float, device=device).detach()
        self.bad = ~torch.isfinite(self.norm)
        if self.fp16:
            self.bad = ~torch.isfinite(self.trainer._tr_loss)
            if self.trainer.args.world_size > 1:
                flag = self.bad.float()
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
                self.bad = flag > 0
        elif self.fused:
            self.optimizer.found_inf = self.bad.float()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # An optimizer leaves parameters without a gradient, and their state, as they are
        if not (self.fused or self.deepspeed or self.fp16) and bool(self.bad):
            self.optimizer.zero_grad()

    def on_optimizer_step(self, args, state, control, **kwargs):
        running = self.trainer._tr_loss
        device = running.device
        bad = self.bad.to(device)
        values = torch.stack(
            [bad.float(), (running - self.loss_before).float(), self.norm.to(device)]
        )
        running.copy_(torch.where(bad, self.loss_before, running))
        ready = None
        if values.is_cuda:
            values = torch.empty(3, pin_memory=True).copy_(values, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(ObservedStep(state.global_step + 1, values, ready, self.batches))
        if self.deepspeed and not self.fp16 and bool(self.bad):
            self._after_deepspeed_skipped()
        self._read(self.lag)

    def _after_deepspeed_skipped(self) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            raise UserError(
                f"step {self.trainer.state.global_step + 1}: the gradient norm is not finite, and"
                " this DeepSpeed setup has stepped with it: the weights are damaged. Take ZeRO 1 or"
                " 2, leave bf16.check_grad_overflow on, and resume from the last checkpoint."
            )
        with warnings.catch_warnings():
            # "before optimizer.step()", which was skipped
            warnings.simplefilter("ignore", UserWarning)
            (self.trainer.model_wrapped.lr_scheduler or self.trainer.lr_scheduler).step()

    # On the host: what is counted and reported, at the same step on every process.

    def on_train_end(self, args, state, control, **kwargs):
        self._read(0)

    def in_streak(self) -> bool:
        """Whether the last step was bad; waits for the device."""
        self._read(0)
        return self.streak > 0

    def state_dict(self) -> dict:
        """What a resumed run needs to log what it would have logged."""
        self._read(0)
        return {name: getattr(self, name) for name in self.lasting} | {"losses": list(self.losses)}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from `state_dict`."""
        for name in self.lasting:
            setattr(self, name, state[name])
        self.losses.extend(state["losses"])

    def _read(self, lag: int) -> None:
        """Read the steps that are more than `lag` steps old."""
        while len(self.pending) > lag:
            step = self.pending.popleft()
            if step.ready:
                step.ready.synchronize()
            bad, loss, norm = step.values.tolist()
            self.steps_since_log += 1
            if bad:
                self._count_bad(step, loss, norm)
            else:
                self.streak = 0
                self._compare(step.number, loss)

    def _count_bad(self, step: ObservedStep, loss: float, norm: float) -> None:
        """Count a skipped step, perhaps keep its batch, and report it; the last one of a streak
        ends the run."""
        self.streak += 1
        self.skipped += 1
        self.skipped_since_log += 1
        what = f"step {step.number}: loss {loss:g}, gradient norm {norm:g}"
        last = self.streak >= self.limit
        directory = self.output_dir / f"bad_batch-{step.number}"
        if last or (self.streak == 1 and self.saved < KEPT_BATCHES):
            save_batch(self.trainer, directory, step.number, step.batches, loss, norm, last)
            self.saved += 1
            is_kept = (directory / "batch.json").is_file()
            kept = f"{what}; the batch is kept in {directory}"
            what = kept if is_kept else f"{what}; the batch is not kept"
        if not last:
            notice(f"{what}; step skipped ({self.streak} in a row, the run stops at {self.limit})")
            return
        if is_main_process():
            checkpoint = self.output_dir / f"checkpoint-{step.number - self.streak}"
            record_bad_steps(checkpoint, self.streak)
        hint = f" See which rows and which layer do it: minimind replay {directory}."
        raise UserError(
            f"{what}. Stopped, since {self.streak} steps in a row had no finite loss and gradient"
            f" (all were skipped; --max_nonfinite_steps).{hint if is_kept else ''} If it is the"
            " learning rate rather than the data: lower it, and resume from the last checkpoint."
        )

    def _compare(self, step: int, loss: float) -> None:
        """Give notice where a loss is far above those before it."""
        if len(self.losses) >= ENOUGH:
            middle = median(self.losses)
            spread = 1.4826 * median(abs(value - middle) for value in self.losses)
            z = (loss - middle) / max(spread, 1e-3 * abs(middle), 1e-12)
            if z > SPIKE and loss > 1.1 * middle:
                if not self.spike:
                    notice(
                        f"step {step}: loss {loss:.4f} is far above the {middle:.4f} of the"
                        f" {len(self.losses)} steps before (robust z-score {z:.0f})"
                    )
                self.spike = max(self.spike, z)
        self.losses.append(loss)

    def correct(self, logs: dict) -> None:
        """Make the loss of a log the mean of the steps that were taken, and add the counts."""
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


def always_used(model: torch.nn.Module) -> torch.Tensor:
    """The smallest trained parameter outside the experts: it has a gradient in every step."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    shared = [p for name, p in trained if ".experts." not in name]
    return min(shared or [p for _, p in trained], key=numel)
