"""Checks of the learning rate, its warm-up, and how far it can move the weights."""

import copy
import math

import torch
from peft import PeftModel

from minimind.doctor.registry import Case, check, value_of
from minimind.training.trainers import ScheduledTrainer

FAR = 10.0  # times from the middle
SCHEDULE_SAMPLE = 1000  # steps whose rates are summed
# Measured at 4 M parameters on the embedded corpus: SFT learns little at 0.7 and all at 37; DPO
# little at 0.05 and all at 0.3. Published runs are above: Zephyr-7B's DPO (5e-7, 478 updates) at
# 0.2, LIMA's SFT (1e-5, 470 updates) at 4.
LITTLE = {"pretrain": 4.0, "sft": 2.0, "dpo": 0.15}
# Parts of the middle rate, see `usual_learning_rates`.
USUAL = {"pretrain": (1 / FAR, FAR), "sft": (1 / 300, 3), "dpo": (1 / 2000, 1 / 20)}
USUAL["reward"] = (1 / 100, 1)
USUAL["kto"] = USUAL["dpo"]  # KTO: 5e-7 to 5e-6 at 7B (Ethayarajh et al., 2024, appendix C)


def usual_learning_rates(stage: str, parameters: int, lora: bool) -> tuple[float, float]:
    """The range of usual AdamW learning rates for so many parameters, embeddings left out.

    The middle for pretraining is Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, eq. D.1):
    0.003239 - 0.0001395 ln(N), not below 1e-4, where GPT-3's largest sizes are (Brown et al. 2020,
    table 2.1); 10 times around it. Others are parts of that: full SFT from a 300th (Tulu 3: 5e-6 at
    8B) to 3 times it; LoRA 10 times full SFT (Schulman et al. 2025, "LoRA Without Regret"; Biderman
    et al. 2024, https://arxiv.org/abs/2405.09673); DPO from a 2,000th (Tulu 3: 5e-7 at 8B) to a
    20th, and with LoRA 10 times that; reward models from a 100th (Tulu 3: 3e-6 at 8B; InstructGPT:
    9e-6 at 6B) to the middle (TRL's default).
    """
    middle = max(0.003239 - 0.0001395 * math.log(max(parameters, 2)), 1e-4)
    low, high = USUAL[stage]
    factor = 10 if lora else 1
    return middle * low * factor, middle * high * factor


def is_adamw_like(case: Case) -> bool:
    """Whether the optimizer is AdamW, or Muon, which takes AdamW's rates."""
    return value_of(case.args.optim).split("_")[0] in ("adamw", "muon")


@check("args", "model")
def learning_rate(case: Case) -> tuple:
    rate, stage = case.args.learning_rate, case.stage
    if not is_adamw_like(case):
        return "ok", f"{rate:g}; usual rates are known for AdamW only"
    if stage not in USUAL:
        return "ok", f"{rate:g}; no usual rates are known for {stage}"
    if kind := _other_adapter(case):
        return "ok", f"{rate:g}; docs/adapters.md has rates for {kind}"
    embeddings = case.base.get_input_embeddings().weight.numel()
    parameters = sum(p.numel() for p in case.base.parameters()) - embeddings
    lora = case.lora is not None or isinstance(case.model, PeftModel)
    low, high = usual_learning_rates(stage, parameters, lora)
    size = f"{parameters / 1e6:.3g} M parameters without embeddings" + (", LoRA" if lora else "")
    if low <= rate <= high:
        return "ok", f"{rate:g}, usual for {stage} at {size}"
    found = f"{rate:g}, {'above' if rate > high else 'below'} what is usual"
    fix = "Check for a mistyped digit; otherwise try it on a few hundred steps first."
    return "warning", found, f"{low:.1e} to {high:.1e} for {stage} at {size}", fix


@check("args", "steps")
def warmup(case: Case) -> tuple:
    steps, warm = case.steps, case.args.get_warmup_steps(case.steps)
    if warm >= steps and warm > 1:
        fix = (
            "Give warmup_steps as a share, such as 0.05; the learning rate would never reach its"
            " peak."
        )
        return "error", f"{warm:,} warm-up steps", f"fewer than the {steps:,} steps of the run", fix
    if warm > 0.5 * steps and steps > 10:
        found = f"{warm:,} of {steps:,} steps warm up"
        return "warning", found, "5 % or so", "Give warmup_steps as a share."
    return "ok", f"{warm:,} of {steps:,} steps"


@check("args", "model", "steps")
def updates(case: Case) -> tuple:
    """Whether the run can move the model's weights far enough to change what it writes."""
    if not is_adamw_like(case):
        return "ok", f"{case.steps:,} updates; how far they move weights is known for AdamW only"
    if case.stage not in LITTLE or _other_adapter(case):
        return "ok", f"{case.steps:,} updates; how far they have to move weights is not known"
    config, least = case.base.config, LITTLE[case.stage]
    total = summed_rate(case.args, case.steps)
    moved = movement(total, config.hidden_size, config.initializer_range, *_rank_and_scale(case))
    found = f"{case.steps:,} updates at rate {case.args.learning_rate:g}"
    if moved >= least:
        return "ok", f"{found} (sum of the rates {total:.2g})"
    found = (
        f"{found} move a model of this size little: sum of the rates {total:.2g}, at most"
        f" {moved:.2g} of the weights"
    )
    times = f"{least / max(moved, 1e-9):.2g}"
    fix = f"Raise steps x rate {times} times, or the model may hardly change."
    return "warning", found, f"at least {least:g} of the weights for {case.stage}", fix


def summed_rate(args, steps: int) -> float:
    """The sum of the learning rates of all `steps` by the run's own schedule; of very many steps an
    even sample.

    A schedule that follows the loss is unknown before the run, and is counted as constant.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    trainer = object.__new__(ScheduledTrainer)  # only what creates the schedule
    trainer.args, trainer.lr_scheduler = copy.copy(args), None
    scheduler = trainer.create_scheduler(steps, optimizer)
    if not hasattr(scheduler, "lr_lambdas"):
        return args.learning_rate * steps
    size = min(steps, SCHEDULE_SAMPLE)
    factors = [scheduler.lr_lambdas[0](number * steps // size) for number in range(size)]
    return args.learning_rate * steps * math.fsum(factors) / size


def movement(
    rates: float, width: int, std: float, rank: int | None = None, scale: float = 1.0
) -> float:
    """How far matrices of `width` can move, as a multiple of their size at random start (both as
    spectral norms).

    Adam moves a weight by the learning rate at most, so a matrix whose weights all move in step by
    the sum of the rates x width. Drawn with the deviation `std` it has the norm 2 x std x
    sqrt(width). Of an adapter of some `rank` only B moves at first, by the sum of the rates x
    sqrt(width x rank), and is multiplied by A, of norm 1 / sqrt(3), and by `scale`.
    """
    reach = rates * width if rank is None else rates * math.sqrt(width * rank / 3) * scale
    return reach / (2 * std * math.sqrt(width))


def _other_adapter(case: Case) -> str | None:
    """The kind of the run's adapter, unless it is LoRA or there is none."""
    kind = getattr(case.lora, "peft_type", "lora")
    if isinstance(case.model, PeftModel):
        kind = case.model.active_peft_config.peft_type.value.lower()
    return kind if kind != "lora" else None


def _rank_and_scale(case: Case) -> tuple:
    """Rank and scale of the run's adapter; empty without one."""
    if isinstance(case.model, PeftModel):
        config = case.model.active_peft_config
        return config.r, config.lora_alpha / config.r
    return (case.lora.lora_r, case.lora.lora_alpha / case.lora.lora_r) if case.lora else ()
