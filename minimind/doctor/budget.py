"""Checks of what a run spends: tokens and memory, by its plan."""

from statistics import fmean

from minimind.costs.this_machine import find_device
from minimind.costs.units import gib
from minimind.data.row_lengths import row_lengths
from minimind.doctor.registry import Case, check, sample
from minimind.planning.computing import make_plan
from minimind.planning.counting import RowCounts, chat_counts
from minimind.planning.plan import CHINCHILLA, Plan

ROWS_SAMPLE = 2000  # rows whose lengths are counted
FEW_TOKENS = CHINCHILLA / 20  # per parameter: a twentieth of what is best


def plan_of(case: Case) -> Plan:
    """The plan of the run on this machine, made once."""
    if case.plan is None:
        device = find_device("cpu" if case.args.device.type == "cpu" else None)
        case.plan = make_plan(case.recipe, device, case.world, rows_of(case))
    return case.plan


def rows_of(case: Case) -> RowCounts:
    """The rows of a case as the planner takes them; of many rows the lengths of an even sample."""
    count = len(case.train)
    columns = case.train.with_format(None)[sample(count, ROWS_SAMPLE)]
    lengths = row_lengths(columns, case.spec.pairs, case.spec.shared_prompts)
    tokens = fmean(row.tokens for row in lengths) * count
    exact = count <= ROWS_SAMPLE
    scale = count / len(lengths)
    return chat_counts(case.spec, lengths, scale, tokens, "counted", exact, case.args)


@check("recipe", "model", "train", quick=False)
def tokens_per_parameter(case: Case) -> tuple:
    plan = plan_of(case)
    parameters = plan.parameters["total"]
    ratio = plan.tokens / parameters
    found = f"{plan.tokens:,} tokens for {parameters / 1e6:.3g} M parameters: {ratio:.2g} each"
    if not case.spec.reads_documents:
        return "ok", f"{found}; how many are too few is known for pretraining only"
    if ratio >= FEW_TOKENS:
        return "ok", found
    expected = (
        f"about {CHINCHILLA} where a budget is spent best (arXiv 2203.15556), at least"
        f" {FEW_TOKENS:g}"
    )
    fix = "Give more text, or take a smaller model: this one learns the texts by heart at best."
    return "warning", found, expected, fix


@check("recipe", "model", "train", quick=False)
def memory(case: Case) -> tuple:
    plan = plan_of(case)
    needed = max(plan.memory["peak"], plan.evaluation_peak)
    found = f"{gib(needed)} planned, {gib(plan.device.usable)} usable on {plan.device.name}"
    if plan.fits:
        return "ok", found
    return "error", found, "room for the tensors of a step", plan.advice().partition(". ")[2]
