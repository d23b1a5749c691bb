"""Differences between the cards of models: which is better, and where that may be chance."""

from collections.abc import Sequence

from minimind.common.language import translated
from minimind.evaluation.statistics import VERDICTS, better, difference, holm
from minimind.score_card.report import SHOWN, is_share
from minimind.score_card.tasks import Card, Result

COLUMNS = ("B", "measure", "n", "A", "B", "B - A", "95 % interval", "p", "verdict")


def differences(cards: Sequence[Card]) -> list[dict]:
    """Each later card against the first, measure by measure, on the items that both have; see
    `task_differences`."""
    first, *others = cards
    return [
        {"a": first.directory, "b": card.directory, "task": task, **found}
        for card in others
        for task, result in card.results.items()
        if task in first.results
        for found in task_differences(first.results[task], result)
    ]


def task_differences(a: Result, b: Result) -> list[dict]:
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
        is_better = b.measures[each["measure"]].higher_is_better
        each |= {"p_adjusted": p, "better": better(each, p, is_better)}
    for each in found:
        each["verdict"] = VERDICTS[each["better"]]
    return found


# In words


def cells(found: dict) -> list[str]:
    """A difference as the texts of a row, see `COLUMNS`."""
    form = "{:.1%}" if found["is_share"] else "{:,.4f}"
    signed = form.replace(":", ":+")
    a, b = (form.format(found[name]) for name in ("score_a", "score_b"))
    interval = " - ".join(map(signed.format, found["interval"]))
    p = found.get("p_adjusted", found["p"])
    shown = [f"{found['n']:,}", a, b, signed.format(found["difference"]), interval, f"{p:.2g}"]
    return [found["b"], found["measure"], *shown, translated(found["verdict"])]


def shown_differences(found: Sequence[dict], most: int = SHOWN) -> list[list[str]]:
    """The rows of a table for a terminal: at most so many measures of a task."""
    counts: dict[tuple[str, str], int] = {}
    rows = []
    for each in found:
        key = each["b"], each["task"]
        counts[key] = counts.get(key, 0) + 1
        rows += [cells(each)] if counts[key] <= most else []
    return rows
