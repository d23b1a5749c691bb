"""Scores with their uncertainty: intervals, chance, and whether two models differ."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # standard deviations on each side of 95 % of a normal distribution
RESAMPLES = 2000  # of a bootstrap


class Measure(NamedTuple):
    """One score: the mean of the items' `values`, by the keys of the items, weighted where they
    have `weights`.

    Without weights a value is right (1), wrong (0) or between. With a `chance`, that is the score
    of guessing.
    """

    values: Mapping[str, float]
    chance: float | None = None
    weights: Mapping[str, float] | None = None
    higher_is_better: bool = True


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent trials (Wilson, 1927).

    With shares that count a tie as one half it is slightly too wide.
    """
    square = Z95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def estimate(measure: Measure) -> dict:
    """A measure's number of items `n`, its `score`, the 95 % `interval`; with a chance, `chance`
    and whether the interval leaves it out on the good side (`above_chance`: True, False, or None
    where the two cannot be distinguished).

    The interval is Wilson's, or with weights a percentile bootstrap over the items (Efron, 1979).
    """
    values = np.array(list(measure.values.values()))
    if measure.weights is None:
        score = float(values.mean())
        interval = wilson_interval(score, len(values))
    else:
        weights = np.array([measure.weights[key] for key in measure.values])
        score = float(np.average(values, weights=weights))
        interval = bootstrap_interval(values, weights)
    result = {"n": len(values), "score": score, "interval": list(interval)}
    if measure.chance is not None:
        low, high = interval
        above = True if low > measure.chance else False if high < measure.chance else None
        result |= {"chance": measure.chance, "above_chance": above}
    return result


def bootstrap_interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a weighted mean over items (n,), resampled with a fixed seed."""
    generator = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(values), size=len(values))
        means.append(np.average(values[drawn], weights=weights[drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
