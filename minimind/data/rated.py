"""Rated replies (thumbs up, thumbs down) in the usual formats -> conversations whose last reply is
desirable or not, as KTO learns from (Ethayarajh et al., 2024, arXiv 2402.01306)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import Outcome, tokenize_conversations
from minimind.data.columns import Fields
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.marks import NO, REJECTIONS, VERDICTS, VOTES, YES
from minimind.data.packing import IGNORED
from minimind.data.preferences import to_preference

GOOD_WORDS = (
    *("chosen", "positive", "good", "desirable", "preferred", "like", "liked", "thumbs_up"),
    *("upvote", "accepted"),
)


class Rated(NamedTuple):
    """A conversation, and whether its last reply is desirable."""

    conversation: Conversation
    label: bool


def to_rated(data: Mapping) -> list[Rated]:
    """The rated conversation of a row: any chat format and a rating, in one of the columns of
    marks.py. A preference pair is two: its chosen and its rejected reply. Raises BadRowError."""
    row = Fields.of(data)
    if isinstance(row.get(row.find("rejected")), str | list | dict) and not is_rating(row):
        pair = to_preference(row)
        tools = pair.get("tools")
        return [
            Rated(Conversation(pair["prompt"] + pair[name], tools), name == "chosen")
            for name in ("chosen", "rejected")
        ]
    label = take_rating(row)
    conversation = to_conversation(row)
    if conversation.messages[-1]["role"] != "assistant":
        role = conversation.messages[-1]["role"]
        raise BadRowError(
            f"found a rated conversation that ends with the role {role!r}, expected the assistant's"
            " reply, which the rating is about"
        )
    return [Rated(conversation, label)]


def is_rating(row: Fields) -> bool:
    """Whether a row has a column that only ratings have."""
    return any(name in row for name in ("label", "kto_tag", "desirable", "is_desirable"))


def take_rating(row: Fields) -> bool:
    """Whether the columns of a row call its reply desirable, which they no longer have afterwards;
    raises BadRowError where they say nothing, or both."""
    found, unknown = {}, {}
    for name in (*VERDICTS, *REJECTIONS, *VOTES):
        value = row.get(name)
        if value is None or isinstance(value, list | dict):
            continue
        word = value.strip().lower().replace(" ", "_") if isinstance(value, str) else value
        if name in VOTES and isinstance(word, int) and not isinstance(word, bool) and word:
            word = word > 0
        good = word in (*YES, *GOOD_WORDS)
        if good or word in NO:
            found[name] = good != (name in REJECTIONS)
        else:
            unknown[name] = value
    if not found and unknown:
        name, value = next(iter(unknown.items()))
        raise BadRowError(
            f"found {name!r}: {shown(value)}, expected true or false, 1 or 0, or words such as"
            " 'thumbs_up' and 'thumbs_down'"
        )
    if not found:
        raise BadRowError(
            f"found keys {row.names}, expected a rating of the reply in 'label' (true or false), or"
            " 'chosen' and 'rejected' replies"
        )
    if len(set(found.values())) > 1:
        raise BadRowError(f"found ratings that contradict each other, in {', '.join(found)}")
    for name in found:
        row.take(name)
        del row.columns[name]
    return next(iter(found.values()))


def tokenize_rated(
    rows: Sequence[list[Rated]],
    encoder: ChatEncoder,
    max_length: int | None,
    args: ChatArguments,
    roles: bool = False,
) -> list[Outcome | BadRowError]:
    """What became of the rated conversations of each row: rows as in SFT, of which only the last
    reply has labels, and its "label". Counted are also the `desirable` and `undesirable` ones."""
    conversations = [each.conversation for rated in rows for each in rated]
    outcomes = iter(tokenize_conversations(conversations, encoder, max_length, args, roles))
    return [_joined(rated, outcomes) for rated in rows]


def _joined(rated: list[Rated], outcomes: Iterator) -> Outcome | BadRowError:
    found = [(each.label, next(outcomes)) for each in rated]
    rows, counts, lengths, problem = [], Counter(), [0], None
    for label, outcome in found:
        if isinstance(outcome, BadRowError):
            return outcome
        rows += [row | {"label": label} for row in outcome.rows]
        counts += outcome.counts
        counts["desirable" if label else "undesirable"] += len(outcome.rows)
        lengths, problem = max(lengths, outcome.lengths), problem or outcome.problem
    return Outcome(rows, +counts, lengths, problem)


def split_reply(row: dict[str, Any]) -> dict[str, list[int]]:
    """A row of `tokenize_rated` -> TRL's prompt_ids and completion_ids: what comes before the
    trained tokens, and these."""
    trained = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
    start, end = trained[0], trained[-1] + 1
    return {"prompt_ids": row["input_ids"][:start], "completion_ids": row["input_ids"][start:end]}
