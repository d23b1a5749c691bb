"""Conversations -> rows with labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder, EncodedChat
from minimind.data.conversations import Conversation
from minimind.data.files import BadRowError
from minimind.data.long_conversations import BORDER, Part, TooLongError, shorten, tokens_until
from minimind.data.loss_mask import to_row, with_weights
from minimind.data.messages import Message
from minimind.data.reasoning import Pieces


class Tokenized(NamedTuple):
    """Rows of one conversation or pair; `counts`: what became of it; `length`: tokens before any
    cut; `problem`: why it was dropped, if it was."""

    rows: list[dict]
    counts: Counter
    length: int
    problem: str | None = None


def tokenize_conversations(
    conversations: Sequence[Conversation],
    encoder: ChatEncoder,
    max_length: int | None = None,
    args: ChatArguments | None = None,
    roles: bool = False,
) -> list[Tokenized | BadRowError]:
    """Each conversation -> its rows of at most `max_length` tokens, or why it cannot be used.

    Args:
        roles: adds "roles" to the rows, the role whose message each token belongs to.

    Counted are `truncated` (turns left out), `split`, `dropped` (nothing fits), `untrained` (no
    reply is trained), `escaped` (control tokens stand in the words), `reasoning_rows` (given once
    for each turn that reasons).
    """
    args = args or ChatArguments()
    tried: list[Pieces | BadRowError] = []
    for conversation in conversations:
        try:
            tried.append(Pieces(with_weights(conversation, args), encoder.keeps_reasoning))
        except BadRowError as problem:
            tried.append(problem)
    whole = iter(
        encoder.encode([each.piece(-1) for each in tried if isinstance(each, Pieces)], roles=roles)
    )
    shortening = partial(_shortened, encoder=encoder, max_length=max_length, args=args, roles=roles)
    groups = []
    for each in tried:
        result = next(whole) if isinstance(each, Pieces) else each
        groups.append(
            result if isinstance(result, BadRowError) else _Group(each, result, shortening)
        )
    wanted = [piece for group in groups if isinstance(group, _Group) for piece in group.wanted()]
    encoded = iter(encoder.encode(wanted, roles=roles))
    return [group.tokenized(encoded) if isinstance(group, _Group) else group for group in groups]


def _shortened(
    conversation: Conversation, result: EncodedChat, encoder: ChatEncoder, max_length, args, roles
) -> tuple[list[Part], TooLongError | None]:
    """The parts of a conversation that fit, or why there is none."""
    if max_length is None or len(result.ids) <= max_length:
        return [Part(conversation, result)], None
    try:
        return (
            shorten(encoder, conversation, result, max_length, args.long_conversations, roles),
            None,
        )
    except TooLongError as error:
        return [], error


class _Group:
    """The pieces of one conversation on their way to rows; `whole` is the last of them, encoded."""

    def __init__(self, pieces: Pieces, whole: EncodedChat, shortening: partial):
        self.pieces, self.whole, self.shortening = pieces, whole, shortening
        self.pattern = shortening.keywords["encoder"].pattern
        self.last, self.problem = shortening(pieces.piece(-1), whole)
        max_length, policy = (
            shortening.keywords["max_length"],
            shortening.keywords["args"].long_conversations,
        )
        self.windows = [(0, end) for end in pieces.ends[:-1]]
        if max_length is not None and self.windows:
            until = tokens_until(pieces.plain, whole)
            split = [(part.first, part.last) for part in self.last]
            numbers = range(len(self.windows))
            self.windows = [
                pieces.window(n, until, policy, max_length + BORDER, split) for n in numbers
            ]

    def wanted(self) -> list[Conversation]:
        """What of the pieces before the last is to be encoded."""
        return [self.pieces.piece(n, *window) for n, window in enumerate(self.windows) if window]

    def tokenized(self, encoded: Iterator[EncodedChat | BadRowError]) -> Tokenized | BadRowError:
        """The rows; `encoded` goes on with what `wanted` became, all of which is taken."""
        results = [next(encoded) if window else None for window in self.windows]
        kept, counts = [], Counter(reasoning_rows=int(bool(results)))
        thoughts = [
            message.get("reasoning_content", "") for message in self.pieces.conversation.messages
        ]
        counts["escaped"] = int(
            self.whole.escaped > 0 or any(map(self.pattern.search, thoughts if results else ()))
        )
        for number, (window, result) in enumerate(zip(self.windows, results, strict=True)):
            if isinstance(result, BadRowError):
                return result
            parts = []
            if window:
                parts, _ = self.shortening(self.pieces.piece(number, *window), result)
            self._count(counts, [*self._before(window), *parts], self.pieces.ends[number])
            kept += parts
        self._count(counts, self.last, len(self.pieces.borders))
        kept += self.last
        if not kept:
            return Tokenized([], Counter(dropped=1), len(self.whole.ids), str(self.problem))
        args = self.shortening.keywords["args"]
        rows = [row for part in kept if (row := to_row(part.conversation, part.encoded, args))]
        counts["untrained"] = int(not rows)
        return Tokenized(rows, +counts, len(self.whole.ids))

    def _before(self, window: tuple[int, int] | None) -> list[Part]:
        """The parts of a piece before a window, as those of the last piece; nothing of them is
        trained."""
        return [part for part in self.last if window and part.last and part.last <= window[0]]

    def _count(self, counts: Counter, parts: list[Part], end: int) -> None:
        replies = self.pieces.replies[end]
        counts["split"] |= len(parts) > 1
        counts["truncated"] |= sum(len(part.encoded.replies) for part in parts) < replies


def tokenize_conversation(
    conversation: Conversation | Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None = None,
    args: ChatArguments | None = None,
    roles: bool = False,
) -> dict:
    """One conversation -> {"input_ids", "labels", "truncated"}; what is not trained has the label
    -100.

    Raises:
        BadRowError: it cannot be used, or gives no row or several (see `tokenize_conversations`).
        TooLongError: nothing of it fits.
    """
    if not isinstance(conversation, Conversation):
        conversation = Conversation(list(conversation))
    (result,) = tokenize_conversations(
        [conversation], ChatEncoder(tokenizer), max_length, args, roles
    )
    if isinstance(result, BadRowError):
        raise result
    if result.problem:
        raise TooLongError(result.problem)
    if len(result.rows) != 1:
        raise BadRowError(f"found {len(result.rows)} rows ({dict(result.counts)}), expected one")
    return {**result.rows[0], "truncated": bool(result.counts["truncated"])}
