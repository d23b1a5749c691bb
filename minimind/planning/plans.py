"""The plan of a run, as an object, as JSON and as a table."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import datasets
from rich.markup import escape
from rich.table import Table

from minimind.common.errors import UserError
from minimind.common.language import say, translated
from minimind.common.streams import json_text
from minimind.common.terminal import Terminal
from minimind.costs.devices import Device, Price, find_device
from minimind.costs.step import (
    CHINCHILLA,
    Step,
    empty_model,
    evaluation_memory,
    flops,
    memory,
    model_states,
    parameter_counts,
)
from minimind.costs.units import amount, duration, gib, millions
from minimind.planning.counting import RowCounts
from minimind.planning.planned_runs import PlannedRun, deepspeed_of, read_recipes

BATCH_LIMIT = 2**16
ZERO = {f"ZeRO-{stage}": {"zero_stage": stage} for stage in range(4)}
ZERO["ZeRO-2, offloading"] = {"zero_stage": 2, "offload_optimizer": True}
ZERO["ZeRO-3, offloading"] = {
    "zero_stage": 3,
    "offload_optimizer": True,
    "offload_parameters": True,
}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference model",
    "buckets": "communication",
    "activations": "activations",
    "casts": "half-precision copies",
    "logits": "logits and loss",
    "temporary": "temporary",
}


@dataclass(frozen=True)
class Plan:
    """What one run will take. Memory in bytes per device; `seconds` for all steps, without
    evaluation and start-up."""

    recipe: str
    stage: str
    output_dir: str
    device: Device
    step: Step
    parameters: dict[str, int]
    rows: RowCounts
    rows_per_step: int
    steps: int
    tokens: int
    flops_per_token: float
    flops: dict[str, float]
    memory: dict[str, float]
    states: dict[str, float]
    evaluation_peak: float
    peak_under: dict[str, float]
    peak_without_checkpointing: float
    peak_with_checkpointing: float
    largest_batch: int
    notes: list[str]
    measured: dict[str, float] | None = None

    @property
    def utilisation(self) -> float:
        """The MFU that the time is reckoned with: measured, or the device's assumed one."""
        if self.measured:
            per_step = self.flops["model"] / self.steps / self.step.processes
            return (
                per_step / self.measured["seconds_per_step"] / self.device.peak(self.step.precision)
            )
        return self.device.utilisation

    @property
    def seconds_per_step(self) -> float:
        """Of one optimizer step."""
        if self.measured:
            return self.measured["seconds_per_step"]
        rate = self.device.peak(self.step.precision) * self.device.utilisation * self.step.processes
        return self.flops["hardware"] / self.steps / rate

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.seconds_per_step * self.steps / 3600

    @property
    def fits(self) -> bool:
        """Whether the run's memory is there."""
        return max(self.memory["peak"], self.evaluation_peak) <= self.device.usable

    def as_json(self, price: Price | None) -> dict:
        """The plan as one JSON object."""
        device_hours = self.hours * self.step.processes
        return {
            "recipe": self.recipe,
            "stage": self.stage,
            "output_dir": self.output_dir,
            "precision": self.step.precision,
            "parameters": self.parameters,
            "rows": self.rows.rows,
            "rows_per_step": self.rows_per_step,
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_counted": self.rows.how,
            "tokens_exact": self.rows.exact,
            "tokens_per_parameter": self.tokens / self.parameters["total"],
            "compute_optimal_tokens_per_parameter": CHINCHILLA,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops["model"],
            "hardware_flops": self.flops["hardware"],
            "utilisation": self.utilisation,
            "seconds_per_step": self.seconds_per_step,
            "tokens_per_second": self.tokens / (self.hours * 3600),
            "hours": self.hours,
            "cost": price and price.amount * device_hours,
            "memory": {key: round(value) for key, value in self.memory.items()},
            "states": {key: round(value) for key, value in self.states.items()},
            "peak_under": {name: round(value) for name, value in self.peak_under.items()},
            "evaluation_peak": round(self.evaluation_peak),
            "process": round(self.device.account(self.memory["peak"])),
            "peak_with_checkpointing": round(self.peak_with_checkpointing),
            "peak_without_checkpointing": round(self.peak_without_checkpointing),
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "measured": self.measured,
            "notes": self.notes,
        }


def run(
    paths: Sequence[str],
    overrides: Sequence[str],
    device: str | None = None,
    processes: int = 1,
    price: Price | None = None,
    stage: str | None = None,
    tokens: float | None = None,
    as_json: bool = False,
) -> None:
    """`minimind plan`: plan some recipes on a device and print the plans, as tables or as one JSON
    object.

    Raises:
        UserError: an unknown device, or what `read_recipes` and `make_plan` refuse.
    """
    from minimind.planning.measuring import measure
    from minimind.training.step_meter import MEASURED_STEPS

    datasets.disable_progress_bars()
    plans = []
    with redirect_stdout(sys.stderr):  # where data are prepared on the way, that is told
        target = find_device(device)
        read = read_recipes(paths, overrides, stage, tokens)
        for recipe in read:
            plan = make_plan(recipe, target, processes)
            if device == "measured":
                if not plan.fits:
                    raise UserError(
                        f"--device measured: the steps cannot be run here. {advice(plan)}"
                    )
                guess = duration(MEASURED_STEPS * plan.seconds_per_step / 3600)
                say(f"{recipe.path}: {MEASURED_STEPS} real steps, about {guess}")
                plan = replace(plan, measured=measure(recipe))
            plans.append(plan)
    if as_json:
        print(json_text(plans_as_json(plans, price)))
    else:
        show(plans, price, Terminal(soft_wrap=True))


def precision_of(options, device: Device) -> str:
    """What a run computes in on a device: the recipe's word, else bf16 where the device has it;
    raises UserError."""
    if options.fp16:
        return "fp16"
    if options.bf16 and not device.bf16:
        raise UserError(
            f"bf16 is set, and {device.name} cannot compute in it. Give --bf16 false --fp16 true."
        )
    native = device.bf16 if device.kind == "cuda" else device.peak_half > device.peak_fp32
    return "bf16" if (options.bf16 if options.bf16 is not None else native) else "fp32"


def optimizer_of(options) -> str:
    """The optimizer's name; all others of the library are reckoned as AdamW."""
    return "muon" if options.optim == "muon" else "adamw"


def make_plan(
    recipe: PlannedRun, device: Device, processes: int = 1, rows: RowCounts | None = None
) -> Plan:
    """The plan of a recipe on some devices of one kind; its rows are counted unless they are given.

    Raises:
        UserError: the recipe, its model or its data are wrong, see `recipes`.
    """
    options = recipe.options
    config, tokenizer, notes = recipe.starting_point()
    model = empty_model(config, recipe.adapter)
    rows = rows or recipe.rows(tokenizer)
    if options.optim != "muon" and not options.optim.startswith("adamw_torch"):
        notes.append(f"{recipe.path}: optim {options.optim} is reckoned as AdamW in fp32")
    zero_stage, offload_optimizer, offload_parameters = deepspeed_of(options)
    copy = recipe.spec.pairs and not options.precompute_ref_log_probs
    precision = precision_of(options, device)
    if precision == "fp32" and not device.bf16:
        notes.append(f"{device.name} has no bf16, so a run there takes fp32; --fp16 true is faster")
    checkpointing = options.activation_checkpointing or options.gradient_checkpointing
    step = Step(
        batch_size=options.per_device_train_batch_size,
        length=rows.longest,
        precision=precision,
        device=device.kind,
        accumulation=options.gradient_accumulation_steps,
        processes=processes,
        optimizer=optimizer_of(options),
        checkpointing=bool(checkpointing),
        attention=options.attn_implementation or "sdpa",
        masked=not recipe.spec.reads_documents or options.document_mask,
        pairs=recipe.spec.pairs,
        reference=("adapter" if recipe.adapter else "copy") if copy else None,
        weighted=bool(recipe.chat_args and recipe.chat_args.needs_weights),
        zero_stage=zero_stage,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
    )
    steps, consumed = steps_of(options, rows, processes)
    return assemble(recipe, device.running(step), model, step, rows, steps, consumed, notes)


def steps_of(options, rows: RowCounts, processes: int) -> tuple[int, float]:
    """Optimizer steps, and how often they go through the rows: as the Trainer counts, partial
    batches included."""
    batches = ceil(rows.rows / (options.per_device_train_batch_size * processes))
    if options.dataloader_drop_last:
        batches = rows.rows // (options.per_device_train_batch_size * processes)
    per_epoch = ceil(batches / options.gradient_accumulation_steps)
    if options.max_steps > 0:
        return options.max_steps, options.max_steps / per_epoch
    return ceil(options.num_train_epochs * per_epoch), options.num_train_epochs


