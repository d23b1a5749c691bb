"""What is used of a conversation longer than a row."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from minimind.data.chat_encoder import ChatEncoder, EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.files import BadRowError
from minimind.data.messages import Message

BORDER = 8  # tokens that a template may write between two turns and leaves out before the first


class TooLongError(BadRowError):
    """Nothing of a conversation or pair fits."""


class Part(NamedTuple):
    """A conversation that fits into a row, and which turns of a longer one it was split off from
    (exclusive)."""

    conversation: Conversation
    encoded: EncodedChat
    first: int = 0
    last: int = 0


def turns(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where each turn starts and ends (exclusive): a question and all until the next one."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return list(zip(starts, [*starts[1:], len(messages)], strict=True))


def tokens_until(messages: Sequence[Message], encoded: EncodedChat) -> list[int]:
    """Turn -> tokens before it (from the second on those of the system prompt too), and of all
    turns at last."""
    # Message -> replies before it
    replies = [0, *accumulate(message["role"] == "assistant" for message in messages)]
    return [0, *(encoded.replies[replies[end] - 1][1] for _, end in turns(messages))]


def shorten(
    encoder: ChatEncoder,
    long: Conversation,
    encoded: EncodedChat,
    max_length: int,
    policy: str,
    roles: bool,
) -> list[Part]:
    """What of a conversation longer than `max_length` is used, cut between turns; raises
    TooLongError for nothing."""
    head = long.messages[:1] if long.messages[0]["role"] == "system" else []
    borders = turns(long.messages)
    at = [index for index, message in enumerate(long.messages) if message["role"] == "assistant"]
    # Message -> tokens up to its end
    ends = dict(zip(at, (end for _, end in encoded.replies), strict=True))
    until = tokens_until(long.messages, encoded)

    def fitting(start: int, end: int, first: int = 0, last: int = 0) -> Part | None:
        piece = long._replace(messages=[*(head if start else []), *long.messages[start:end]])
        (result,) = encoder.encode([piece], roles=roles)
        if isinstance(result, BadRowError):
            raise result
        nonlocal needed
        needed = len(result.ids)
        return Part(piece, result, first, last) if needed <= max_length else None

    needed, what = len(encoded.ids), "in the last turn with the system prompt"
    if policy == "drop":
        what = "in it"
    elif policy == "keep_first":
        for index in reversed(at):
            if ends[index] <= max_length and (found := fitting(0, index + 1)):
                return [found]
        needed, what = ends[at[0]], "up to the end of the first reply"
    elif policy == "keep_last":
        for turn in range(1, len(borders)):
            is_last = turn == len(borders) - 1
            if (is_last or until[-1] - until[turn] <= max_length + BORDER) and (
                found := fitting(borders[turn][0], len(long.messages))
            ):
                return [found]
    else:
        pieces, first = [], 0
        while first < len(borders):
            last = first + 1
            while last < len(borders) and until[last + 1] - until[first] <= max_length + BORDER:
                last += 1
            start = borders[first][0] if first else 0
            while last > first and not (found := fitting(start, borders[last - 1][1], first, last)):
                last -= 1
            pieces += [found] if last > first else []
            first = max(last, first + 1)
        if pieces:
            return pieces
    raise TooLongError(
        f"found {needed:,} tokens {what}, expected at most --max_length {max_length:,}"
    )
