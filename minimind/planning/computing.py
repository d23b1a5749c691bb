"""A planned run and a device -> its plan: the costs of one step, and how many steps there are."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from minimind.common.bounds import seconds_of
from minimind.common.errors import UserError
from minimind.costs.devices import Device
from minimind.costs.flops import flops
from minimind.costs.memory import evaluation_memory, memory, model_states
from minimind.costs.parameters import empty_model, parameter_counts
from minimind.costs.step import Step, reference_kind
from minimind.costs.units import duration
from minimind.planning.counting import RowCounts
from minimind.planning.plan import Plan
from minimind.planning.planned_runs import PlannedRun, deepspeed_of
from minimind.training.adapters import fit_virtual_tokens
from minimind.training.optimizers import muon_refusal
from minimind.training.preference_losses import needs_reference

BATCH_LIMIT = 2**16
ZERO = {f"ZeRO-{stage}": {"zero_stage": stage} for stage in range(4)}
ZERO["ZeRO-2, offloading"] = {"zero_stage": 2, "offload_optimizer": True}
ZERO["ZeRO-3, offloading"] = {
    "zero_stage": 3,
    "offload_optimizer": True,
    "offload_parameters": True,
}

# Places of the reference model, see Step
REFERENCES = {
    "reference precomputed": None,
    "reference in memory": "copy",
    "reference on the CPU": "host",
}


def precision_of(options, device: Device) -> str:
    """The precision that a run computes in on a device: the recipe's, else bf16 where the device
    has it; raises UserError."""
    if options.fp16:
        return "fp16"
    if options.bf16 and not device.bf16:
        raise UserError(
            f"bf16 is set, and {device.name} cannot compute in it. Give --bf16 false --fp16 true."
        )
    native = device.bf16 if device.kind == "cuda" else device.peak_half > device.peak_fp32
    return "bf16" if (options.bf16 if options.bf16 is not None else native) else "fp32"


def make_plan(
    recipe: PlannedRun, device: Device, processes: int = 1, rows: RowCounts | None = None
) -> Plan:
    """The plan of a recipe on some devices of one kind; its rows are counted if not given.

    Raises:
        UserError: the recipe, its model or its data are wrong, see `planned_runs`.
    """
    options = recipe.options
    config, tokenizer, notes = recipe.starting_point()
    model = empty_model(config, recipe.adapter)
    if notice := fit_virtual_tokens(options, options, recipe.spec.lengths(options), config):
        notes.append(notice)
    rows = rows or recipe.rows(tokenizer)
    precision = precision_of(options, device)
    if options.optim != "muon" and not options.optim.startswith("adamw_torch"):
        notes.append(f"{recipe.path}: optim {options.optim} is estimated as AdamW in fp32")
    if precision == "fp32" and not device.bf16:
        notes.append(f"{device.name} has no bf16, so a run there takes fp32; --fp16 true is faster")

    zero_stage, offload_optimizer, offload_parameters = deepspeed_of(options)
    muon = options.optim == "muon"
    offloads = offload_optimizer or offload_parameters
    if muon and zero_stage is not None and (refusal := muon_refusal(zero_stage, offloads)):
        raise UserError(f"{recipe.path}: {refusal}")
    step = Step(
        batch_size=options.per_device_train_batch_size,
        length=rows.longest,
        precision=precision,
        device=device.kind,
        accumulation=options.gradient_accumulation_steps,
        processes=processes,
        optimizer="muon" if muon else "adamw",
        checkpointing=bool(options.activation_checkpointing or options.gradient_checkpointing),
        attention=options.attn_implementation or "sdpa",
        masked=not recipe.spec.reads_documents or options.document_mask,
        pairs=recipe.spec.pairs,
        shared_prompts=recipe.spec.shared_prompts,
        predicting=rows.predicting,
        counted=rows.counted,
        unpaired=recipe.spec.family == "kto" and options.loss_type == "kto",
        reference=reference_kind(options, recipe.adapter is not None, device.kind),
        weighted=getattr(recipe.chat_args, "needs_weights", False),
        zero_stage=zero_stage,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
    )
    device = device.with_gaps(step.checkpointing)
    steps, epochs = steps_of(options, rows, processes)
    budget = options.time_budget and seconds_of("--time_budget", options.time_budget)
    if budget:
        notes.append(f"{recipe.path}: as many steps as {duration(budget / 3600)} have room for")

    def peak(**changes) -> float:
        return memory(model, replace(step, **changes))["peak"]

    row = replace(step, batch_size=1, length=max(2, round(rows.padded)))
    row_flops, passes = flops(model, row), rows.rows * epochs
    no_offloading = {"offload_optimizer": False, "offload_parameters": False}
    plan = Plan(
        recipe=str(recipe.path),
        stage=recipe.spec.name,
        output_dir=options.output_dir,
        device=device,
        step=step,
        parameters=parameter_counts(model),
        rows=rows,
        rows_per_step=step.batch_size * step.accumulation * step.processes,
        steps=steps,
        tokens=round(rows.tokens * epochs),
        flops_per_token=row_flops["model"] / (row.tokens * row.counted),
        flops={name: value * passes for name, value in row_flops.items()},
        memory=memory(model, step),
        states=model_states(model, step),
        evaluation_peak=evaluation_memory(model, step, options.per_device_eval_batch_size),
        peak_under={
            name: peak(**no_offloading | zero)
            for name, zero in ZERO.items()
            if not (muon and muon_refusal(zero["zero_stage"], "offload_optimizer" in zero))
        },
        peak_with_reference=with_references(recipe, peak),
        peak_without_checkpointing=peak(checkpointing=False),
        peak_with_checkpointing=peak(checkpointing=True),
        largest_batch=largest_batch(model, step, device.usable),
        notes=notes,
        time_budget=budget,
    )
    return plan.within_budget()


def with_references(recipe: PlannedRun, peak: Callable[..., float]) -> dict[str, float]:
    """The peak for each place of the reference model, where a run may choose one."""
    losses = getattr(recipe.options, "loss_type", ())
    if not recipe.spec.shared_prompts or recipe.adapter or not needs_reference(losses):
        return {}
    return {name: peak(reference=kind) for name, kind in REFERENCES.items()}


def steps_of(options, rows: RowCounts, processes: int) -> tuple[int, float]:
    """Optimizer steps and epochs, counted as the Trainer does, partial batches included."""
    size = options.per_device_train_batch_size * processes
    batches = rows.rows // size if options.dataloader_drop_last else ceil(rows.rows / size)
    per_epoch = ceil(batches / options.gradient_accumulation_steps)
    if options.max_steps > 0:
        return options.max_steps, options.max_steps / per_epoch
    return ceil(options.num_train_epochs * per_epoch), options.num_train_epochs


def largest_batch(model, step: Step, usable: float) -> int:
    """The largest batch per device whose peak is within `usable` bytes; 0 if not even one row
    fits."""

    def fits(batch_size: int) -> bool:
        return memory(model, replace(step, batch_size=batch_size))["peak"] <= usable

    # Double until it no longer fits, then halve the interval
    low, high = 0, 1
    while high <= BATCH_LIMIT and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
