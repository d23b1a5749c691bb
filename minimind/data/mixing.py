"""How many rows of each source of data one epoch takes, and which.

A source is one word of `--train_files`: a file, directory or glob, and perhaps its weight or its
number of passes.

    books/ web.parquet               all of both, as one corpus
    books/:0.7 web.parquet:0.3       70 % of an epoch's rows are books
    books/:3x web.parquet            the books three times an epoch, the rest once
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minimind.common.errors import UserError

STOPPING = ("first_exhausted", "all_exhausted")
NUMBERED = re.compile(r"(?P<path>.+):(?P<number>[^:/\\]+?)(?P<times>x?)")


class Source(NamedTuple):
    """Files, and either their share of an epoch (`weight`) or how often it takes them
    (`epochs`)."""

    paths: list[str]
    weight: float | None = None
    epochs: float | None = None


def parse_sources(words: Sequence[str], temperature: float | None = None) -> list[Source]:
    """Return the sources that words of `--train_files` name.

    All words without a number are one source, unless a temperature weighs each by its size.

    Raises:
        UserError: a number is not positive, some sources have weights and others none, or there
            are numbers beside a temperature.
    """
    sources = [_parse(str(word)) for word in words]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        missing = next(source.paths[0] for source in sources if source.weight is None)
        raise UserError(
            f"--train_files: {missing} has no weight and {weighted[0].paths[0]} has one. Give every"
            " source a weight, as in a.jsonl:0.7 b.jsonl:0.3, or none."
        )
    numbered = [source for source in sources if source.weight or source.epochs]
    if temperature is None:
        plain = [path for source in sources if source not in numbered for path in source.paths]
        return ([Source(plain)] if plain else []) + numbered
    if temperature <= 0:
        raise UserError(
            f"--mixing_temperature {temperature:g}: expected a number above 0. 1 mixes by size."
        )
    if numbered:
        raise UserError(
            "--mixing_temperature weighs sources by their size: leave the :numbers of"
            " --train_files out."
        )
    return sources


def _parse(word: str) -> Source:
    match = NUMBERED.fullmatch(word)
    # os.path, because Path raises for unknown users and for names that are too long
    if match is None or os.path.exists(os.path.expanduser(word)):  # noqa: PTH110, PTH111
        return Source([word])
    try:
        number = float(match["number"])
    except ValueError:  # a path with a colon; whether it exists is found out where it is read
        return Source([word])
    if not 0 < number < float("inf"):
        raise UserError(
            f"--train_files {word}: found the number {match['number']}, expected one above 0."
        )
    return Source([match["path"]], **{"epochs" if match["times"] else "weight": number})


def rows_per_epoch(
    sources: Sequence[Source],
    rows: Sequence[int],
    temperature: float | None = None,
    stopping: str = "first_exhausted",
) -> list[int]:
    """Return how many rows an epoch takes of each source, which has so many `rows`.

    Weights w give round(w_i N) rows: with "first_exhausted" N is the most for which no row is
    needed twice, with "all_exhausted" the least that takes every row once. A temperature t makes
    the weights rows_i ** (1 / t): 1 mixes by size, a high t all alike (Devlin, 2018, for
    multilingual BERT; Raffel et al., 2020, section 3.5.2).
    """
    if stopping not in STOPPING:
        raise UserError(f"--mixing_stop {stopping}: expected one of {', '.join(STOPPING)}.")
    sizes = np.asarray(rows, dtype=float)
    if temperature is not None:
        weights = sizes ** (1 / temperature)
    elif any(source.weight for source in sources):
        weights = np.array([source.weight for source in sources])
    else:
        passes = [source.epochs or 1 for source in sources]
        return [round(each * count) for each, count in zip(passes, rows, strict=True)]
    weights = weights / weights.sum()
    totals = sizes / weights
    total = totals.min() if stopping == "first_exhausted" else totals.max()
    return [round(share * total) for share in weights]


def mixture(rows: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Return which of the joined sources' rows an epoch takes, `counts` of each source.

    Of each source these are complete passes, and a random part of one more.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for first, size, count in zip(np.cumsum([0, *rows[:-1]]), rows, counts, strict=True):
        passes, rest = divmod(count, size) if size else (0, 0)
        chosen = np.sort(generator.permutation(size)[:rest])
        parts.append(first + np.concatenate([np.tile(np.arange(size), passes), chosen]))
    return np.concatenate(parts).astype(np.int64)


def epoch_rows(
    data_args, sources: Sequence[Source], rows: list[int], seed: int
) -> tuple[list[int], np.ndarray | None]:
    """Return how many rows an epoch takes of each source by the options of `data_args`, and which;
    None for each once and in order."""
    counts = rows_per_epoch(sources, rows, data_args.mixing_temperature, data_args.mixing_stop)
    return counts, mixture(rows, counts, seed) if counts != rows else None


def add_counts(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Return the sum of each count that occurs.

    >>> add_counts([{"rows": 3, "split": 0}, {"rows": 4, "dropped": 1}])
    {'rows': 7, 'split': 0, 'dropped': 1}
    """
    total = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def source_facts(
    sources: Sequence[Source], facts: Sequence[dict], counts: Sequence[int]
) -> dict[str, Any]:
    """Return what stage.json says of several sources, with the rows that an epoch takes; {} for
    one."""
    if len(sources) == 1:
        return {}
    parts = [
        {"files": source.paths, **fact, "rows_per_epoch": count}
        for source, fact, count in zip(sources, facts, counts, strict=True)
    ]
    return {"rows_per_epoch": sum(counts), "sources": parts}
