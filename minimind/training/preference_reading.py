"""What the curves of a preference training say at its end: patterns that mean that something went
wrong, and what to change; docs/curves.md shows them."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

from minimind.common.language import say, translated
from minimind.evaluation import wilson_interval

Finding = tuple[str, str, str, str]  # name, severity, text, advice

MOVED = 0.05  # a reward; the loss of a pair with this margin is 0.025 below ln 2
FELL = 0.25  # fall of the chosen rewards, as a share of the rise of the margins
LEARNED = 0.25  # share of the training margins' rise that held-out margins reach at least
FROM_PEAK = 0.1  # share of the highest held-out margin that may be lost again
ENTROPY = 0.5  # the lower entropy, before or after training, as a share of the higher one, at least
UNSURE = 0.3  # nats by which the entropy may always rise
FEW = 10  # of fewer pairs no accuracy is compared
NORMAL = 1.96  # standard deviations on each side of 95 % of a normal distribution


def read_curves(log: Sequence[dict], pairs: int) -> list[dict[str, str]] | None:
    """The findings in a log (see `plots.read_log`), each {"name", "severity", "text", "advice"};
    None where it is not one of training on pairs or rated replies. `pairs`: the held-out ones.

    Rated replies have no accuracies and no lengths, so that less is found in their curves.
    Held-out values are used where there are any: they are of the same pairs at each evaluation.
    A value of training is the mean over the last quarter of the log, since each is of other pairs.
    """
    train = [entry for entry in log if "rewards/margins" in entry]
    if not train:
        return None
    held_out = [
        {key.removeprefix("eval_"): value for key, value in entry.items()}
        for entry in log
        if "eval_rewards/margins" in entry
    ]
    late = train[-max(1, len(train) // 4) :]
    last = {key: fmean(entry.get(key, math.nan) for entry in late) for key in late[-1]}
    start = train[0]
    begin, end = (start, last) if len(held_out) < 2 else (held_out[0], held_out[-1])

    found = [*_rewards(begin, end)]
    if not found:
        found += _overfitting(start, last, train, held_out)
        found += _accuracy(held_out[-1], pairs) if held_out else ()
        found += _length(held_out[-1], pairs) if held_out else ()
    found += _entropy(begin, end)
    return [dict(zip(("name", "severity", "text", "advice"), each, strict=True)) for each in found]


def say_findings(findings: Sequence[dict[str, str]]) -> None:
    """Print the findings of a run, or that there is none."""
    if not findings:
        say("the curves of this run show nothing unusual")
    for finding in findings:
        text, advice = map(translated, (finding["text"], finding["advice"]))
        say(f"{translated(finding['severity'])}: {text} {advice}")


def _rewards(begin: dict, end: dict) -> Iterator[Finding]:
    """Rewards that stay where they were, or that rise although the chosen reply becomes less
    likely."""
    kinds = ("chosen", "rejected", "margins")
    chosen, rejected, margin = (
        end.get(f"rewards/{kind}", 0.0) - begin.get(f"rewards/{kind}", 0.0) for kind in kinds
    )
    if max(map(abs, (chosen, rejected, margin))) < MOVED:
        yield (
            "rewards_did_not_move",
            "warning",
            f"Rewards did not move: the margin between chosen and rejected is {margin:+.3f}.",
            "Raise --learning_rate, train for more steps, or lower --beta.",
        )
    elif margin > MOVED and chosen < -FELL * margin:
        has_pairs = "rewards/accuracies" in end
        yield (
            "chosen_fell",
            "warning",
            f"The log-probability of chosen replies fell (rewards/chosen {chosen:+.3f}) while the"
            f" margins rose ({margin:+.3f}): the model learns mainly what not to say.",
            "Raise --beta or lower --learning_rate, or add an SFT term (--loss_type sigmoid sft)."
            if has_pairs
            else "Raise --beta or lower --learning_rate, or raise --desirable_weight.",
        )


def _overfitting(
    start: dict, last: dict, train: Sequence[dict], held_out: Sequence[dict]
) -> Iterator[Finding]:
    """Margins that rise on the training pairs and not, or no longer, on held-out ones."""
    if len(held_out) < 2:
        return
    rise = last["rewards/margins"] - start["rewards/margins"]
    margins = [entry["rewards/margins"] for entry in held_out]
    peak = max(range(len(margins)), key=margins.__getitem__)
    step, highest, end = held_out[peak]["step"], margins[peak], margins[-1]
    since = [entry["rewards/margins"] for entry in train if entry["step"] <= step] or [0.0]
    advice = (
        "Train for fewer epochs or with a lower --learning_rate, or stop in time: --eval_strategy"
        " epoch --early_stopping_patience 3 --metric_for_best_model eval_rewards/margins."
    )
    if rise > MOVED and end - margins[0] < LEARNED * rise:
        yield (
            "overfitting",
            "warning",
            f"Margins rose on the training pairs ({rise:+.3f}) but not on the held-out ones"
            f" ({end - margins[0]:+.3f}): overfitting.",
            advice,
        )
    elif highest - end > max(MOVED, FROM_PEAK * highest) and last["rewards/margins"] > since[-1]:
        yield (
            "overfitting",
            "warning",
            f"The held-out margin fell from {highest:.3f} after step {step:,} to {end:.3f} while"
            " that of the training pairs rose: overfitting.",
            advice,
        )


def _accuracy(end: dict, pairs: int) -> Iterator[Finding]:
    """A held-out accuracy that guessing might have too."""
    accuracy = end.get("rewards/accuracies")
    if not pairs or accuracy is None:
        return
    low, high = wilson_interval(accuracy, pairs)
    if low <= 0.5 <= high:
        yield (
            "chance",
            "warning",
            f"The held-out accuracy, {accuracy:.1%} of {pairs:,} pairs, is not distinguishable from"
            f" chance (95 % interval {low:.1%} to {high:.1%}).",
            "Look at the pairs (minimind inspect), train on more of them, or give more held-out"
            " ones (--max_eval_rows, --eval_ratio).",
        )
    elif accuracy < 0.5:
        yield (
            "below_chance",
            "warning",
            f"The held-out accuracy, {accuracy:.1%} of {pairs:,} pairs, is below chance.",
            "Look whether chosen and rejected are swapped in one of the files, and lower"
            " --learning_rate.",
        )


def _length(end: dict, pairs: int) -> Iterator[Finding]:
    """An accuracy that a rule on the replies' length alone would reach."""
    share = {kind: end.get(f"lengths/chosen_{kind}", 0.0) for kind in ("longer", "shorter")}
    count = {kind: round(share[kind] * pairs) for kind in share}
    right = {kind: end.get(f"rewards/accuracies_{kind}", 0.0) for kind in share}
    if max(count.values()) < FEW:
        return
    if min(count.values()) < FEW:
        usual = max(count, key=count.__getitem__)
        if right[usual] > 0.5 + _deviation(0.5, count[usual]):
            yield (
                "one_length",
                "info",
                f"The chosen reply is the {usual} one in {share[usual]:.1%} of the held-out pairs,"
                " so length alone could explain the preference.",
                "Hold out pairs of both kinds to know.",
            )
        return
    strong, weak = sorted(right, key=right.__getitem__, reverse=True)
    mean = sum(right[kind] * count[kind] for kind in count) / sum(count.values())
    gap = math.hypot(*(_deviation(mean, count[kind]) for kind in count))
    is_guess = right[weak] <= 0.5 + _deviation(0.5, count[weak])
    if right[strong] - right[weak] > gap and is_guess and right[strong] > 0.5:
        yield (
            "length",
            "warning",
            f"The replies' length explains the preference: right are {right[strong]:.1%} of the"
            f" held-out pairs whose chosen reply is the {strong} one, and {right[weak]:.1%} of the"
            " others.",
            "Balance the pairs by length, or weigh the tail of longer replies less"
            " (--ld_alpha 0.5, or --loss_type sigmoid_norm).",
        )


def _entropy(begin: dict, end: dict) -> Iterator[Finding]:
    """A policy that has lost its variety, or its certainty."""
    before, after = begin.get("entropy", math.nan), end.get("entropy", math.nan)
    if after < ENTROPY * before:
        yield (
            "entropy",
            "warning",
            f"The entropy fell from {before:.3f} to {after:.3f} nats per token: the model has lost"
            " much of its variety.",
            "Raise --beta or lower --learning_rate.",
        )
    elif after > max(before / ENTROPY, before + UNSURE):
        yield (
            "entropy_rose",
            "warning",
            f"The entropy rose from {before:.3f} to {after:.3f} nats per token: the model is no"
            " longer sure of its words, and its replies may fall apart.",
            "Lower --learning_rate or raise --beta, and read the samples.",
        )


def _deviation(share: float, count: int) -> float:
    """Half the width of the 95 % interval of a share in `count` pairs (normal approximation)."""
    return NORMAL * math.sqrt(share * (1 - share) / count)