def assemble(
    recipe: PlannedRun,
    device: Device,
    model,
    step: Step,
    rows: RowCounts,
    steps: int,
    epochs: float,
    notes: list[str],
) -> Plan:
    """Costs of the step, times how often it is made."""
    mean = replace(step, batch_size=1, length=max(2, round(rows.padded)))
    per_row = flops(model, mean)
    passes = rows.rows * epochs
    return Plan(
        recipe=str(recipe.path),
        stage=recipe.spec.name,
        output_dir=recipe.options.output_dir,
        device=device,
        step=step,
        parameters=parameter_counts(model),
        rows=rows,
        rows_per_step=step.batch_size * step.accumulation * step.processes,
        steps=steps,
        tokens=round(rows.tokens * epochs),
        flops_per_token=per_row["model"] / mean.tokens,
        flops={name: value * passes for name, value in per_row.items()},
        memory=memory(model, step),
        states=model_states(model, step),
        evaluation_peak=evaluation_memory(model, step, recipe.options.per_device_eval_batch_size),
        peak_under={
            name: memory(
                model,
                replace(
                    step, **{"offload_optimizer": False, "offload_parameters": False} | options
                ),
            )["peak"]
            for name, options in ZERO.items()
        },
        peak_without_checkpointing=memory(model, replace(step, checkpointing=False))["peak"],
        peak_with_checkpointing=memory(model, replace(step, checkpointing=True))["peak"],
        largest_batch=largest_batch(model, step, device.usable),
        notes=notes,
    )


def largest_batch(model, step: Step, usable: float) -> int:
    """The largest batch per device whose peak is within `usable` bytes; 0 if not even one row
    is."""

    def fits(batch_size: int) -> bool:
        return memory(model, replace(step, batch_size=batch_size))["peak"] <= usable

    low, high = 0, 1
    while high <= BATCH_LIMIT and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plans_as_json(plans: Sequence[Plan], price: Price | None) -> dict:
    """All plans and their sum as one JSON object."""
    device, processes = plans[0].device, plans[0].step.processes
    hours = sum(plan.hours for plan in plans)
    return {
        "device": {
            "name": device.name,
            "memory": round(device.memory),
            "usable_memory": round(device.usable),
            "peak_flops": device.peak(plans[0].step.precision),
            "assumed_utilisation": device.utilisation,
            "source": device.source,
        },
        "processes": processes,
        "price": (
            price and {"amount": price.amount, "currency": price.currency, "per": "device hour"}
        ),
        "stages": [plan.as_json(price) for plan in plans],
        "total": {"hours": hours, "cost": price and price.amount * hours * processes},
    }


def show(plans: Sequence[Plan], price: Price | None, console: Terminal) -> None:
    """Print the plans side by side, what they rest on, and what does not fit."""
    processes = plans[0].step.processes
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(
            f"{plan.stage}\n{escape(Path(plan.recipe).stem)}", justify="right", overflow="fold"
        )

    def row(label: str, value, style: str | None = None) -> None:
        table.add_row(translated(label), *(str(value(plan)) for plan in plans), style=style)

    row("parameters", lambda p: millions(p.parameters["total"]))
    if any(p.parameters["active"] != p.parameters["total"] for p in plans):
        row("  active for a token", lambda p: millions(p.parameters["active"]))
    row("  embedding", lambda p: millions(p.parameters["embedding"]))
    if any(p.parameters["trained"] != p.parameters["total"] for p in plans):
        row("  trained", lambda p: millions(p.parameters["trained"]))
    row("rows an epoch", lambda p: f"{p.rows.rows:,}")
    row("rows a step", lambda p: f"{p.rows_per_step:,}")
    row("steps", lambda p: f"{p.steps:,}")
    row("tokens", lambda p: ("" if p.rows.exact else "~") + amount(p.tokens))
    row("  for each parameter", lambda p: f"{p.tokens / p.parameters['total']:.2g}")
    row("FLOPs a token", lambda p: amount(p.flops_per_token))
    row("FLOPs", lambda p: f"{p.flops['model']:.2e}")
    table.add_section()
    row("memory of tensors at peak", lambda p: gib(p.memory["peak"]), "bold")
    for key, label in PARTS.items():
        if any(p.memory[key] for p in plans):
            row(
                f"  {translated(label)}",
                lambda p, key=key: gib(p.memory[key]) if p.memory[key] else "-",
            )
    for key, label in PARTS.items():
        if any(held(p, key) for p in plans):
            row(
                f"  {label}, at another moment",
                lambda p, key=key: gib(held(p, key)) if held(p, key) else "-",
            )
    if any(p.evaluation_peak > p.memory["peak"] for p in plans):
        row("in evaluation", lambda p: gib(p.evaluation_peak))
    if any(p.memory["host"] for p in plans):
        row("  on the host", lambda p: gib(p.memory["host"]))
    if all(p.step.checkpointing for p in plans):
        row("without checkpointing", lambda p: gib(p.peak_without_checkpointing))
    else:
        row("with checkpointing", lambda p: gib(p.peak_with_checkpointing))
    if processes > 1 or any(p.step.zero_stage is not None for p in plans):
        for name in ZERO:
            row(f"under {name}", lambda p, name=name: gib(p.peak_under[name]))
    if any(p.measured and p.measured.get("peak_memory") for p in plans):
        if plans[0].device.kind == "cpu":
            row("in the process", lambda p: gib(p.device.account(p.memory["peak"])))
        row("  measured", lambda p: gib(p.measured["peak_memory"]) if p.measured else "-")
    row("largest batch that fits", lambda p: f"{p.largest_batch:,}")
    table.add_section()
    row("tokens/s", lambda p: f"{p.tokens / (p.hours * 3600):,.0f}")
    row("time", lambda p: duration(p.hours), "bold")
    if price:
        row("cost", lambda p: price.shown(p.hours * processes), "bold")
    console.print(table)
    hours = sum(plan.hours for plan in plans)
    if len(plans) > 1:
        cost = f", {price.shown(hours * processes)}" if price else ""
        console.print(translated(f"[bold]in all {duration(hours)}{cost}[/]"))
    for line in reckoned_with(plans, price):
        console.print(translated(line), style="dim", markup=False)
    for plan in plans:
        if not plan.fits:
            console.print(translated(advice(plan)), style="red", markup=False)


