"""Whether one model's replies are better than another's: win rate, and what may have been lost."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import UserError
from minimind.data.conversations import Conversation
from minimind.evaluation.files import evaluate
from minimind.evaluation.judges import Asked, Judge, PairwiseJudge
from minimind.evaluation.replies import Replies, sample_replies
from minimind.evaluation.statistics import VERDICTS, Measure, estimate
from minimind.generation import Reply
from minimind.tokenizer import tokenizer_hash

NGRAM = 4  # tokens
# Beyond these a change is a warning
COLLAPSE = 0.05  # the share by which the perplexity rises
DRIFT = 0.25  # the share by which replies become longer or shorter
POINTS = 0.05  # of the repetition rate and the stop rate


class Compared(NamedTuple):
    """One prompt: the scores of the replies of A and of B, and the share of comparisons that B won,
    ties half."""

    scores: tuple[list[float], list[float]]
    won: float


class Comparison(NamedTuple):
    """A later model's replies beside the first one's, and what the judge says of them."""

    report: dict
    prompts: Sequence[Conversation]
    a: Replies
    b: Replies
    compared: list[Compared]


def compare_models(asked: Asked, losses: Sequence[dict] = ()) -> list[Comparison]:
    """Sample replies of all models with the same seeds, and compare each later model with the
    first; see `comparison_report`. `losses`: what is known of each model's loss.

    Raises:
        UserError: see `generation.decode` and `Judge.scores`.
    """
    replies, described = [], []
    for index, (directory, model) in enumerate(zip(asked.directories, asked.models, strict=True)):
        steps = sample_replies(*model, asked.ids[index], asked.sampling, title=directory)
        replies.append([each for _, step in steps for each in step])
        facts = {"directory": directory, **describe_replies(replies[-1])}
        described.append(facts | (losses[index] if losses else {}))

    options = {**asked.sampling._asdict(), "too_long": asked.too_long}
    hashes = [tokenizer_hash(tokenizer) for _, tokenizer in asked.models]
    found = []
    for index in range(1, len(replies)):
        sides = replies[0], replies[index]
        compared = compare_replies(asked.prompts, *sides, asked.judge)
        same = hashes[0] == hashes[index]
        report = comparison_report(described[0], described[index], compared, asked.judge, same)
        report |= {"judge": asked.judge_option, **options}
        found.append(Comparison(report, asked.prompts, *sides, compared))
    return found


def compare_replies(
    prompts: Sequence[Conversation], a: Replies, b: Replies, judge: Judge
) -> list[Compared]:
    """Judge the replies of two models to the same prompts, the first of A with the first of B and
    so on; raises UserError."""
    pairs = [pair for replies in zip(a, b, strict=True) for pair in zip(*replies, strict=True)]
    owners = [prompt for prompt, replies in zip(prompts, a, strict=True) for _ in replies]
    scores = iter(judge.scores(owners, [[reply.text for reply in pair] for pair in pairs]))
    compared = []
    for replies in a:
        of_a, of_b = zip(*(next(scores) for _ in replies), strict=True)
        wins = [(1 + (y > x) - (y < x)) / 2 for x, y in zip(of_a, of_b, strict=True)]
        compared.append(Compared((list(of_a), list(of_b)), fmean(wins)))
    return compared


def win_rate(compared: Sequence[Compared], judge: Judge) -> dict:
    """B's win rate over A with its 95 % interval, and who is `better`: "a" or "b" where the
    interval lies on one side of one half, else None.

    The items are the prompts: the samples of one prompt are not independent. `order_agreement`, of
    a judge that compares two replies, is the share of pairs judged alike in both orders.
    """
    won = {str(index): each.won for index, each in enumerate(compared)}
    found = estimate(Measure(won, chance=0.5))
    wins = [(y > x) - (y < x) for each in compared for x, y in zip(*each.scores, strict=True)]
    counts = {"win": wins.count(1), "tie": wins.count(0), "loss": wins.count(-1)}
    result = {
        "rate": found["score"],
        "interval": found["interval"],
        "better": {True: "b", False: "a", None: None}[found["above_chance"]],
        "prompts": found["n"],
        **counts,
    }
    if isinstance(judge, PairwiseJudge):
        result["order_agreement"] = judge.agreed / max(1, judge.compared)
    return rounded(result)


def describe_replies(replies: Replies) -> dict:
    """What a model's replies are like, whatever they say: mean length in tokens and characters,
    `stopped`, the share that ended before the limit, and `repetition`.

    The repetition rate is the share of runs of 4 tokens that occurred before in the same reply.
    """
    everything: list[Reply] = [reply for each in replies for reply in each]
    repeated, total = map(
        sum, zip(*(repeated_runs(each.tokens) for each in everything), strict=True)
    )
    return rounded(
        {
            "replies": len(everything),
            "tokens": fmean(len(reply.tokens) for reply in everything),
            "characters": fmean(len(reply.text) for reply in everything),
            "stopped": fmean(reply.stopped for reply in everything),
            "repetition": repeated / total if total else 0.0,
        }
    )


def repeated_runs(tokens: Sequence[int]) -> tuple[int, int]:
    """How many runs of 4 tokens occurred before in the same reply, and how many runs it has."""
    runs = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return len(runs) - len(set(runs)), len(runs)


def rounded(values: dict) -> dict:
    """The fractions of a report, and those in lists, to 6 places."""
    return {
        name: [round(each, 6) for each in value]
        if isinstance(value, list)
        else round(value, 6)
        if isinstance(value, float)
        else value
        for name, value in values.items()
    }


def held_out_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, files: Sequence[str], **options
) -> dict:
    """The `perplexity` and `bits_per_byte` of a model on files; see `evaluate` for the `options`.

    Raises:
        UserError: see `evaluate`; or there is nothing to predict in the files.
    """
    metrics = evaluate(model, tokenizer, files, max_new_tokens=0, **options)
    if "perplexity" not in metrics:
        raise UserError(
            f"{files[0]}: found no reply whose loss can be measured. Give other files, or a larger"
            " --max_length."
        )
    return {name: metrics[name] for name in ("perplexity", "bits_per_byte") if name in metrics}


def comparison_report(
    a: dict, b: dict, compared: Sequence[Compared], judge: Judge, same_tokenizer: bool = True
) -> dict:
    """The report on two models: what each is like (see `describe_replies`; with its perplexity, if
    measured), the win rate, what changed from A to B, and warnings.

    `change` has ratios less 1 of `characters` and `perplexity`, differences of `stopped` and
    `repetition`. Perplexities per token of different tokenizers are not compared.
    """
    change = {name: b[name] - a[name] for name in ("stopped", "repetition")}
    for name in ("characters", "perplexity"):
        if a.get(name) and b.get(name) and (same_tokenizer or name != "perplexity"):
            change[name] = b[name] / a[name] - 1
    win = win_rate(compared, judge)
    return {
        "a": a,
        "b": b,
        "win_rate": win,
        "change": rounded(change),
        "warnings": warnings_of(change),
    }


def warnings_of(change: dict) -> list[str]:
    """What a good win rate may hide, in words."""
    texts = []
    if (rise := change.get("perplexity", 0)) > COLLAPSE:
        texts.append(
            f"B's perplexity is {rise:.1%} higher: it loses what it had learned. Train with a"
            " smaller learning rate, a larger beta or fewer steps, or add an SFT term."
        )
    if abs(drift := change.get("characters", 0)) > DRIFT:
        texts.append(
            f"B's replies are {abs(drift):.0%} {'longer' if drift > 0 else 'shorter'}: check that"
            " the judge does not merely prefer the length."
        )
    if change["repetition"] > POINTS:
        texts.append(f"B repeats itself more: by {change['repetition']:.1%} of its 4-grams.")
    if change["stopped"] < -POINTS:
        texts.append(
            f"B stops less often: {-change['stopped']:.1%} more of its replies reach the limit."
        )
    return texts


# In words


def sentence(win: dict) -> str:
    """A win rate and its verdict in words."""
    low, high = win["interval"]
    return (
        f"B wins {win['rate']:.1%} against A (95 % interval {low:.1%} to {high:.1%}, ties half,"
        f" {win['prompts']:,} prompts): {VERDICTS[win['better']]}."
    )


def summary_rows(report: dict) -> list[tuple[str, str, str]]:
    """(measure, A, B) of each figure in a report, as texts."""
    a, b, win = report["a"], report["b"], report["win_rate"]
    rows = [("comparisons won", f"{win['loss']:,}", f"{win['win']:,}")]
    forms = {
        "characters": ("mean length in characters", ".1f"),
        "tokens": ("mean length in tokens", ".1f"),
        "stopped": ("replies that end by themselves", ".1%"),
        "repetition": ("repeated 4-grams", ".1%"),
        "perplexity": ("perplexity", ",.3f"),
        "bits_per_byte": ("bits per byte", ".4f"),
    }
    for name, (title, form) in forms.items():
        if name in a and name in b:
            rows.append((title, format(a[name], form), format(b[name], form)))
    return rows
