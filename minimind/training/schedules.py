"""The learning rate's schedule, and recomputation: their arguments, and whether they fit."""

import json
import math
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import SchedulerType, TrainingArguments, get_scheduler

# Steps of the run that a schedule is tried for where the data decides how many there are
TRIED = 1000


def schedule_options(args: TrainingArguments, steps: int) -> dict[str, Any]:
    """What the library's `get_scheduler` takes beside the warm-up for a run of so many steps."""
    given = args.lr_scheduler_kwargs or {}
    if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
        return given
    share = args.lr_decay_steps
    return {"num_decay_steps": math.ceil(share * steps) if share < 1 else int(share)} | given


def check_schedule(args: TrainingArguments) -> None:
    """Build the schedule for one number and ask it for some rates; the run's own is built when all
    data is read.

    Raises:
        ValueError: it does not take the arguments, or gives a rate that is none.
    """
    kind, given = args.lr_scheduler_type, args.lr_scheduler_kwargs
    steps = args.max_steps if args.max_steps > 0 else TRIED
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        if given and kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
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
    except Exception as error:  # each of them has its own
        raise ValueError(
            f"--lr_scheduler_kwargs {json.dumps(given)[:200]} do not fit --lr_scheduler_type"
            f" {kind.value}: {error}"
        ) from error


def check_recomputation(args: TrainingArguments) -> None:
    """Recompute one number, since the run begins to when all data is read.

    Raises:
        ValueError: torch does not take the arguments.
    """
    given = args.activation_checkpointing_kwargs
    if not args.activation_checkpointing or not given:
        return
    number = torch.zeros((), requires_grad=True)
    try:
        torch.utils.checkpoint.checkpoint(
            torch.sin, number, **{"use_reentrant": False} | given
        ).backward()
    except Exception as error:  # it has many
        raise ValueError(
            f"--activation_checkpointing_kwargs {json.dumps(given)[:200]}: {error}"
        ) from error
