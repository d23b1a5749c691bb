"""How much of each source of data one epoch takes.

A source is one word of `--train_files`: a file, directory or glob, perhaps with what is asked of
it.

    books/ web.parquet               all of both, as one corpus
    books/:0.7 web.parquet:0.3       70 % of an epoch's rows are books
    books/:3x web.parquet            the books three times an epoch, the rest once
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minimind.common.errors import UserError

STOPPING = ("first_exhausted", "all_exhausted")
ASKED = re.compile(r"(?P<path>.+):(?P<number>[^:/\\]+?)(?P<times>x?)")


class Source(NamedTuple):
    """Files, and either their share of an epoch (`weight`) or how often it takes them
    (`epochs`)."""

    paths: list[str]
    weight: float | None = None
    epochs: float | None = None


def parse_sources(words: Sequence[str], temperature: float | None = None) -> list[Source]:
    """Words of `--train_files` -> sources; all that nothing is asked of are one, unless a
    temperature weighs them.

    Raises:
        UserError: a number that is not positive, or weights for some sources and not for others.
    """
    sources = [_parse(str(word)) for word in words]
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        missing = next(source.paths[0] for source in sources if source.weight is None)
        raise UserError(
            f"--train_files: {missing} has no weight and {weighted[0].paths[0]} has one. Give every"
            " source a weight, as in a.jsonl:0.7 b.jsonl:0.3, or none."
        )
    if temperature is not None:
        if temperature <= 0:
            raise UserError(
                f"--mixing_temperature {temperature:g}: expected a number above 0. 1 mixes by size."
            )
        if any(source.weight or source.epochs for source in sources):
            raise UserError(
                "--mixing_temperature weighs sources by their size: leave the :numbers of"
                " --train_files out."
            )
        return sources
    plain = [
        path
        for source in sources
        if not source.weight and not source.epochs
        for path in source.paths
    ]
    asked = [source for source in sources if source.weight or source.epochs]
    return ([Source(plain)] if plain else []) + asked


def _parse(word: str) -> Source:
    match = ASKED.fullmatch(word)
    # Unlike these, Path raises for a user that does not exist and for names that are too long.
    if match is None or os.path.exists(os.path.expanduser(word)):  # noqa: PTH110, PTH111
        return Source([word])
    try:
        number = float(match["number"])
    except ValueError:
        # A path with a colon; whether it exists is found out where it is read
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
    """How many rows an epoch takes of each source that has so many `rows`.

    Weights w give round(w_i N) rows: with "first_exhausted" N is the most that no source needs a
    row twice for, with "all_exhausted" the least that takes every row once. A temperature t makes
    the weights rows_i ** (1 / t), so that 1 mixes by size and a high one all alike (Devlin, 2018,
    for multilingual BERT; Raffel et al., 2020, section 3.5.2).
    """
    if stopping not in STOPPING:
        raise UserError(f"--mixing_stop {stopping}: expected one of {', '.join(STOPPING)}.")
    sizes = np.asarray(rows, dtype=float)
    if temperature is not None:
        weights = sizes ** (1 / temperature)
    elif any(source.weight for source in sources):
        weights = np.array([source.weight for source in sources])
    else:
        return [
            round((source.epochs or 1) * count) for source, count in zip(sources, rows, strict=True)
        ]
    weights = weights / weights.sum()
    totals = sizes / weights
    total = totals.min() if stopping == "first_exhausted" else totals.max()
    return [round(share * total) for share in weights]


def mixture(rows: Sequence[int], wanted: Sequence[int], seed: int) -> np.ndarray:
    """Which rows of the joined sources an epoch takes: whole passes over each, and a random part of
    one more."""
    generator = np.random.default_rng(seed)
    parts = []
    for first, count, want in zip(np.cumsum([0, *rows[:-1]]), rows, wanted, strict=True):
        passes, rest = divmod(want, count) if count else (0, 0)
        chosen = np.sort(generator.permutation(count)[:rest])
        parts.append(first + np.concatenate([np.tile(np.arange(count), passes), chosen]))
    return np.concatenate(parts).astype(np.int64)
