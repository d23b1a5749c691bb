"""Scores with their uncertainty: intervals, chance, and whether two models differ."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # standard deviations on each side of 95 % of a normal distribution
RESAMPLES = 2000  # of a bootstrap
FLIPS = 10_000  # of a sign-flip test
DRAWN = 2**22  # signs at a time
LEVEL = 0.05  # below it, a difference is more than chance
VERDICTS = {"b": "B is better", "a": "A is better", None: "not distinguishable"}


class Measure(NamedTuple):
    """One score: the mean of the items' `values`, by the keys of the items, weighted where they
    have `weights`.

    `chance`, if it means anything, is the score of guessing: the mean over the items where they
    differ in it.

    Items are independent draws. What is not independent is one item: the samples of a prompt, the
    windows of a document. The groups of items (paradigms, subjects, files) are not drawn but given:
    an interval tells what other items of the same groups would score, not what other groups would.
    """

    values: Mapping[str, float]
    chance: float | None = None
    weights: Mapping[str, float] | None = None
    higher_is_better: bool = True


# One model


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

    The interval is Wilson's for values from 0 to 1 without weights: right for right and wrong
    items, too wide for graded ones. Else it is a percentile bootstrap over the items (Efron, 1979),
    which is too narrow for fewer than about 20.
    """
    values, weights = arrays(measure)
    score = float(np.average(values, weights=weights))
    if measure.weights is None and values.min() >= 0 and values.max() <= 1:
        interval = wilson_interval(score, len(values))
    else:
        interval = bootstrap_interval(values, weights)
    result = {"n": len(values), "score": score, "interval": list(interval)}
    if measure.chance is not None:
        result |= {"chance": measure.chance, "above_chance": is_above(interval, measure)}
    return result


def is_above(interval: tuple[float, float], measure: Measure) -> bool | None:
    """Whether an interval lies on the good side of a measure's chance; None if it holds it."""
    low, high = interval
    if low <= measure.chance <= high:
        return None
    return (low > measure.chance) == measure.higher_is_better


def arrays(measure: Measure, keys: Iterable[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The values and the weights, 1 where there are none, of some items of a measure: (n,) each."""
    keys = list(measure.values if keys is None else keys)
    weights = measure.weights or dict.fromkeys(keys, 1.0)
    return tuple(np.array([each[key] for key in keys]) for each in (measure.values, weights))


def bootstrap_interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a weighted mean over items (n,), resampled with a fixed seed."""
    generator = np.random.default_rng(0)
    means = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(values), size=len(values))
        means.append(np.average(values[drawn], weights=weights[drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# Two models


def difference(a: Measure, b: Measure) -> dict | None:
    """How much more B scores than A on the items that both have, paired by their keys; None where
    they share no item, or weigh one differently, as by the tokens of two tokenizers.

    Returns:
        `n`; of these items `score_a` and `score_b`; their `difference`, its 95 % `interval`; `p`,
        how often chance alone would make one as large; and who is `better` (see `better`). The
        interval is that of Bonett and Price (2012) for right and wrong items, else a percentile
        bootstrap over the items.
    """
    keys = [key for key in a.values if key in b.values]
    (of_a, weights), (of_b, others) = arrays(a, keys), arrays(b, keys)
    if not keys or not np.array_equal(weights, others):
        return None
    differences = of_b - of_a
    if a.weights is None and set(np.unique([of_a, of_b])) <= {0, 1}:
        counts = (int((differences == sign).sum()) for sign in (1, -1))
        interval = paired_interval(*counts, len(keys))
    else:
        interval = bootstrap_interval(differences, weights)
    result = {
        "n": len(keys),
        "score_a": float(np.average(of_a, weights=weights)),
        "score_b": float(np.average(of_b, weights=weights)),
        "difference": float(np.average(differences, weights=weights)),
        "interval": list(interval),
        "p": sign_flip_test(weights * differences),
    }
    return result | {"better": better(result, result["p"], b.higher_is_better)}


def better(result: dict, p: float, higher_is_better: bool = True) -> str | None:
    """The model of a `difference` that is better, "a" or "b"; None where chance is an
    explanation."""
    if p >= LEVEL:
        return None
    return "b" if (result["difference"] > 0) == higher_is_better else "a"


def sign_flip_test(differences: np.ndarray) -> float:
    """The two-sided p-value of the sum of paired differences (n,), if each might as well have had
    the other sign (Fisher, 1935).

    Exact where all that are not zero have one size: for right and wrong items it is McNemar's exact
    test. Else from 10,000 draws with a fixed seed, so never below 1 / 10,001.
    """
    differences = differences[differences != 0]
    count = len(differences)
    if not count:
        return 1.0
    sizes = np.abs(differences)
    if np.ptp(sizes) == 0:
        return binomial_test(int((differences > 0).sum()), count)
    generator, limit = np.random.default_rng(0), abs(differences.sum()) * (1 - 1e-9)
    extreme, rows = 0, max(1, DRAWN // count)
    for start in range(0, FLIPS, rows):
        signs = generator.integers(2, size=(min(rows, FLIPS - start), count), dtype=np.int8)
        sums = 2 * (signs @ differences) - differences.sum()
        extreme += int((np.abs(sums) >= limit).sum())
    return (1 + extreme) / (1 + FLIPS)


def binomial_test(wins: int, count: int) -> float:
    """The two-sided p-value of so many heads of a fair coin."""
    log_all = math.lgamma(count + 1) - count * math.log(2)
    tail = sum(
        math.exp(log_all - math.lgamma(heads + 1) - math.lgamma(count - heads + 1))
        for heads in range(min(wins, count - wins) + 1)
    )
    return min(1.0, 2 * tail)


def paired_interval(gained: int, lost: int, count: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares on the same items, of which B has `gained`
    and `lost` some (Bonett and Price, 2012, Statistics in Medicine 31)."""
    up, down = ((each + 1) / (count + 2) for each in (gained, lost))
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests -> such that with true null hypotheses alone one of them is below
    0.05 in 5 % of all cases (Holm, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted
