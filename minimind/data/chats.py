"""Conversations and preference pairs -> token ids with a loss mask.

The mask is the template's: what stands between its generation tags (all that the assistant emits,
the end token included) is trained, nothing else. Only what the template itself writes becomes a
control token; the same characters in somebody's words are plain text.

    load_conversations, load_preferences     files -> rows for a trainer
    tokenize_conversation(s)                 -> {"input_ids", "labels"} and, if asked for, "roles" and "loss_weights"
    ChatEncoder                              -> ids, and where in them the assistant speaks; also prompts to answer
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.common.cache import Contents
from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated
from minimind.data.bad_rows import BadRows
from minimind.data.batching import batches
from minimind.data.chat_encoder import TEMPLATES, ChatEncoder, Encoded
from minimind.data.columns import Columns
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.documents import HoldOut
from minimind.data.files import read_rows
from minimind.data.markers import rendered_turn
from minimind.data.messages import Message
from minimind.data.mixing import mixture, parse_sources, rows_per_epoch
from minimind.data.packing import IGNORED
from minimind.data.preferences import to_preference
from minimind.data.sources import expand

BATCH = 1000  # conversations tokenised at a time
BORDER = 8  # tokens that a template may write between two turns and leaves out before the first
EXPECTED = 'expected its turns without markers, each as {"role", "content"} in "messages"'
CHOICES = {
    "long_conversations": ("keep_last", "keep_first", "split", "drop"),
    "train_turns": ("all", "last", "flags"),
    "loss_normalization": ("token", "conversation"),
}


@dataclass
class ChatArguments:
    """How conversations become rows."""

    chat_template: str | None = field(
        default=None,
        metadata={
            "help": (
                f"{', '.join(TEMPLATES)}, or a .jinja file. Default: the tokenizer's own (chatml)."
            )
        },
    )
    long_conversations: str = field(
        default="keep_last",
        metadata={
            "help": (
                "What of a conversation longer than --max_length is used. keep_last: system prompt"
                " and the last turns that fit; keep_first: the first replies that fit; split: all"
                " turns, as several rows, each with the system prompt; drop: nothing. Replies are"
                " never cut; a conversation of which no turn fits is dropped."
            )
        },
    )
    train_turns: str = field(
        default="all",
        metadata={
            "help": (
                "Which replies are trained. all; last: the last one of each conversation; flags:"
                " those with 'train': true or a 'weight' above 0. 'train': false and 'weight': 0"
                " are obeyed always."
            )
        },
    )
    loss_normalization: str = field(
        default="token",
        metadata={
            "help": (
                "token: each trained token of a step counts alike; conversation: each conversation"
                " does."
            )
        },
    )
    weighted_loss: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Multiply losses by the 'weight' of rows and messages; false: ignore it. Default:"
                " an error where a weight is other than 0 and 1."
            )
        },
    )

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"--{name} {getattr(self, name)}: expected one of {', '.join(choices)}"
                )

    @property
    def needs_weights(self) -> bool:
        """Whether tokens may count differently in the loss."""
        return bool(self.weighted_loss) or self.loss_normalization != "token"


class Reading:
    """What became of the conversations that were read for training, for the report of an
    inspection.

    `bad` are the bad rows of each source, `columns` what was read of its rows, and `too_long` those
    of which nothing fits; `lengths` the tokens of every conversation before any cut, also of one
    that is dropped; `counts` and `places` what became of how many, and where the first of them
    stand; `held_out` where the held-out rows do; `marker` the first of those that a chat template
    writes and that stand in the words ("rendered" in `counts`).
    """

    NAMED = 5

    def __init__(self):
        self.bad: list[BadRows] = []
        self.columns: list[Columns] = []
        self.too_long: list[BadRows] = []
        self.lengths: list[int] = []
        self.counts = Counter()
        self.places: dict[str, list[str]] = {}
        self.held_out: list[str] = []
        self.marker: str | None = None

    def add(self, where: str, result: "Tokenized", messages: Sequence[Message] = ()) -> None:
        """Note one conversation, or pair with all its `messages`."""
        self.lengths.append(result.length)
        marker = rendered_turn(message["content"] for message in messages)
        self.marker = self.marker or marker
        for name in [*result.counts, *(["rendered"] if marker else [])]:
            self.counts[name] += 1
            if self.counts[name] <= self.NAMED:
                self.places.setdefault(name, []).append(where)


class ChatRows(NamedTuple):
    """Rows for a trainer; `facts`: files, rows and what became of the conversations, of both parts.

    `where` names the place ("file:line") of each training row, `lengths` its conversation's tokens
    before any cut.
    """

    train: Dataset
    eval: Dataset | None
    facts: dict
    where: list[str]
    lengths: list[int]
    reading: Reading


class Tokenized(NamedTuple):
    """Rows of one conversation or pair; `counts`: what became of it; `length`: tokens before any
    cut; `problem`: why it was dropped, if it was."""

    rows: list[dict]
    counts: Counter
    length: int
    problem: str | None = None


class TooLongError(BadRowError):
    """Nothing of a conversation or pair fits."""


class Part(NamedTuple):
    """A conversation that fits into a row, and which turns of a longer one it was split off from
    (exclusive)."""

    conversation: Conversation
    encoded: Encoded
    first: int = 0
    last: int = 0


# What of a conversation is trained, and in which rows


def with_weights(conversation: Conversation, args: ChatArguments) -> Conversation:
    """The conversation with a "weight" for each reply, 0 for those that are not trained; raises
    BadRowError."""
    replies = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    given = [conversation.messages[index].get("weight") for index in replies] + [
        conversation.weight
    ]
    if args.weighted_loss is None and any(weight not in (None, 0, 1) for weight in given):
        raise BadRowError(
            f"found weights other than 0 and 1 ({', '.join(map(str, given))}). Say what they are:"
            " --weighted_loss true multiplies the losses by them, --weighted_loss false ignores"
            " them"
        )
    messages = list(conversation.messages)
    for index in replies:
        weight = messages[index].get("weight", 0.0 if args.train_turns == "flags" else 1.0)
        if args.train_turns == "last" and index != replies[-1]:
            weight = 0.0
        messages[index] = {
            **messages[index],
            "weight": weight if args.weighted_loss else float(weight > 0),
        }
    return conversation._replace(
        messages=messages, weight=conversation.weight if args.weighted_loss else 1.0
    )


def turns(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where each turn starts and ends (exclusive): a question and all until the next one."""
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return list(zip(starts, [*starts[1:], len(messages)], strict=True))