def held(plan: Plan, key: str) -> float:
    """Bytes of a part that is not there at the peak but before or after it; 0 where there is
    none."""
    return 0 if plan.memory[key] else plan.states.get(key, 0)


def reckoned_with(plans: Sequence[Plan], price: Price | None) -> list[str]:
    """What the figures rest on, a line each."""
    device, step = plans[0].device, plans[0].step
    cards = f"{step.processes} x {device.name}" if step.processes > 1 else device.name
    peak = (
        f"{device.peak(step.precision) / 1e12:,.3g} TFLOP/s in {step.precision} ({device.source})"
    )
    measured = [plan for plan in plans if plan.measured]
    if measured:
        used = ", ".join(f"{plan.stage} {plan.utilisation:.0%}" for plan in measured)
        how = f"utilisation measured over {measured[0].measured['steps']} steps: {used}"
    else:
        how = (
            f"utilisation {device.utilisation:.0%} ASSUMED; --device measured runs real steps here"
        )
    lines = [
        f"{cards}: {peak}, {how}",
        (
            f"tensors can take {gib(device.usable)} of {gib(device.memory)}: {gib(device.reserved)}"
            f" are left to libraries and {device.gaps:.0%} more than tensors take to the"
            " allocator's gaps"
        ),
        "time is that of the training steps, without evaluation, saving and start-up",
        (
            f"{CHINCHILLA} tokens for each parameter make the best of a budget of FLOPs (Hoffmann"
            " et al., 2022); small models are usually given more"
        ),
    ]
    if step.processes > 1:
        lines.append("the time that the processes take to talk to each other is not counted")
    if step.zero_stage is not None:
        lines.append(
            f"DeepSpeed ZeRO-{step.zero_stage}, states divided among {step.processes} processes"
        )
    if any(not plan.rows.exact for plan in plans):
        lines += [f"{plan.recipe}: tokens {plan.rows.how}" for plan in plans if not plan.rows.exact]
    return lines + list(dict.fromkeys(note for plan in plans for note in plan.notes))


def advice(plan: Plan) -> str:
    """What to change where a run does not fit."""
    asked, step = plan.memory["peak"], plan.step
    if asked <= plan.device.usable:
        usable = f"{gib(plan.evaluation_peak)} of {gib(plan.device.usable)} on {plan.device.name}"
        return f"{plan.recipe}: evaluation needs {usable}. Lower --per_device_eval_batch_size."
    said = f"{plan.recipe}: needs {gib(asked)} of {gib(plan.device.usable)} on {plan.device.name}."
    if plan.largest_batch:
        parts = next(
            n
            for n in range(2, step.batch_size + 1)
            if -(-step.batch_size // n) <= plan.largest_batch
        )
        size = -(-step.batch_size // parts)
        said += (
            f" Try --per_device_train_batch_size {size} --gradient_accumulation_steps"
            f" {parts * step.accumulation}"
        )
    if not step.checkpointing and plan.peak_with_checkpointing <= plan.device.usable:
        said += f"{' or' if plan.largest_batch else ' Try'} --activation_checkpointing true"
    elif not plan.largest_batch:
        said += " Take a smaller model, more processes under ZeRO, or a larger device"
    return said + "."
