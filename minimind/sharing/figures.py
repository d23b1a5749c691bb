"""What was measured of a model, as rows of its model card: by its own run, and by `minimind
evaluate`."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minimind.common.errors import UserError
from minimind.evaluation import wilson_interval

SHOWN = 6  # measures of one task
CARD_FIELDS = {"directory": str, "measures": dict}
MEASURE_FIELDS = {"n": int, "score": float | int, "interval": list}
# The metrics of a run that a card shows, with the words for them
METRICS = {
    "loss": "loss (nats per {})",
    "perplexity": "perplexity per token",
    "bits_per_byte": "bits per byte",
    "pairs_sum": "minimal pairs won",
    "rewards/accuracies": "pairs whose chosen reply has the higher implicit reward",
    "rewards/margins": "margin of the implicit rewards",
    "accuracy": "pairs ranked as chosen",
    "margin": "reward of the chosen reply less that of the rejected one",
}
LOSS_OF = {"dpo": "pair", "reward": "pair", "kto": "reply"}  # of other stages: token


class HeldOut(NamedTuple):
    """A metric of the run's own held-out rows."""

    name: str | None  # as the run's log has it
    title: str
    before: float | None
    after: float
    interval: tuple[float, float] | None


class Score(NamedTuple):
    """A measure of a score card."""

    task: str
    name: str
    n: int
    score: float
    interval: tuple[float, float]
    chance: float | None


def held_out(record: dict) -> Iterator[HeldOut]:
    """The held-out metrics in the record of a stage, with their intervals where they are known; if
    that of the loss is of a part of the rows, then this part too."""
    metrics = record.get("metrics") or {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    for name, title in METRICS.items():
        if isinstance(value := after.get(name), int | float):
            unit = LOSS_OF.get(record.get("stage") or "", "token")
            interval = _interval(name, after, record)
            yield HeldOut(name, title.format(unit), before.get(name), value, interval)
    losses = record.get("token_loss") or {}
    if losses.get("rows", 0) < losses.get("held_out_rows", 0):
        title = f"loss of {losses['rows']} of the {losses['held_out_rows']:,} rows"
        yield HeldOut(None, title, None, losses["mean"], tuple(losses["interval"]))


def _interval(name: str, after: dict, record: dict) -> tuple[float, float] | None:
    if f"{name}_low" in after:
        return after[f"{name}_low"], after[f"{name}_high"]
    pairs = ((record.get("data") or {}).get("eval") or {}).get("rows")
    if name == "rewards/accuracies" and pairs:
        return wilson_interval(after[name], pairs)

    # Of the loss of all held-out rows, in its own unit or in another that is proportional to it
    losses = record.get("token_loss") or {}
    if losses.get("rows") != losses.get("held_out_rows") or not losses.get("interval"):
        return None
    low, high = losses["interval"]
    if name == "perplexity":
        return math.exp(low), math.exp(high)
    if name in ("loss", "bits_per_byte") and after.get("loss"):
        scale = after[name] / after["loss"]
        return low * scale, high * scale
    return None


def scores(card: dict[str, Any], file: Path) -> list[Score]:
    """The first measures of each task in a card.json.

    Raises:
        UserError: it is not one of ours, or of several models.
    """
    if isinstance(models := card.get("models"), list):
        raise UserError(
            f"{file}: found the score card of {len(models)} models, expected that of one. Run"
            " minimind evaluate with one directory."
        )
    try:
        return [
            Score(
                task,
                name,
                int(found["n"]),
                float(found["score"]),
                tuple(map(float, found["interval"])),
                found.get("chance"),
            )
            for task, measures in card["measures"].items()
            for name, found in list(measures.items())[:SHOWN]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: found no measures, expected the card.json of minimind evaluate --output"
            " (older ones do not have them). Evaluate the model again."
        ) from error
