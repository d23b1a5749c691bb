"""Plans as a table in the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from minimind.common.language import translated
from minimind.common.terminal import Terminal
from minimind.costs.prices import Price
from minimind.costs.units import amount, duration, gib, millions
from minimind.planning.computing import REFERENCES, ZERO
from minimind.planning.plan import CHINCHILLA, Plan

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


def show(plans: Sequence[Plan], price: Price | None, console: Terminal) -> None:
    """Print the plans side by side, what they are based on, and what does not fit."""
    console.print(plan_table(plans, price))
    if len(plans) > 1:
        hours = sum(plan.hours for plan in plans)
        cost = f", {price.shown(hours * plans[0].step.processes)}" if price else ""
        console.print(translated(f"[bold]in all {duration(hours)}{cost}[/]"))
    for line in assumptions(plans):
        console.print(translated(line), style="dim", markup=False)
    for plan in plans:
        if not plan.fits:
            console.print(translated(plan.advice()), style="red", markup=False)


def plan_table(plans: Sequence[Plan], price: Price | None) -> Table:
    """A column for each plan; rows that say nothing about any of them are left out."""
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for plan in plans:
        title = f"{plan.stage}\n{escape(Path(plan.recipe).stem)}"
        table.add_column(title, justify="right", overflow="fold")

    def row(label: str, value: Callable[[Plan], str], style: str | None = None) -> None:
        table.add_row(translated(label), *map(value, plans), style=style)

    def bytes_row(label: str, value: Callable[[Plan], float]) -> None:
        if any(map(value, plans)):
            row(label, lambda plan: gib(value(plan)) if value(plan) else "-")

    # Model, data and arithmetic
    row("parameters", lambda p: millions(p.parameters["total"]))
    if any(p.parameters["active"] != p.parameters["total"] for p in plans):
        row("  active for a token", lambda p: millions(p.parameters["active"]))
    row("  embedding", lambda p: millions(p.parameters["embedding"]))
    if any(p.parameters["trained"] != p.parameters["total"] for p in plans):
        row("  trained", lambda p: millions(p.parameters["trained"]))
    row("rows an epoch", lambda p: f"{p.rows.rows:,}")
    row("rows a step", lambda p: f"{p.rows_per_step:,}")
    row("steps", lambda p: f"{p.steps:,}")
    if any(p.time_budget for p in plans):
        row("passes over the data", lambda p: f"{p.tokens / p.rows.tokens:.2g}")
    row("tokens", lambda p: ("" if p.rows.exact else "~") + amount(p.tokens))
    row("  for each parameter", lambda p: f"{p.tokens / p.parameters['total']:.2g}")
    row("FLOPs a token", lambda p: amount(p.flops_per_token))
    row("FLOPs", lambda p: f"{p.flops['model']:.2e}")

    # Memory
    table.add_section()
    row("memory of tensors at peak", lambda p: gib(p.memory["peak"]), "bold")
    for part, label in PARTS.items():
        bytes_row(f"  {translated(label)}", lambda p, part=part: p.memory[part])
    for part, label in PARTS.items():
        bytes_row(f"  {label}, at another moment", lambda p, part=part: p.held_elsewhen(part))
    if any(p.evaluation_peak > p.memory["peak"] for p in plans):
        row("in evaluation", lambda p: gib(p.evaluation_peak))
    if any(p.memory["host"] for p in plans):
        row("  on the host", lambda p: gib(p.memory["host"]))
    if any(p.peak_with_reference for p in plans):
        for name in REFERENCES:
            bytes_row(name, lambda p, name=name: p.peak_with_reference.get(name, 0))
    if all(p.step.checkpointing for p in plans):
        row("without checkpointing", lambda p: gib(p.peak_without_checkpointing))
    else:
        row("with checkpointing", lambda p: gib(p.peak_with_checkpointing))
    if any(p.step.processes > 1 or p.step.zero_stage is not None for p in plans):
        for name in ZERO:
            bytes_row(f"under {name}", lambda p, name=name: p.peak_under.get(name, 0))
    if any(p.measured and p.measured.get("peak_memory") for p in plans):
        if plans[0].device.kind == "cpu":
            row("in the process", lambda p: gib(p.device.account(p.memory["peak"])))
        row("  measured", lambda p: gib(p.measured["peak_memory"]) if p.measured else "-")
    row("largest batch that fits", lambda p: f"{p.largest_batch:,}")

    # Time and cost
    table.add_section()
    row("tokens/s", lambda p: f"{p.tokens / (p.hours * 3600):,.0f}")
    row("time", lambda p: duration(p.hours), "bold")
    if price:
        row("cost", lambda p: price.shown(p.hours * p.step.processes), "bold")
    return table


def assumptions(plans: Sequence[Plan]) -> list[str]:
    """What the figures are based on, a line each."""
    device, step = plans[0].device, plans[0].step
    cards = f"{step.processes} x {device.name}" if step.processes > 1 else device.name
    rate = f"{device.peak(step.precision) / 1e12:,.3g}"
    peak = f"{rate} TFLOP/s in {step.precision} ({device.source})"
    if measured := [plan for plan in plans if plan.measured]:
        shares = ", ".join(f"{plan.stage} {plan.utilisation:.0%}" for plan in measured)
        how = f"utilisation measured over {measured[0].measured['steps']} steps: {shares}"
    else:
        share = f"{device.utilisation:.0%}"
        how = f"utilisation {share} ASSUMED; --device measured runs real steps here"
    lines = [
        f"{cards}: {peak}, {how}",
        f"tensors can take {gib(device.usable)} of {gib(device.memory)}: {gib(device.reserved)}"
        f" are left to libraries and {device.gaps:.0%} more than tensors take to the allocator's"
        " gaps",
        "time is that of the training steps, without evaluation, saving and start-up",
        f"{CHINCHILLA} tokens for each parameter make the best of a budget of FLOPs (Hoffmann et"
        " al., 2022); small models are usually given more",
    ]
    if step.processes > 1:
        lines.append("the time that the processes take to talk to each other is not counted")
    if step.zero_stage is not None:
        zero, count = step.zero_stage, step.processes
        lines.append(f"DeepSpeed ZeRO-{zero}, states divided among {count} processes")
    lines += [f"{plan.recipe}: tokens {plan.rows.how}" for plan in plans if not plan.rows.exact]
    return lines + list(dict.fromkeys(note for plan in plans for note in plan.notes))
