"""Checks of what a run spends: updates, tokens, memory and time."""

import copy
import math
from statistics import fmean

import torch
from peft import PeftModel

from minimind.costs.this_machine import find_device
from minimind.costs.units import duration, gib
from minimind.doctor.checks import Case, check, sample, seconds_of_step, value_of
from minimind.planning.planned_runs import Rows, padded_length, sequence_lengths
from minimind.planning.computing import make_plan
from minimind.planning.plan import CHINCHILLA, Plan
from minimind.training.trainers import ScheduledTrainer

SCHEDULE_SAMPLE = 1000  # steps whose rates are added up
ROWS_SAMPLE = 2000  # rows whose lengths are looked at
FEW_TOKENS = CHINCHILLA / 20  # per parameter: a twentieth of what is best
# Measured at 4 M parameters on the embedded corpus: SFT learns little at 0.7 and all at 37; DPO
# little at 0.05 and all at 0.3. Published runs lie above: Zephyr-7B's DPO (5e-7, 478 updates) at
# 0.2, LIMA's SFT (1e-5, 470 updates) at 4.
LITTLE = {"pretrain": 4.0, "sft": 2.0, "dpo": 0.15}
SLOW_STEP = 60.0  # seconds: the first lines of the log would come after ten minutes
LONG_RUN = 72.0  # hours
FAR_FROM_PLAN = 3.0  # times


def summed_rate(args, steps: int) -> float:
    """The sum of the learning rates of all `steps` by the run's own schedule; of very many steps an
    even sample.

    A schedule that follows the loss cannot be known beforehand, and is taken as constant.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    trainer = object.__new__(ScheduledTrainer)  # only what makes the schedule
    trainer.args, trainer.lr_scheduler = copy.copy(args), None
    scheduler = trainer.create_scheduler(steps, optimizer)
    if not hasattr(scheduler, "lr_lambdas"):
        return args.learning_rate * steps
    size = min(steps, SCHEDULE_SAMPLE)
    factors = [scheduler.lr_lambdas[0](number * steps // size) for number in range(size)]
    return args.learning_rate * steps * math.fsum(factors) / size


def movement(
    summed: float, width: int, std: float, rank: int | None = None, scale: float = 1.0
) -> float:
    """How far matrices of `width` can move, as a multiple of their size at random start (both as
    spectral norms).

    Adam moves a weight by the learning rate at most, so a matrix whose weights all move in step by
    `summed` x width. Drawn with the deviation `std` it has the norm 2 x std x sqrt(width). Of an
    adapter of some `rank` only B moves at first, by `summed` x sqrt(width x rank), and is
    multiplied by A, of norm 1 / sqrt(3), and by `scale`.
    """
    reach = summed * width if rank is None else summed * math.sqrt(width * rank / 3) * scale
    return reach / (2 * std * math.sqrt(width))


@check("args", "model", "steps")
def updates(case: Case) -> tuple:
    """Whether the run can move the model's weights far enough to change what it says."""
    if value_of(case.args.optim).split("_")[0] not in ("adamw", "muon"):
        return "ok", f"{case.steps:,} updates; how far they move weights is known for AdamW only"
    summed, config = summed_rate(case.args, case.steps), case.base.config
    moved = movement(summed, config.hidden_size, config.initializer_range, *_adapter(case))
    found = f"{case.steps:,} updates at rate {case.args.learning_rate:g}"
    if moved >= LITTLE[case.stage]:
        return "ok", f"{found} (sum of the rates {summed:.2g})"
    return (
        "warning",
        (
            f"{found} move a model of this size little: sum of the rates {summed:.2g}, at most"
            f" {moved:.2g} of the weights"
        ),
        f"at least {LITTLE[case.stage]:g} of the weights for {case.stage}",
        (
            f"Raise steps x rate {LITTLE[case.stage] / max(moved, 1e-9):.2g} times, or the model"
            " may hardly change."
        ),
    )


