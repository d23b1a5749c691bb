"""What is used of a conversation longer than a row: --long_conversations.

It is cut between messages, never within a reply. A turn is a question and all until the next one.

    keep_last    system               turn 3 turn 4
    keep_first   system turn 1 turn 2                   perhaps not all replies of its last turn
    split        system turn 1 turn 2 | system turn 3 turn 4
    drop         nothing
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.chat_encoder import ChatEncoder, EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.messages import Message

BORDER = 8  # tokens that a template may write between two turns but not before the first


class Fragment(NamedTuple):
    """A conversation that fits into a row; after a split, the turns `first` to `last` (exclusive)
    of the long one."""

    conversation: Conversation
    encoded: EncodedChat
    first: int = 0
    last: int = 0


def turns(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Return where each turn starts and ends (exclusive)."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return list(zip(starts, [*starts[1:], len(messages)], strict=True))


def tokens_before_turns(messages: Sequence[Message], encoded: EncodedChat) -> list[int]:
    """Return the tokens before each turn, and last those of all turns.

    From the second turn on they include the system prompt.
    """
    replies = [0, *accumulate(message["role"] == "assistant" for message in messages)]
    return [0, *(encoded.replies[replies[end] - 1][1] for _, end in turns(messages))]


@dataclass(frozen=True)
class Shortener:
    """Cuts conversations to at most `max_length` tokens (None: any number) by a policy."""

    encoder: ChatEncoder
    max_length: int | None
    policy: str
    roles: bool = False

    def __call__(self, long: Conversation, encoded: EncodedChat) -> tuple[list[Fragment], str]:
        """Return the fragments that fit, or none and the problem."""
        if self.max_length is None or len(encoded.ids) <= self.max_length:
            return [Fragment(long, encoded)], ""
        if self.policy == "drop":
            fragments, needed, what = [], len(encoded.ids), "in the conversation"
        elif self.policy == "keep_first":
            fragments, needed = self._keep_first(long, encoded)
            what = "up to the end of the first reply"
        else:
            cut = self._keep_last if self.policy == "keep_last" else self._split
            fragments, needed = cut(long, tokens_before_turns(long.messages, encoded))
            what = "in the last turn with the system prompt"
        limit = self.max_length
        problem = f"found {needed:,} tokens {what}, expected at most --max_length {limit:,}"
        return fragments, "" if fragments else problem

    def _keep_first(self, long: Conversation, encoded: EncodedChat) -> tuple[list[Fragment], int]:
        """Return the longest beginning that fits, or none and the tokens of the shortest."""
        indices = [i for i, message in enumerate(long.messages) if message["role"] == "assistant"]
        for index, (_, end) in reversed(list(zip(indices, encoded.replies, strict=True))):
            if end <= self.max_length and self._fits(part := self._cut(long, 0, index + 1)):
                return [part], end
        return [], encoded.replies[0][1]

    def _keep_last(self, long: Conversation, until: list[int]) -> tuple[list[Fragment], int]:
        """Return the most turns at the end that fit, or none and the tokens of the last turn."""
        starts, size = [start for start, _ in turns(long.messages)], until[-1]
        for turn, start in list(enumerate(starts))[1:]:
            if start == starts[-1] or self._may_fit(until[-1] - until[turn]):
                part = self._cut(long, start, len(long.messages))
                if self._fits(part):
                    return [part], size
                size = len(part.encoded.ids)
        return [], size

    def _split(self, long: Conversation, until: list[int]) -> tuple[list[Fragment], int]:
        """Return fragments of as many turns as fit, without turns that fit nowhere, and the tokens
        of the last that was tried."""
        borders, parts, first = turns(long.messages), [], 0
        while first < len(borders):
            last = first + 1
            while last < len(borders) and self._may_fit(until[last + 1] - until[first]):
                last += 1
            start = borders[first][0] if first else 0
            while last > first:
                part = self._cut(long, start, borders[last - 1][1], first, last)
                if self._fits(part):
                    parts.append(part)
                    break
                last -= 1
            first = max(last, first + 1)
        return parts, len(part.encoded.ids)

    def _may_fit(self, tokens: int) -> bool:
        return tokens <= self.max_length + BORDER

    def _fits(self, part: Fragment) -> bool:
        return len(part.encoded.ids) <= self.max_length

    def _cut(self, long: Conversation, start: int, end: int, first=0, last=0) -> Fragment:
        """Return the messages from `start` to `end` (exclusive) behind the system prompt, encoded;
        raises BadRowError."""
        head = long.messages[:1] if start and long.messages[0]["role"] == "system" else []
        conversation = long._replace(messages=[*head, *long.messages[start:end]])
        (encoded,) = self.encoder.encode([conversation], roles=self.roles)
        if isinstance(encoded, BadRowError):
            raise encoded
        return Fragment(conversation, encoded, first, last)
