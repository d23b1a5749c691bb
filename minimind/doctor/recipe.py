"""Checks of a recipe's other choices: saving, epochs, disk space and tracking."""

import math
import os
import shutil
from pathlib import Path

from minimind.doctor.registry import Case, check, value_of
from minimind.training.saving import checkpoint_bytes
from minimind.training.wandb_tracking import offline_reason

# Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264: up to there repeated text is nearly new
MANY_EPOCHS = 4


@check("args", "steps")
def save_steps(case: Case) -> tuple:
    args, steps, strategy = case.args, case.steps, value_of(case.args.save_strategy)
    if strategy != "steps":
        return "ok", f"save_strategy {strategy}"
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    if every <= steps:
        return "ok", f"{steps // int(every):,} checkpoints"
    found = f"save_steps {every:,}, and the run has {steps:,}"
    fix = "Lower save_steps: after an interruption the run would start over."
    return "warning", found, "a checkpoint during the run", fix


@check("args", "train")
def epochs(case: Case) -> tuple:
    if case.args.time_budget:
        return "ok", f"as many passes over {len(case.train):,} rows as the time budget has room for"
    passes = case.args.num_train_epochs
    if case.args.max_steps > 0:
        passes = case.args.max_steps * case.rows_per_step / max(len(case.train), 1)
    if case.spec.reads_documents and passes > MANY_EPOCHS:
        expected = (
            f"at most {MANY_EPOCHS}: what is repeated more often teaches less and less (arXiv"
            " 2305.16264), and little text is learnt by heart from the third pass on (the curve"
            " is in docs/benchmarks.md)"
        )
        fix = "Give more text, or train for fewer steps."
        return "warning", f"{passes:.1f} passes over the data", expected, fix
    return "ok", f"{passes:.2g} passes over {len(case.train):,} rows"


@check("args", "model")
def disk_space(case: Case) -> tuple:
    args, kept = case.args, 0
    if value_of(args.save_strategy) != "no":
        kept = (args.save_total_limit or 10) + 1  # a new one is complete before an old one goes
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters())
    needed = kept * checkpoint_bytes(case.model, case.deepspeed is not None) + weights
    where = Path(args.output_dir).absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    found = (
        f"{needed / 1e6:,.0f} MB for {kept} checkpoints and the weights, {free / 1e6:,.0f} MB free"
    )
    if needed <= free:
        return "ok", found
    fix = "Make room, lower save_total_limit, or give another output_dir."
    return "error", found, "room for all", fix


@check("args", quick=False)
def tracker(case: Case) -> tuple:
    names = case.args.report_to or []
    if "wandb" not in names:
        return "ok", f"report_to {', '.join(names) or 'none'}"
    mode = os.environ.get("WANDB_MODE")
    reason = f"WANDB_MODE is {mode}" if mode else offline_reason()
    return "ok", f"wandb offline, because {reason}" if reason else "wandb online"
