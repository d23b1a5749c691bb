"""Conversations -> rows of token ids and labels. The steps, in order:

    weigh_replies     loss_mask.py             which replies are trained
    ReasoningPieces   reasoning.py             a piece for each turn that reasons
    ChatEncoder       chat_encoder.py          ids, and the place of each reply
    Shortener         long_conversations.py    at most --max_length tokens
    masked_row        loss_mask.py             input_ids and labels

All conversations of a call are encoded together, which is faster.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder, EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.long_conversations import Fragment, Shortener
from minimind.data.loss_mask import masked_row, weigh_replies
from minimind.data.reasoning import ReasoningPieces


class Outcome(NamedTuple):
    """What became of one conversation or preference pair.

    `counts` says what happened to it, and `problem` why it was dropped, if it was. `lengths` are
    its tokens before any cut: [all], or of a pair [prompt, chosen, rejected].
    """

    rows: list[dict]
    counts: Counter
    lengths: list[int]
    problem: str | None = None


def tokenize_conversations(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    max_length: int | None = None,
    args: ChatArguments | None = None,
    roles: bool = False,
) -> list[Outcome | BadRowError]:
    """Return the rows of each conversation, of at most `max_length` tokens, or why it has none.

    Counted are `truncated` (turns left out), `split`, `dropped` (nothing fits), `untrained` (no
    reply is trained), `escaped` (its words contain control tokens) and `reasoning_rows` (divided
    into reasoning pieces).

    Args:
        roles: adds "roles" to the rows, the role whose message each token belongs to.
    """
    args = args or ChatArguments()
    shortener = Shortener(encoder, max_length, args.long_conversations, roles)
    results: list = []
    for conversation in conversations:
        try:
            weighted = weigh_replies(conversation, args)
            results.append(ReasoningPieces(weighted, encoder.keeps_reasoning))
        except BadRowError as problem:
            results.append(problem)

    # First round: encode the last pieces, which hold all turns
    last_pieces = [each.piece(-1) for each in results if isinstance(each, ReasoningPieces)]
    encoded = iter(encoder.encode(last_pieces, roles=roles))
    for index, pieces in enumerate(results):
        if isinstance(pieces, ReasoningPieces):
            result = next(encoded)
            is_bad = isinstance(result, BadRowError)
            results[index] = result if is_bad else _RowMaker(pieces, result, shortener, args)

    # Second round: encode the windows of the pieces before
    makers = [each for each in results if isinstance(each, _RowMaker)]
    windows = [window for maker in makers for window in maker.conversations()]
    encoded = iter(encoder.encode(windows, roles=roles))
    return [each.make(encoded) if isinstance(each, _RowMaker) else each for each in results]


class _RowMaker:
    """Makes the rows of one conversation whose last piece is encoded."""

    def __init__(self, pieces: ReasoningPieces, encoded: EncodedChat, shortener, args):
        self.pieces, self.encoded, self.shortener, self.args = pieces, encoded, shortener, args
        self.fragments, self.problem = shortener(pieces.piece(-1), encoded)
        self.windows = pieces.windows(encoded, self.fragments, shortener)

    def conversations(self) -> list[Conversation]:
        """Return the windows of the pieces before the last, which `make` expects encoded."""
        windows = enumerate(self.windows)
        return [self.pieces.piece(number, window) for number, window in windows if window]

    def make(self, encoded: Iterator[EncodedChat | BadRowError]) -> Outcome | BadRowError:
        """Return the rows; takes the results of `conversations` from `encoded`."""
        results = [next(encoded) if window else None for window in self.windows]
        if bad := [result for result in results if isinstance(result, BadRowError)]:
            return bad[0]

        # What is used of each piece
        counts, parts = Counter(), []
        for number, (window, result) in enumerate(zip(self.windows, results, strict=True)):
            used = []
            if window:
                used, _ = self.shortener(self.pieces.piece(number, window), result)
                parts += used
            # Nothing is trained in the fragments before a window, but they are not lost either
            before = [part for part in self.fragments if window and 0 < part.last <= window[0]]
            self._count_cuts(counts, before + used, self.pieces.ends[number])
        self._count_cuts(counts, self.fragments, len(self.pieces.borders))
        parts += self.fragments
        if not parts:
            return Outcome([], Counter(dropped=1), [len(self.encoded.ids)], self.problem)

        rows = [masked_row(part.conversation, part.encoded, self.args) for part in parts]
        rows = [row for row in rows if row]
        counts["untrained"] = int(not rows)
        counts["escaped"] = int(self._has_escaped())
        counts["reasoning_rows"] = int(bool(self.windows))
        return Outcome(rows, +counts, [len(self.encoded.ids)])

    def _count_cuts(self, counts: Counter, parts: Sequence[Fragment], end: int) -> None:
        """Count whether the turns before `end` are split or truncated."""
        counts["split"] |= len(parts) > 1
        replies = sum(len(part.encoded.replies) for part in parts)
        counts["truncated"] |= replies < self.pieces.replies[end]

    def _has_escaped(self) -> bool:
        """Return whether control tokens became plain text, in the last piece or in reasoning that
        it does not show."""
        messages = self.pieces.conversation.messages if self.windows else ()
        thoughts = (message.get("reasoning_content", "") for message in messages)
        return self.encoded.escaped > 0 or any(map(self.shortener.encoder.pattern.search, thoughts))
