"""Differences between the cards of models: which is better, and where that may be chance."""

from collections import Counter
from collections.abc import Sequence

from minimind.common.language import translated
from minimind.evaluation.statistics import VERDICTS, better, difference, holm
from minimind.score_card.report import SHOWN, Table, is_share
from minimind.score_card.tasks import CONTROLS, Card, TaskResult

COLUMNS = ("against A", "measure", "n", "A", "B", "B - A", "95 % interval", "p", "verdict")


def differences(cards: Sequence[Card]) -> list[dict]:
    """Each later card (B) against the first (A), measure by measure, on the items that both have,
    without those of controls; see `task_differences`."""
    first, *others = cards
    return [
        {"a": first.directory, "b": card.directory, "task": task, **found}
        for card in others
        for task, result in card.results.items()
        if task in first.results and task != CONTROLS
        for found in task_differences(first.results[task], result)
    ]


def task_differences(a: TaskResult, b: TaskResult) -> list[dict]:
    """The `difference` of each measure of a task, and its `verdict` in words.

    The first measure stands for the task, and its p-value is taken as it is. Among many others some
    would differ by chance: their verdicts follow `p_adjusted`, which corrects for their number.
    """
    found = []
    for name, measure in b.measures.items():
        if name in a.measures and (result := difference(a.measures[name], measure)):
            found.append({"measure": name, "is_share": is_share(measure), **result})
    others = [each for each in found if each["measure"] != next(iter(b.measures))]
    for each, p in zip(others, holm([each["p"] for each in others]), strict=True):
        measure = b.measures[each["measure"]]
        each |= {"p_adjusted": p, "better": better(each, p, measure.higher_is_better)}
    for each in found:
        each["verdict"] = VERDICTS[each["better"]]
    return found


# For people


def cells(found: dict) -> list[str]:
    """A difference as the texts of a row, see `COLUMNS`."""
    form = "{:.1%}" if found["is_share"] else "{:,.4f}"
    signed = form.replace(":", ":+")
    a, b = (form.format(found[name]) for name in ("score_a", "score_b"))
    interval = " - ".join(map(signed.format, found["interval"]))
    p = found.get("p_adjusted", found["p"])
    shown = [f"{found['n']:,}", a, b, signed.format(found["difference"]), interval, f"{p:.2g}"]
    return [found["b"], found["measure"], *shown, translated(found["verdict"])]


def differences_table(found: Sequence[dict]) -> Table:
    """All of them; a terminal shows the first of each task."""
    lines, shown = [], []
    counts: Counter[tuple[str, str]] = Counter()
    for each in found:
        lines.append(cells(each))
        key = each["b"], each["task"]
        counts[key] += 1
        if counts[key] <= SHOWN:
            shown.append(lines[-1])
    return Table(COLUMNS, lines, shown)
