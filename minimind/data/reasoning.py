"""Conversations that reason in several turns, for a template that shows only the newest reasoning.

The shipped template, like Qwen3's, leaves out the reasoning of a turn after the next question.
Each reply is trained once, after exactly the text that the model sees when it generates it. So each
turn with reasoning r ends a piece of its own, and what is trained in it (*) is not trained again:

    conversation   q1 (r1) a1    q2 a2    q3 (r3) a3    q4 a4
    piece 0        q1 (r1) a1*
    piece 1        q1 a1         q2 a2*   q3 (r3) a3*
    piece 2        q1 a1         q2 a2    q3 a3         q4 a4*
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from minimind.data.chat_encoder import EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.long_conversations import BORDER, Fragment, Shortener, tokens_before_turns, turns

Window = tuple[int, int]  # turns of a piece, from and to (exclusive)


class ReasoningPieces:
    """The pieces of one conversation; a single one with `undivided`, or without such reasoning.

    Only the last piece, which holds all turns, is encoded in full. Of the others, only the windows
    that may become rows are, so that the work grows with the turns and not with their square.
    """

    def __init__(self, conversation: Conversation, undivided: bool = False):
        self.conversation, messages = conversation, conversation.messages
        self.borders = turns(messages)
        groups = [messages[start:end] for start, end in self.borders]
        replies = (sum(m["role"] == "assistant" for m in group) for group in groups)
        self.replies = [0, *accumulate(replies)]  # before each turn, and of all
        reasons = [any(m.get("reasoning_content") for m in group) for group in groups]

        # The turn at which each piece ends, and the first that it trains
        is_divided = any(reasons[:-1]) and not undivided
        last = len(self.borders)
        self.ends = [turn for turn in range(1, last) if reasons[turn - 1] and is_divided] + [last]
        self.begins = [0, *self.ends[:-1]]

        # The messages as later turns show them
        self.plain = [
            {name: value for name, value in message.items() if name != "reasoning_content"}
            for message in (messages if is_divided else ())
        ]

    def piece(self, number: int, window: Window | None = None) -> Conversation:
        """Return a piece, or a window of it behind the system prompt."""
        if len(self.ends) == 1:
            return self.conversation
        end, messages = self.ends[number], self.conversation.messages
        first, last = window or (0, end)
        trained_before = self.borders[self.begins[number]][0]
        with_reasoning = self.borders[end - 1][0]
        head, start = self.borders[0][0], self.borders[first][0] if first else 0
        piece = []
        for index in [*range(head if start else 0), *range(start, self.borders[last - 1][1])]:
            message = messages[index] if index >= with_reasoning else self.plain[index]
            if index < trained_before and message["role"] == "assistant":
                message = {**message, "weight": 0.0}
            piece.append(message)
        return self.conversation._replace(messages=piece)

    def windows(
        self, encoded: EncodedChat, fragments: Sequence[Fragment], shortener: Shortener
    ) -> list[Window | None]:
        """Return the turns of each piece before the last that may become rows, None for none.

        Args:
            encoded, fragments: the last piece, and what is used of it. Its turns have no reasoning
                but the last, so they tell about how many tokens the windows have.
        """
        if shortener.max_length is None:
            return [(0, end) for end in self.ends[:-1]]
        until = tokens_before_turns(self.conversation.messages, encoded)
        room = shortener.max_length + BORDER
        windows: list[Window | None] = []
        for begin, end in zip(self.begins, self.ends[:-1], strict=False):
            window = None
            if until[end] <= room:
                window = 0, end
            elif shortener.policy == "keep_last":
                window = min(bisect_left(until, until[end] - room), end - 1), end
            elif shortener.policy == "keep_first":
                last = min(bisect_right(until, room), end)
                window = (0, last) if last > begin else None
            elif shortener.policy == "split":
                # From the start of the fragment in which the first trained turn is
                starts = (part.first for part in fragments if part.first <= begin < part.last)
                window = next(starts, begin), end
            windows.append(window)
        return windows