def tokens_until(messages: Sequence[Message], encoded: Encoded) -> list[int]:
    """Turn -> tokens before it (from the second on those of the system prompt too), and of all
    turns at last."""
    # Message -> replies before it
    replies = [0, *accumulate(message["role"] == "assistant" for message in messages)]
    return [0, *(encoded.replies[replies[end] - 1][1] for _, end in turns(messages))]


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


def shorten(
    encoder: ChatEncoder,
    long: Conversation,
    encoded: Encoded,
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


def to_row(conversation: Conversation, encoded: Encoded, args: ChatArguments) -> dict | None:
    """input_ids and labels (-100: not trained), with loss_weights where they may differ; None:
    nothing is trained.

    The weight of a token is (row weight) x (message weight), with --loss_normalization conversation
    divided by the row's sum of message weights.
    """
    weights = [
        message["weight"] for message in conversation.messages if message["role"] == "assistant"
    ]
    trained = [
        (start, end, weight)
        for (start, end), weight in zip(encoded.replies, weights, strict=True)
        if weight
    ]
    total = sum(weight * (end - start) for start, end, weight in trained)
    if not total * conversation.weight:
        return None
    labels = [IGNORED] * len(encoded.ids)
    for start, end, _ in trained:
        labels[start:end] = encoded.ids[start:end]
    row = {"input_ids": encoded.ids, "labels": labels}
    if args.needs_weights:
        scale = conversation.weight / (total if args.loss_normalization == "conversation" else 1.0)
        row["loss_weights"] = [0.0] * len(encoded.ids)
        for start, end, weight in trained:
            row["loss_weights"][start:end] = [weight * scale] * (end - start)
    if encoded.roles:
        row["roles"] = encoded.roles
    return row


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
    conversation: Conversation, result: Encoded, encoder: ChatEncoder, max_length, args, roles
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

    def __init__(self, pieces: Pieces, whole: Encoded, shortening: partial):
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

    def tokenized(self, encoded: Iterator[Encoded | BadRowError]) -> Tokenized | BadRowError:
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


# Preference pairs


def tokenize_preferences(
    pairs: Sequence[dict],
    encoder: ChatEncoder,
    max_length: int | None = None,
    args: ChatArguments | None = None,
) -> list[Tokenized | BadRowError]:
    """Each pair -> one row of prompt_ids, chosen_ids and rejected_ids, as TRL's trainer makes them,
    and of chosen_mask and rejected_mask, 1 where the assistant speaks; or why it cannot be used.

    A pair longer than `max_length` loses the oldest turns of its prompt (keep_last) or is left out
    (drop).
    """
    args = args or ChatArguments()
    results = []
    for pair in pairs:
        try:
            results.append(_tokenized_pair(pair, encoder, max_length, args))
        except BadRowError as problem:
            results.append(problem)
    return results


def _tokenized_pair(
    pair: dict, encoder: ChatEncoder, max_length: int | None, args: ChatArguments
) -> Tokenized:
    prompt, tools = pair["prompt"], pair.get("tools")
    starts, whole = [start for start, _ in turns(prompt)], None
    for turn, start in enumerate(starts):
        is_last = turn == len(starts) - 1
        if turn and not is_last and whole.length - whole.until[turn] > max_length + BORDER:
            continue
        head = [message for message in prompt[:start] if message["role"] == "system"]
        messages = head + prompt[start:] if turn else prompt
        found = _encoded_pair(Conversation(messages, tools), pair, encoder)
        whole = whole or found
        if max_length is None or found.length <= max_length:
            return Tokenized(
                [found.row],
                +Counter(truncated=int(turn > 0), escaped=int(found.escaped)),
                whole.length,
            )
        if args.long_conversations == "drop":
            break
    problem = (
        f"found {found.length:,} tokens of prompt and {found.longest} reply, expected at most"
        f" --max_length {max_length:,}"
    )
    return Tokenized([], Counter(dropped=1), whole.length, problem)


class _EncodedPair(NamedTuple):
    """A pair as a row; the tokens of its `longest` conversation, and of it before each turn of the
    prompt."""

    row: dict
    longest: str
    length: int
    until: list[int]
    escaped: bool


def _encoded_pair(prompt: Conversation, pair: dict, encoder: ChatEncoder) -> _EncodedPair:
    (start,) = encoder.encode([prompt], prompt=True)
    names = ("chosen", "rejected")
    wholes = encoder.encode(
        [prompt._replace(messages=prompt.messages + pair[name]) for name in names]
    )
    for result in (start, *wholes):
        if isinstance(result, BadRowError):
            raise result
    asked = sum(message["role"] == "assistant" for message in prompt.messages)
    row, lengths = {"prompt_ids": start.ids}, {}
    for name, whole in zip(names, wholes, strict=True):
        if list(whole.ids[: len(start.ids)]) != list(start.ids):
            raise BadRowError(
                f"the chat template renders the prompt differently before the {name} reply than"
                " alone"
            )
        mask = [0] * len(whole.ids)
        for begin, end in whole.replies[asked:]:
            mask[begin:end] = [1] * (end - begin)
        row |= {f"{name}_ids": whole.ids[len(start.ids) :], f"{name}_mask": mask[len(start.ids) :]}
        lengths[name] = len(whole.ids)
    longest = max(lengths, key=lengths.get)
    until = tokens_until([*prompt.messages, *pair[longest]], wholes[names.index(longest)])
    return _EncodedPair(
        row, longest, lengths[longest], until, any(whole.escaped for whole in wholes)
    )


def preference_labels(rows: Iterable[dict]) -> list[dict]:
    """Rows of `tokenize_preferences` -> one row of input_ids and labels for each reply."""
    labelled = []
    for row in rows:
        for name in ("chosen", "rejected"):
            reply = row[f"{name}_ids"]
            labels = [
                token if mask else IGNORED
                for token, mask in zip(reply, row[f"{name}_mask"], strict=True)
            ]
            ids = row["prompt_ids"] + reply
            labelled.append(
                {"input_ids": ids, "labels": [IGNORED] * len(row["prompt_ids"]) + labels}
            )
    return labelled


# Files


class _Unjudged(BadRows):
    """Bad rows of a reading whose rows may turn out bad later, when they are tokenised: `judge`
    comes after that."""

    total = 0

    def finish(self, total: int) -> None:
        self.total = total

    def judge(self) -> None:
        super().finish(self.total)


def load_conversations(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    args: ChatArguments | None = None,
    roles: bool = False,
    seed: int = 42,
) -> ChatRows:
    """Conversations in the files of `data_args` -> rows with input_ids, labels and, if needed,
    loss_weights and roles.

    Raises:
        UserError: bad rows, or none is left to train.
    """
    encoder = ChatEncoder(tokenizer)
    return _load(
        data_args,
        seed,
        to_conversation,
        lambda conversations: tokenize_conversations(
            conversations, encoder, max_length, args, roles
        ),
        lambda conversation: str(conversation.messages),
        lambda conversation: conversation.messages,
    )


def load_preferences(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    args: ChatArguments | None = None,
    seed: int = 42,
) -> ChatRows:
    """Preference pairs in the files of `data_args` -> the rows of `tokenize_preferences`; raises
    UserError."""
    args = args or ChatArguments()
    for name, choices in {
        "long_conversations": ("keep_last", "drop"),
        "train_turns": ("all",),
    }.items():
        if (given := getattr(args, name)) not in choices:
            raise UserError(
                f"--{name} {given}: expected {' or '.join(choices)} for preference pairs."
            )
    if args.needs_weights:
        raise UserError(
            "--weighted_loss and --loss_normalization: expected in finetune_sft.py only, not for"
            " pairs."
        )
    encoder = ChatEncoder(tokenizer)
    return _load(
        data_args,
        seed,
        to_preference,
        lambda pairs: tokenize_preferences(pairs, encoder, max_length, args),
        lambda pair: str(pair["prompt"]),
        lambda pair: pair["prompt"] + pair["chosen"] + pair["rejected"],
    )


def _load(
    data_args,
    seed: int,
    parse: Callable,
    tokenize: Callable,
    key: Callable,
    messages: Callable[[Any], list[Message]],
) -> ChatRows:
    def unrendered(data: dict) -> Any:
        try:
            return parse(data)
        except BadRowError:
            if marker := rendered_turn(value for value in data.values() if isinstance(value, str)):
                raise BadRowError(
                    f"found a chat that is rendered already, with {marker!r}, {EXPECTED}"
                ) from None
            raise

    def read(files, reading: Reading) -> Iterator[tuple[str, str, Tokenized]]:
        bad, too_long = _Unjudged(data_args.on_bad_rows), BadRows("skip")
        columns = data_args.reading()
        reading.bad.append(bad)
        reading.columns.append(columns)
        reading.too_long.append(too_long)
        found = read_rows(files, bad, unrendered, columns=columns)
        rows = tqdm(found, unit=" rows", desc=translated("tokenising"), disable=None)
        for batch in batches(
            rows, lambda row: sum(len(m["content"]) for m in messages(row.data)), BATCH
        ):
            for row, result in zip(batch, tokenize([row.data for row in batch]), strict=True):
                if isinstance(result, BadRowError):
                    bad.add(row.where, str(result))
                    continue
                if result.problem:
                    too_long.add(row.where, result.problem)
                reading.add(row.where, result, messages(row.data))
                yield key(row.data), row.where, result
        bad.judge()
        too_long.warn(bad.total)

    temperature, stopping = data_args.mixing_temperature, data_args.mixing_stop
    sources = parse_sources(data_args.train_files, temperature)
    files = [data_args.expand(source.paths) for source in sources]
    held_out_files = expand(data_args.eval_files) if data_args.eval_files else []
    hold_out = HoldOut(0.0 if held_out_files else data_args.eval_ratio, data_args.max_eval_rows)
    parts, held_out = [_Collected() for _ in sources], _Collected()
    everything = [path for paths in files for path in paths]
    contents, held_out_contents = Contents(everything), Contents(held_out_files)
    reading, apart = Reading(), Reading()
    for part, paths in zip(parts, files, strict=True):
        for text, where, result in read(paths, reading):
            for owner, *certain in hold_out.offer(text, (part, where, result)):
                owner.add(*certain)
    for _, where, result in hold_out.chosen():
        held_out.add(where, result)
    for number, (_, where, result) in enumerate(
        read(held_out_files, apart) if held_out_files else ()
    ):
        if number < data_args.max_eval_rows:  # and read on, since bad rows are judged at the end
            held_out.add(where, result)
    contents.check()
    held_out_contents.check()
    for part, paths in zip(parts, files, strict=True):
        if not part.where:
            raise UserError(
                f"{', '.join(map(str, paths))}: no row is left to train"
                f" ({part.counted() or 'all are held out'}). Raise --max_length, lower"
                " --eval_ratio, give more rows, or choose another --train_turns."
            )
    counted = [part.facts() for part in parts]
    train = concatenate_datasets([part.dataset() for part in parts])
    where, lengths = (
        [each for part in parts for each in getattr(part, name)] for name in ("where", "lengths")
    )
    sizes = [len(part.where) for part in parts]
    wanted = rows_per_epoch(sources, sizes, temperature, stopping)
    if wanted != sizes:
        chosen = mixture(sizes, wanted, seed)
        train, where, lengths = (
            train.select(chosen),
            [where[i] for i in chosen],
            [lengths[i] for i in chosen],
        )
    facts = {
        "train": {
            "files": list(map(str, everything)),
            "hash": contents.hash,
            **{
                name: sum(each.get(name, 0) for each in counted)
                for name in {n: None for each in counted for n in each}
            },
        },
        "eval": {
            "files": list(map(str, held_out_files)),
            "hash": held_out_contents.hash if held_out_files else None,
            **held_out.facts(),
        },
    }
    if len(sources) > 1:
        facts["train"]["rows_per_epoch"] = sum(wanted)
        facts["train"]["sources"] = [
            {"files": source.paths, **each, "rows_per_epoch": want}
            for source, each, want in zip(sources, counted, wanted, strict=True)
        ]
    reading.held_out = held_out.where
    return ChatRows(train, held_out.dataset(), facts, where, lengths, reading)


class _Collected:
    """Collects rows as Arrow tables, a list of Python integers taking many times the memory."""

    types = {"loss_weights": pa.list_(pa.float32()), "roles": pa.list_(pa.string())}  # noqa: RUF012

    def __init__(self):
        self.rows: list[dict] = []
        self.tables: list[pa.Table] = []
        self.where: list[str] = []
        self.lengths: list[int] = []
        self.counts = Counter()

    def add(self, where: str, result: Tokenized) -> None:
        self.rows += result.rows
        self.where += [where] * len(result.rows)
        self.lengths += [result.length] * len(result.rows)
        self.counts += result.counts
        if len(self.rows) >= BATCH:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            kind = {name: self.types.get(name, pa.list_(pa.int32())) for name in columns}
            self.tables.append(
                pa.table({name: pa.array(values, kind[name]) for name, values in columns.items()})
            )
            self.rows = []

    def counted(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())

    def facts(self) -> dict[str, int]:
        return {"rows": len(self.where), "truncated": 0, **self.counts}

    def dataset(self) -> Dataset | None:
        self.flush()
        return Dataset(pa.concat_tables(self.tables)) if self.tables else None
