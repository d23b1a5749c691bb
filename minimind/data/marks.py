"""Marks of messages and rows that say whether anybody should learn them."""

from collections.abc import Mapping
from typing import Any

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.calls import EMPTY
from minimind.data.columns import Fields

# Keys of a message: whether it is trained, whether it is not, and how much
FLAGS = (
    *("train", "training", "trainable", "train_on_turn", "loss", "learn", "loss_mask"),
    *("compute_loss", "supervised", "include_in_loss", "use_for_training"),
)
MASKS = ("mask", "masked", "skip", "ignore", "exclude", "mask_loss", "no_loss")
WEIGHTS = ("weight", "loss_weight")
MESSAGE_MARKS = (*FLAGS, *MASKS, *WEIGHTS)
ANY_MESSAGE_MARK = {*MESSAGE_MARKS, "train_detail"}
WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}

# Columns of a row: whether its reply is good, whether it is bad, scores (0 is the worst) and votes
# (0 says nothing)
VERDICTS = (
    *("label", "kto_tag", "desirable", "is_desirable", "accept", "accepted", "is_accepted"),
    *("chosen", "is_chosen", "preferred", "is_preferred", "approved", "is_approved"),
    *("correct", "is_correct", "good", "is_good", "thumbs_up", "liked"),
)
REJECTIONS = ("rejected", "is_rejected", "bad", "is_bad", "undesirable", "thumbs_down", "disliked")
SCORES = ("score", "rating", "reward", "verdict", "judgement", "judgment", "overall_score")
VOTES = ("vote", "votes", "feedback", "preference")
ROW_MARKS = {*VERDICTS, *REJECTIONS, *SCORES, *VOTES}
BAD_WORDS = (
    *("rejected", "negative", "bad", "undesirable", "dispreferred", "dislike", "thumbs_down"),
    *("downvote", "-1"),
)
NO = (False, "false", "no", "0", *BAD_WORDS)
YES = (True, "true", "yes", "1")


def parse_weight(message: Mapping, name: str) -> float | None:
    """The weight that the marks of a row or message give it, 0 for "not trained"; None without any.

    Raises:
        BadRowError: a mark with an unknown meaning.
    """
    if ANY_MESSAGE_MARK.isdisjoint(message):
        return None
    if message.get("train_detail") not in EMPTY:
        raise BadRowError(
            f"{name}: found 'train_detail', marks of parts of a reply, expected whole replies"
        )
    keys = [key for key in MESSAGE_MARKS if message.get(key) not in (None, "")]
    weights = [_weight_of(key, message[key], name) for key in keys]
    return 0.0 if 0.0 in weights else weights[-1] if weights else None


def _weight_of(key: str, value: Any, name: str) -> float:
    value = WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if key not in WEIGHTS:
        if value not in (0, 1):  # also True and False
            raise BadRowError(f"{name}: found {key!r}: {shown(value)}, expected true or false")
        return float(value if key in FLAGS else not value)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise BadRowError(f"{name}: found {key!r}: {shown(value)}, expected a number from 0 up")
    return weight


def check_verdict(row: Fields) -> None:
    """Raise BadRowError for a row whose reply is marked as bad, as in data for KTO."""
    for name in sorted(row.columns.keys() & ROW_MARKS):
        value = row[name]
        if isinstance(value, list | dict):
            continue
        word = value.strip().lower() if isinstance(value, str) else value
        # True and False equal 1 and 0
        is_bad = word in (YES if name in REJECTIONS else BAD_WORDS if name in VOTES else NO)
        # A negative fraction may come from a reward model
        if name not in REJECTIONS and isinstance(word, int):
            is_bad = is_bad or word < 0
        if is_bad:
            raise BadRowError(
                f"found {name!r}: {shown(value)}, the mark of a rejected reply, expected replies to"
                f" learn from (--unread_columns {name} trains on them anyway)"
            )