def _adapter(case: Case) -> tuple:
    """Rank and scale of the run's adapter; nothing without one."""
    if isinstance(case.model, PeftModel):
        config = case.model.active_peft_config
        return config.r, config.lora_alpha / config.r
    return (case.lora.lora_r, case.lora.lora_alpha / case.lora.lora_r) if case.lora else ()


def rows_of(case: Case) -> Rows:
    """The rows of a case as the planner takes them; of many rows the lengths of an even sample."""
    count = len(case.train)
    columns = case.train.with_format(None)[sample(count, ROWS_SAMPLE)]
    lengths = sequence_lengths(columns, pairs=case.stage == "dpo")
    longest = [max(each) for each in lengths]
    padded = padded_length(longest, case.args.per_device_train_batch_size)
    tokens = round(fmean(map(sum, lengths)) * count)
    return Rows(count, tokens, padded, max(longest), "counted", count <= ROWS_SAMPLE)


def plan_of(case: Case) -> Plan:
    """The plan of the run on this machine, made once."""
    if case.plan is None:
        device = find_device("cpu" if case.args.device.type == "cpu" else None)
        case.plan = make_plan(case.recipe, device, case.world, rows_of(case))
    return case.plan


@check("recipe", "model", "train", quick=False)
def tokens_per_parameter(case: Case) -> tuple:
    plan = plan_of(case)
    parameters = plan.parameters["total"]
    found = (
        f"{plan.tokens:,} tokens for {parameters / 1e6:.3g} M parameters:"
        f" {plan.tokens / parameters:.2g} each"
    )
    if case.stage != "pretrain":
        return "ok", f"{found}; how many are too few is known for pretraining only"
    if plan.tokens >= FEW_TOKENS * parameters:
        return "ok", found
    return (
        "warning",
        found,
        (
            f"about {CHINCHILLA} where a budget is spent best (arXiv 2203.15556), at least"
            f" {FEW_TOKENS:g}"
        ),
        "Give more text, or take a smaller model: this one learns the texts by heart at best.",
    )


@check("recipe", "model", "train", quick=False)
def memory(case: Case) -> tuple:
    plan = plan_of(case)
    needed = max(plan.memory["peak"], plan.evaluation_peak)
    found = f"{gib(needed)} planned, {gib(plan.device.usable)} usable on {plan.device.name}"
    if plan.fits:
        return "ok", found
    return "error", found, "room for the tensors of a step", plan.advice().partition(". ")[2]


@check("recipe", "model", "train", "collator", quick=False)
def run_time(case: Case) -> tuple:
    plan, args = plan_of(case), case.args
    if not plan.fits:
        return "ok", "not measured: the step does not fit into memory"
    passes = args.gradient_accumulation_steps * (plan.flops["model"] / plan.flops["forward"] / 3)
    return judge_time(
        plan.steps, seconds_of_step(case) * passes, plan.seconds_per_step, plan.device.name
    )


def judge_time(steps: int, seconds: float, planned: float, device: str) -> tuple:
    """A finding on a run of `steps`, `seconds` each as measured, `planned` as reckoned from the
    device's peak."""
    hours = steps * seconds / 3600
    found = (
        f"about {duration(hours)} on {device}: {steps:,} steps of {duration(seconds / 3600)}"
        f" measured ({duration(planned / 3600)} planned)"
    )
    if seconds > FAR_FROM_PLAN * max(planned, 1.0):
        fix = (
            "Look for another process, swapping, too few threads (OMP_NUM_THREADS) or a precision"
            " that is emulated."
        )
        return "warning", found, f"not {seconds / planned:.2g} times the plan", fix
    if seconds > SLOW_STEP or hours > LONG_RUN:
        fix = (
            "Take a smaller model, less data or another device: minimind plan RECIPE --device NAME"
            " compares them."
        )
        return (
            "warning",
            found,
            f"steps within {SLOW_STEP:.0f} s, runs within {LONG_RUN:.0f} h",
            fix,
        )
    return "ok", found
