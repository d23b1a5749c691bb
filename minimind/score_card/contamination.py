"""Contamination: which items of the tasks are in the training text of a model's lineage?

An item is in the training text if they share `WORDS` consecutive words, as for GPT-3 (Brown et al.,
2020, arXiv 2005.14165, appendix C) and in lm-evaluation-harness, or `CHARACTERS` Chinese
characters, which are about as many words; these are the numbers of the cleaning step
`decontaminate`. Letter case and punctuation do not count. A shorter text is compared in full from
`SHORTEST` words or characters on: most sentences of minimal pairs are shorter.

In memory are the n-grams of the items, never the training text; of a text longer than `LONG` only
n-grams that do not overlap, which still finds each copy of twice their length.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minimind.cleaning.duplicates import Decontaminate, NgramIndex
from minimind.cleaning.filters import is_chinese, units_of
from minimind.data.sources import File
from minimind.evaluation.statistics import estimate
from minimind.score_card.tasks import Task, TaskResult
from minimind.score_card.training_text import lineage_json, read_row_texts, training_files
from minimind.stage_directory import Ancestor

WORDS, CHARACTERS = Decontaminate.words, Decontaminate.characters
SHORTEST = 4
LONG = 200  # words or characters of a text from which on not each n-gram is kept
EXAMPLES = 5  # of a task, in the JSON


class Overlap(NamedTuple):
    """Where an item was found first, and the words or characters it shares there."""

    where: str
    shared: str


def contamination(
    tasks: Sequence[Task], results: Mapping[str, TaskResult], ancestors: Sequence[Ancestor]
) -> TaskResult:
    """How many items of each task are in the training text of a model, and its scores without them.

    Args:
        results: what the tasks found, by their names.
        ancestors: the lineage of the model.

    Raises:
        UserError: a training file is broken.
    """
    texts = {task.name: task.item_texts() for task in tasks if hasattr(task, "item_texts")}
    overlaps = find_overlaps(texts, training_files(ancestors))
    sections = {
        name: _section(results[name], items, overlaps[name])
        for name, items in texts.items()
        if items
    }
    section = {
        "words": WORDS,
        "characters": CHARACTERS,
        "lineage": lineage_json(ancestors),
        "tasks": sections,
    }
    return TaskResult({}, section | {"remarks": _remarks(section)})


def _section(result: TaskResult, items: Mapping, overlaps: Mapping[str, Overlap]) -> dict:
    """What is said of one task."""
    scores = {}
    for name, measure in result.measures.items():
        rest = {key: value for key, value in measure.values.items() if key not in overlaps}
        if len(rest) < len(measure.values):
            without = estimate(measure._replace(values=rest)) if rest else None
            scores[name] = {"all": estimate(measure), "without": without}
    return {
        "n": len(items),
        "too_short": sum(not any(map(_ngrams, texts)) for texts in items.values()),
        "overlapping": len(overlaps),
        "share": len(overlaps) / len(items),
        "scores": scores,
        "examples": [{"item": key, **overlaps[key]._asdict()} for key in list(overlaps)[:EXAMPLES]],
    }


def _remarks(section: dict) -> list[str]:
    """The section in words."""
    remarks = [
        f"{stage['directory']}: its training text was not compared: {stage['problem']}"
        for stage in section["lineage"]
        if stage["problem"]
    ]
    if not any(stage["files"] for stage in section["lineage"]):
        return remarks
    for name, task in section["tasks"].items():
        found, count = task["overlapping"], task["n"]
        parts = [f"{name}: {found:,} of {count:,} items are in the training text"]
        for measure, score in list(task["scores"].items())[:1]:
            before, without = score["all"]["score"], score["without"]
            if without:
                after = without["score"]
                parts.append(f"{measure} is {before:.4g} with them and {after:.4g} without")
        remarks.append("; ".join(parts))
    return remarks


def find_overlaps(
    texts: Mapping[str, Mapping[str, Sequence[str]]], files: Sequence[File]
) -> dict[str, dict[str, Overlap]]:
    """For each task the items that are in the files, by their keys.

    Args:
        texts: for each task the texts of each item.
    """
    index = NgramIndex(SHORTEST)
    for task, items in texts.items():
        for key, parts in items.items():
            for text in parts:
                if found := _ngrams(text):
                    units, n = found
                    index.add(units, n, (task, key), n if len(units) > LONG else 1)
    overlaps: dict[str, dict[str, Overlap]] = {task: {} for task in texts}
    if not index.items or not files:
        return overlaps

    index.freeze()
    for where, text in read_row_texts(files, "contamination"):
        units = units_of(text.casefold())
        for start, length, items in index.find(units):
            shared = Overlap(where, " ".join(units[start : start + length]))
            for task, key in items:
                overlaps[task].setdefault(key, shared)
    return overlaps


def _ngrams(text: str) -> tuple[list[str], int] | None:
    """A text's words and characters, and how many of them count as a match; None if it is too
    short."""
    units = units_of(text.casefold())
    n = CHARACTERS if is_chinese(text, len(units)) else WORDS
    return (units, n) if len(units) >= SHORTEST else None
