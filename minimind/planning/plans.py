"""`minimind plan`: several recipes on one device, as tables or as JSON."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace

import datasets

from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.common.streams import json_text
from minimind.common.terminal import Terminal
from minimind.costs.prices import Price
from minimind.costs.this_machine import find_device
from minimind.costs.units import duration
from minimind.planning.computing import make_plan
from minimind.planning.measuring import measure
from minimind.planning.plan import Plan
from minimind.planning.planned_runs import read_recipes
from minimind.planning.table import show
from minimind.training.step_meter import MEASURED_STEPS


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
    """Plan some recipes on a device and print the plans, as tables or as one JSON object.

    Raises:
        UserError: an unknown device, or what `read_recipes` and `make_plan` refuse.
    """
    datasets.disable_progress_bars()
    plans = []
    with redirect_stdout(sys.stderr):  # reports of data prepared on the way
        target = find_device(device)
        for recipe in read_recipes(paths, overrides, stage, tokens):
            plan = make_plan(recipe, target, processes)
            if device == "measured":
                if not plan.fits:
                    raise UserError(
                        f"--device measured: the steps cannot be run here. {plan.advice()}"
                    )
                guess = duration(MEASURED_STEPS * plan.seconds_per_step / 3600)
                say(f"{recipe.path}: {MEASURED_STEPS} real steps, about {guess}")
                plan = replace(plan, measured=measure(recipe)).within_budget()
            plans.append(plan)
    if as_json:
        print(json_text(plans_as_json(plans, price)))
    else:
        show(plans, price, Terminal(soft_wrap=True))


def plans_as_json(plans: Sequence[Plan], price: Price | None) -> dict:
    """All plans and their sum as one JSON object."""
    device, step = plans[0].device, plans[0].step
    hours = sum(plan.hours for plan in plans)
    rate = price and {"amount": price.amount, "currency": price.currency, "per": "device hour"}
    return {
        "device": {
            "name": device.name,
            "memory": round(device.memory),
            "usable_memory": round(device.usable),
            "peak_flops": device.peak(step.precision),
            "assumed_utilisation": device.utilisation,
            "source": device.source,
        },
        "processes": step.processes,
        "price": rate,
        "stages": [plan.as_json(price) for plan in plans],
        "total": {"hours": hours, "cost": price and price.amount * hours * step.processes},
    }
