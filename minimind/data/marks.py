"""Marks of rows and messages that say what is to be learned."""

from collections.abc import Mapping
from typing import Any

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.calls import (
    EMPTY,
)
from minimind.data.columns import Fields

FLAGS = (  # whether a reply is trained
    *(
        "train",
        "training",
        "trainable",
        "train_on_turn",
        "loss",
        "learn",
        "loss_mask",
        "compute_loss",
        "supervised",
    ),
    *("include_in_loss", "use_for_training"),
)
MASKS = ("mask", "masked", "skip", "ignore", "exclude", "mask_loss", "no_loss")  # the opposite
WEIGHTS = ("weight", "loss_weight")
TRAINING_MARKS = {*FLAGS, *MASKS, *WEIGHTS, "train_detail"}
WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


# Marks of what is trained


def parse_weight(message: Mapping, name: str) -> float | None:
    """The weight that marks of a row or message give it, 0 for "not trained"; None where there is
    none.

    Raises:
        BadRowError: a mark that is not understood.
    """
    if TRAINING_MARKS.isdisjoint(message):
        return None
    if message.get("train_detail") not in EMPTY:
        raise BadRowError(
            f"{name}: found 'train_detail', marks of parts of a reply, expected whole replies"
        )
    given = [
        (key, message[key])
        for key in (*FLAGS, *MASKS, *WEIGHTS)
        if message.get(key) not in (None, "")
    ]
    weights = [_parse_mark(key, value, name) for key, value in given]
    return 0.0 if 0.0 in weights else weights[-1] if weights else None


def _parse_mark(key: str, value: Any, name: str) -> float:
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


# Columns that say whether anybody should learn the reply, and those that say the opposite.
VERDICTS = (
    *(
        "label",
        "kto_tag",
        "desirable",
        "is_desirable",
        "accept",
        "accepted",
        "is_accepted",
        "chosen",
        "is_chosen",
        "preferred",
    ),
    *(
        "is_preferred",
        "approved",
        "is_approved",
        "correct",
        "is_correct",
        "good",
        "is_good",
        "thumbs_up",
        "liked",
    ),
)
REJECTIONS = ("rejected", "is_rejected", "bad", "is_bad", "undesirable", "thumbs_down", "disliked")
# 0 is the worst of all
SCORES = ("score", "rating", "reward", "verdict", "judgement", "judgment", "overall_score")
VOTES = ("vote", "votes", "feedback", "preference")  # 0 says nothing
VERDICT_MARKS = {*VERDICTS, *REJECTIONS, *SCORES, *VOTES}
NO_WORDS = (
    "rejected",
    "negative",
    "bad",
    "undesirable",
    "dispreferred",
    "dislike",
    "thumbs_down",
    "downvote",
    "-1",
)
NO = (False, "false", "no", "0", *NO_WORDS)
YES = (True, "true", "yes", "1")


# What a row says beside its messages


def check_verdict(row: Fields) -> None:
    """Refuse (BadRowError) a row that is marked as one that nobody should learn, as KTO's data has
    them."""
    for name in sorted(row.columns.keys() & VERDICT_MARKS):
        value = row[name]
        if isinstance(value, list | dict):
            continue
        word = value.strip().lower() if isinstance(value, str) else value
        # 0 and 1 are booleans
        rejected = word in (YES if name in REJECTIONS else NO_WORDS if name in VOTES else NO)
        # A negative fraction may be a reward model's
        if name not in REJECTIONS and isinstance(word, int):
            rejected = rejected or word < 0
        if rejected:
            raise BadRowError(
                f"found {name!r}: {shown(value)}, the mark of a rejected reply, expected replies to"
                f" learn from (--unread_columns {name} takes them all the same)"
            )
