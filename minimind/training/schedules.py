"""The learning rate's schedule, and recomputation: checks of their arguments before the data is
read."""

import json
import math
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import SchedulerType, TrainingArguments, get_scheduler

# Steps that a schedule is built for where the data decides how many there are, or the clock does.
TRIED = 1000
COUNTS = ("num_decay_steps", "num_stable_steps", "timescale")  # arguments of schedules in steps


def schedule_options(args: TrainingArguments, steps: int) -> dict[str, Any]:
    """The arguments of the library's `get_scheduler` beside the warm-up, for so many steps."""
    options = args.lr_scheduler_kwargs or {}
    if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
        return options
    share = args.lr_decay_steps
    return {"num_decay_steps": math.ceil(share * steps) if share < 1 else int(share)} | options


def counted_warmup(args: TrainingArguments) -> int:
    """The steps of a warm-up that is given in steps; 0 where it is a share."""
    return int(args.warmup_steps) if args.warmup_steps >= 1 else 0


def steps_on_time(args: TrainingArguments) -> int:
    """The steps that the schedule of a time budget is built for; see `TimeBudget.factor`."""
    return counted_warmup(args) + TRIED


def check_time_budget(args: TrainingArguments) -> None:
    """Raise ValueError for options that count the steps of a run whose end is a time."""
    if args.time_budget is None:
        return
    if args.max_steps > 0:
        raise ValueError(
            "--time_budget and --max_steps both say when the run ends: leave one out. To leave out"
            " a recipe's, add --max_steps -1 or --time_budget none"
        )
    if "layerwise" in str(args.optim):
        raise ValueError(
            f"--optim {getattr(args.optim, 'value', args.optim)} steps each layer's schedule on its"
            " own, and none of them knows --time_budget: leave one out"
        )
    decays = args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY
    if decays and args.lr_decay_steps >= 1:
        raise ValueError(
            f"--lr_decay_steps {args.lr_decay_steps:g} counts steps, and under --time_budget nobody"
            " knows how many there will be: give a share below 1, such as 0.2"
        )
    for name in set(COUNTS).intersection(args.lr_scheduler_kwargs or ()):
        raise ValueError(
            f"--lr_scheduler_kwargs: {name} counts steps, and under --time_budget nobody knows how"
            " many there will be: leave it out"
        )


def check_schedule(args: TrainingArguments) -> None:
    """Build the schedule for one number and try some rates; the run's own is built when all data is
    read.

    Raises:
        ValueError: it does not take the arguments, or a rate would be negative or not finite.
    """
    kind, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    steps = args.max_steps if args.max_steps > 0 else TRIED
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        if options and kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
            raise TypeError("it takes none")
        schedule = get_scheduler(
            kind, optimizer, args.get_warmup_steps(steps), steps, schedule_options(args, steps)
        )
        for step in {0, steps // 2, steps}:
            for factor in getattr(schedule, "lr_lambdas", ()):
                if not 0 <= factor(step) < math.inf:
                    raise ValueError(
                        f"the rate of step {step:,} would be {factor(step) * args.learning_rate:g}"
                    )
    except Exception as error:  # each schedule has its own
        raise ValueError(
            f"--lr_scheduler_kwargs {json.dumps(options)[:200]} do not fit --lr_scheduler_type"
            f" {kind.value}: {error}"
        ) from error


def check_recomputation(args: TrainingArguments) -> None:
    """Recompute one number, since the run would do it only after all data is read.

    Raises:
        ValueError: torch does not take the arguments.
    """
    options = args.activation_checkpointing_kwargs
    if not args.activation_checkpointing or not options:
        return
    number, options = torch.zeros((), requires_grad=True), {"use_reentrant": False} | options
    try:
        torch.utils.checkpoint.checkpoint(torch.sin, number, **options).backward()
    except Exception as error:  # torch raises many kinds
        options = json.dumps(args.activation_checkpointing_kwargs)[:200]
        raise ValueError(f"--activation_checkpointing_kwargs {options}: {error}") from error
