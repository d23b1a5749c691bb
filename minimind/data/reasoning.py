"""Conversations that reason in several turns."""

from bisect import bisect_left, bisect_right
from itertools import accumulate

from minimind.data.conversations import Conversation
from minimind.data.long_conversations import turns


class Pieces:
    """For a template that leaves out the reasoning of earlier turns: one conversation for each turn
    that reasons.

    Each reply is trained once, after exactly the text that the model will see when it generates it.
    Only the last piece, which holds all turns, is encoded as a whole; of the others, just the turns
    that may become rows. With `whole` there is one piece.
    """

    def __init__(self, conversation: Conversation, whole: bool = False):
        self.conversation, messages = conversation, conversation.messages
        self.borders = turns(messages)
        counted = [
            sum(m["role"] == "assistant" for m in messages[start:end])
            for start, end in self.borders
        ]
        self.replies = [0, *accumulate(counted)]  # turn -> replies before it
        reasons = [
            any(m.get("reasoning_content") for m in messages[start:end])
            for start, end in self.borders
        ]
        several = any(reasons[:-1]) and not whole
        # Of pieces, in turns
        self.ends = [turn for turn, reasoned in enumerate(reasons, 1) if reasoned and several]
        if self.ends[-1:] != [len(self.borders)]:
            self.ends.append(len(self.borders))
        # The first turn of each that is not trained in the one before
        self.begins = [0, *self.ends[:-1]]
        self.plain = (
            [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
            if several
            else []
        )

    def piece(self, number: int, first: int = 0, last: int | None = None) -> Conversation:
        """A piece, or its turns from `first` to `last` (exclusive) after the system prompt."""
        end, messages = self.ends[number], self.conversation.messages
        if len(self.ends) == 1:
            return self.conversation
        last = last or end
        done, own = self.borders[self.begins[number]][0], self.borders[end - 1][0]
        head, start = self.borders[0][0], self.borders[first][0] if first else 0
        chosen = [*range(head if start else 0), *range(start, self.borders[last - 1][1])]
        kept = [messages[index] if index >= own else self.plain[index] for index in chosen]
        for place, index in enumerate(chosen):
            if index < done and kept[place]["role"] == "assistant":
                kept[place] = {**kept[place], "weight": 0.0}
        return self.conversation._replace(messages=kept)

    def window(
        self, number: int, until: list[int], policy: str, room: int, split: list
    ) -> tuple[int, int] | None:
        """The turns of a piece of which rows may be made, from and to; None where nothing to train
        is left of it.

        Args:
            until: turn -> tokens before it, in the last piece, whose turns have no reasoning but
            the last. room: what is longer than this does not fit. split: the turns of the parts
            into which the last piece was split.
        """
        end, begin = self.ends[number], self.begins[number]
        if until[end] <= room:
            return 0, end
        if policy == "keep_last":
            return min(bisect_left(until, until[end] - room), end - 1), end
        if policy == "keep_first":
            last = min(bisect_right(until, room), end)
            return (0, last) if last > begin else None
        if policy == "split":
            return next((first for first, last in split if first <= begin < last), begin), end
        return None
