"""A run that ends by the clock: under `--time_budget 30m` the schedule of the learning rate runs on
time, and its decay ends when the budget does."""

import time
from collections.abc import Callable
from functools import cache

import psutil
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from minimind.common.bounds import MOST
from minimind.common.errors import UserError
from minimind.common.launch import largest_of_all
from minimind.costs.units import duration
from minimind.training.schedules import TRIED, counted_warmup
from minimind.training.signals import find_launchers


@cache
def _began() -> float:
    """When this process, or the launcher above it, was started, on `time.monotonic`'s clock."""
    started = min(each.create_time() for each in (psutil.Process(), *find_launchers()))
    return time.monotonic() - max(0.0, time.time() - started)


def seconds_since_start() -> float:
    """Seconds since the command was started: the launcher, if there is one."""
    return time.monotonic() - _began()


class TimeBudget(TrainerCallback):
    """The position of a run in its time budget, from which the learning rate of each step follows.

    The clock runs from the start of the command: start-up, evaluations and checkpoints count. What
    is left of it after the first step (which may compile, and takes far longer than others) is the
    schedule: at the share p of that time the rate is that of the library's schedule at p of its
    steps, whatever the speed. A warm-up given in steps takes that many steps, and the time after
    them is the rest of the schedule. Time for the evaluations and the checkpoint at the end is set
    aside, as much as the last ones took. The step in which the rest of the time is expected to
    pass is the last.

    All processes take the largest of their readings, so that they agree on each rate and on the
    last step. A resumed run continues at the time of its checkpoint: neither the pause nor the
    second start-up count.

    It has to be the first callback: it decides which step is the last, and which are evaluated,
    saved and logged where that is given as a share (of the schedule then).

    Until then `state.max_steps` is an estimate: from the steps so far, before there are any
    `planned`.

    `clock` returns seconds since the start of the command; default: `seconds_since_start`.

    Raises:
        UserError: (before the first step) no time is left to train.
    """

    lasting = ("start", "start_step", "progress", "ended")
    lasting += ("step_seconds", "evaluation_seconds", "saving_seconds")

    def __init__(self, trainer, clock: Callable[[], float] | None = None):
        self.trainer, self.clock = trainer, clock or seconds_since_start
        self.seconds = trainer.args.time_budget
        self.warmup = counted_warmup(trainer.args)
        self.earlier = 0.0  # seconds of the run before this process, less those of its start
        self.start: float | None = None  # of the schedule: seconds of the budget, and the step
        self.start_step = 0
        self.progress = 0.0  # the share of the schedule that has passed when the step begins
        self.step = 0  # that is under way
        self.evaluation_seconds = self.saving_seconds = self.step_seconds = 0.0
        self.is_last = self.ended = False
        self.due: list[str] = []
        self.planned = MOST  # steps of the run

    @property
    def elapsed(self) -> float:
        """Seconds of the budget that have passed for this process."""
        return self.earlier + self.clock()

    @property
    def share(self) -> float:
        """The share of the budget that has passed for this process."""
        return self.elapsed / self.seconds

    def whole_and_left(self) -> tuple[float, float]:
        """Seconds of the budget, and those that are left of it."""
        return self.seconds, max(0.0, self.seconds - self.elapsed)

    def factor(self, step: int, schedule: Callable[[float], float]) -> float:
        """The factor of the learning rate by the library's `schedule`, in place of that of a step:
        the same however often the schedule is stepped."""
        return schedule(min(self.step, self.warmup) + self.progress * TRIED)

    # What a checkpoint keeps

    def state_dict(self) -> dict:
        """What a resumed run needs to continue at the same point of the schedule."""
        return {name: getattr(self, name) for name in self.lasting} | {"elapsed": self.elapsed}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state; called after `on_train_begin`."""
        for name in self.lasting:
            setattr(self, name, state[name])
        self.earlier = state["elapsed"] - self.clock()
        trainer = self.trainer
        if "time_budget" in trainer.changes:
            self.progress, self.ended = 0.0, False
        if self.ended:
            trainer.state.max_steps = trainer.state.global_step
        else:
            self._advance(trainer.state, trainer.lr_scheduler)

    # What happens in a run

    def on_train_begin(self, args, state, control, **kwargs):
        self.mark = self.elapsed
        if state.global_step:  # resumed
            return
        state.max_steps = self.planned
        (now,) = largest_of_all([self.elapsed], args.device)
        if now >= self.seconds:
            raise UserError(
                f"--time_budget {duration(self.seconds / 3600)}: the start alone took"
                f" {duration(now / 3600)}. Give a longer one."
            )

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        before = self.progress
        self._advance(state, lr_scheduler)
        self.due = [
            kind
            for kind, strategy, every in (
                ("log", args.logging_strategy, args.logging_steps),
                ("evaluate", args.eval_strategy, args.eval_steps),
                ("save", args.save_strategy, args.save_steps),
            )
            if strategy == "steps" and every < 1 and self.progress // every > before // every
        ]
        self.mark = self.elapsed

    def _advance(self, state, schedule) -> None:
        """Read the clocks, and set the position and the learning rate of the step to come; all
        processes call it."""
        # What is set aside for the end: the last evaluation, another of the best model where it is
        # loaded (see `held_out_metrics`), the last checkpoint and the stage directory
        passes = 1 + self.trainer.args.load_best_model_at_end
        reserve = passes * self.evaluation_seconds + 2 * self.saving_seconds

        # Where the run is in its budget, the same for all processes
        readings = [self.elapsed, self.step_seconds, reserve]
        now, step_seconds, reserve = largest_of_all(readings, self.trainer.args.device)
        end, step = self.seconds - reserve, state.global_step
        if not step and now >= end:
            raise UserError(
                f"--time_budget {duration(self.seconds / 3600)}: the start took"
                f" {duration(now / 3600)}, the evaluations at the end take about"
                f" {duration(reserve / 3600)}, and no time is left to train. Give a longer one."
            )

        # Where it is in its schedule
        self.step, self.is_last = step, now + step_seconds >= end
        if self.start is None and step >= max(1, self.warmup):
            self.start, self.start_step = now, step
        if self.start is not None:
            whole = end - self.start
            progress = (now - self.start) / whole if whole > 0 else 1.0
            self.progress = max(self.progress, min(progress, 1.0))
            if step > self.start_step and now > self.start:
                speed = (step - self.start_step) / (now - self.start)
                state.max_steps = round(step + speed * (end - now))
        state.max_steps = max(step + 2, state.max_steps)  # the last step is decided at its end
        set_rates(schedule)

    def on_step_end(self, args, state, control, **kwargs):
        now = self.elapsed
        if state.global_step > 1:  # the first may compile
            self.step_seconds = now - self.mark
        self.mark = now
        if self.is_last:
            self.ended, state.max_steps = True, state.global_step
            return
        for kind in self.due:
            if kind != "evaluate" or args.eval_delay <= state.global_step:
                setattr(control, f"should_{kind}", True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs["time_budget"] = round(self.share, 4)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluation_seconds, self.mark = self.elapsed - self.mark, self.elapsed

    def on_save(self, args, state, control, **kwargs):
        self.saving_seconds, self.mark = self.elapsed - self.mark, self.elapsed


def set_rates(schedule) -> None:
    """Set the learning rates of an optimizer to those that its schedule has now, without a step of
    the schedule. Those that follow the loss are left alone."""
    schedule = getattr(schedule, "scheduler", schedule)  # in DeepSpeed's wrapper
    if not isinstance(schedule, LambdaLR):
        return
    groups = schedule.optimizer.param_groups
    for group, rate, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]  # what the next log shows
