"""What a run will train on, counted from the finished rows of token ids and labels.

Nothing here asks the chat template: roles are read off the ids, so that a wrong mask shows instead of explaining
itself. Whatever is worth a word is a *finding*, with a severity:

    error     a run with these options would learn something wrong, or would stop
    warning   it would run, and be worse for it
    info      good to know
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minimind.data.chat_encoder import set_chat_template
from minimind.data.chats import (
    ChatArguments,
    ChatRows,
    Reading,
    load_conversations,
    load_preferences,
    preference_labels,
)
from minimind.data.conversations import to_conversation
from minimind.data.documents import load_blocks
from minimind.data.files import BAD_ROW_SHARE, BadRowError, BadRows, read_rows, to_document
from minimind.data.mixing import parse_sources
from minimind.data.packing import IGNORED, best_fit
from minimind.data.preferences import to_preference
from minimind.errors import UserError
from minimind.tokenizer import BOS_TOKEN, text_bytes

SEVERITIES = ("error", "warning", "info")
PLACES = 5  # named in one finding
HEADER = 12  # tokens at the start of a message among which its role must stand
ROLE = re.compile(rb"[A-Za-z_]+")
OTHER = "other"  # the role of what cannot be told
WINDOWS = (256, 512, 1024, 2048)
PERCENTILES = (50, 90, 95, 99, 100)
BINS = 16  # of the length histogram
BATCH = 8  # rows padded to the longest of them, where padding is estimated
CUT_SHARE = 0.01  # of the rows: more than this cut and it is worth a warning
LOST_SHARE = 0.2  # of the rows: more than this and a run stops
LONGER_SHARE = 0.7  # of the pairs: where chosen is longer this often, length alone tells it from rejected
PARTS_SHARE = 0.1  # of the tokens: more than this parts of characters and the tokenizer does not fit
SHORT_REPLY = 2  # words (tokens without the end token) that make a reply at least worth a look
SEARCHED = 1 << 20  # tokens turned into text at a time
RECOGNISED = 20  # rows in which a stage is looked for
REPLIES = ("chosen", "rejected")  # the order of a pair's two rows
REASONS = (  # what a bad row's problem says, the name of the finding, and what to do
    ("found chosen equal to rejected", "identical_pairs", "They have no preference to learn. Remove them."),
    ("an empty reply", "empty_replies", "The model would learn to say nothing. Remove them."),
)
LEFT_OUT = {"bad_rows", "too_long_rows", "rows_without_trained_token", *(name for _, name, _ in REASONS)}
NO_TEXT = b"\xff"  # stands for a special token among bytes of text; UTF-8 has no such byte


class Tokens:
    """Rows of tokens as flat arrays: row r is `ids[starts[r]:starts[r + 1]]`.

    Shapes: `ids`, `labels` (tokens,); `starts` (rows + 1,); `lengths` (rows,). `where` names the place of each row.
    Where the rows have a column of roles, `roles` (tokens,) are indices into `role_names`, otherwise None: whose each
    token is by the loader's account, for templates whose ids do not tell it.
    """

    def __init__(self, rows: Dataset | Sequence[Mapping[str, Any]], where: Sequence[str] | None = None):
        columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
        self.ids, self.starts = _flat(rows, "input_ids")
        # Blocks have no labels: every token is trained.
        self.labels, starts = _flat(rows, "labels") if "labels" in columns else (self.ids, self.starts)
        if not np.array_equal(self.starts, starts):
            raise ValueError("a row's input_ids and labels differ in length")
        self.lengths = np.diff(self.starts)
        self.where = list(where) if where is not None else [f"row {number}" for number in range(1, len(self) + 1)]
        self.roles, self.role_names = None, []
        if "roles" in columns and isinstance(rows, Dataset):
            encoded = pc.list_flatten(rows.with_format("arrow")[:]["roles"]).combine_chunks().dictionary_encode()
            self.roles, self.role_names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def trained(self) -> np.ndarray:
        """Which tokens have a label: shape (tokens,), bool."""
        return self.labels != IGNORED

    @cached_property
    def trained_before(self) -> np.ndarray:
        """How many tokens before each position have a label: shape (tokens + 1,)."""
        return np.concatenate([[0], np.cumsum(self.trained)])

    def row_of(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the flat arrays -> their rows."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def places(self, rows: np.ndarray) -> list[str]:
        """Row numbers -> where these rows stand, each once."""
        return [self.where[row] for row in np.unique(rows)]

    @cached_property
    def hashes(self) -> list[int]:
        """A hash of each row's ids."""
        edges = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [xxhash.xxh3_128_intdigest(self.ids[start:end].tobytes()) for start, end in edges]


def _flat(rows: Dataset | Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists -> all its values in one array, and where each list starts in it (and the last one ends)."""
    if isinstance(rows, Dataset):
        chunks = rows.with_format("arrow")[:][name].chunks
        lengths = np.concatenate([[0], *(pc.list_value_length(chunk).to_numpy() for chunk in chunks)])
        values = [chunk.flatten().to_numpy() for chunk in chunks]
        return np.concatenate(values).astype(np.int64), np.cumsum(lengths)
    starts = np.cumsum([0, *(len(row[name]) for row in rows)])
    return np.fromiter((value for row in rows for value in row[name]), np.int64, starts[-1]), starts


class Messages:
    """The messages of some rows, read off the ids; arrays of shape (messages,).

    `start` and `end` (exclusive) are positions in the flat arrays, `content` is the first position after the header,
    `stop` that of the end token (-1: there is none), `row` the row, `role` an index into `names`, `reply` whether the
    assistant says it.

    In ChatML the ids tell the role; what a user message calls <tool_response> is the tool's. Of another template the
    loader's roles are taken; without them all is "other", and each run of trained tokens is taken for a reply, so that
    at least its end can be judged.
    """

    def __init__(self, tokens: Tokens, tokenizer: PreTrainedTokenizerFast):
        ids = tokens.ids
        opens = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(BOS_TOKEN))
        row_starts = tokens.starts[:-1][tokens.lengths > 0]
        self.start = np.union1d(row_starts, opens)
        roles, header = _read_headers(ids, self.start, tokenizer)
        self.is_chatml = 2 * int((roles != OTHER).sum()) > len(opens)
        if not self.is_chatml:
            key = tokens.trained if tokens.roles is None else tokens.roles
            self.start = np.union1d(row_starts, np.flatnonzero(key[1:] != key[:-1]) + 1)
            roles, header = np.full(len(self.start), OTHER, object), np.zeros(len(self.start), np.int64)
            if tokens.roles is not None:
                roles = np.array(tokens.role_names, object)[tokens.roles[self.start]]
        self.end = np.append(self.start[1:], len(ids))
        self.row = tokens.row_of(self.start)
        self.content = self.start + header
        if not self.is_chatml:  # where a header ends cannot be told: the words begin with the first that is trained
            trained = np.append(np.flatnonzero(tokens.trained), len(ids))
            first = trained[np.searchsorted(trained, self.start)]
            self.content = np.where(first < self.end, first, self.start)
        self.names, self.role = np.unique(roles.astype(str), return_inverse=True)
        self.reply = roles == "assistant"
        if not self.is_chatml and tokens.roles is None:
            self.reply = tokens.trained[self.start]
        ends = np.append(np.flatnonzero(ids == tokenizer.eos_token_id), len(ids))
        following = ends[np.searchsorted(ends, self.content)]
        self.stop = np.where(following < self.end, following, -1)

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def of_token(self) -> np.ndarray:
        """The message of each token: shape (tokens,)."""
        return np.repeat(np.arange(len(self)), self.end - self.start)


def _read_headers(ids: np.ndarray, start: np.ndarray, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Where messages start -> their roles, "other" without a readable header, and the tokens of their headers."""
    pieces = text_bytes(tokenizer)
    end = np.append(start[1:], len(ids))
    window = start[:, None] + np.arange(HEADER)
    inside = window < end[:, None]
    header = np.where(inside, ids[np.minimum(window, len(ids) - 1)], -1)
    ends_line = np.array([b"\n" in piece for piece in pieces])[header] & inside
    last = ends_line.argmax(1)
    header[(np.arange(HEADER) > last[:, None]) | ~ends_line.any(1)[:, None]] = -1
    different, which = np.unique(header, axis=0, return_inverse=True)
    start_id, names = tokenizer.convert_tokens_to_ids(BOS_TOKEN), []
    for row in different.tolist():
        first, *others = [token for token in row if token >= 0] or [-1]
        text = b"".join(pieces[token] or NO_TEXT for token in others).split(b"\n")[0]
        names.append(text.decode() if first == start_id and ROLE.fullmatch(text) else OTHER)
    roles = np.array(names, object)[which.reshape(-1)]
    size = np.where(roles == OTHER, 0, last + 1)

    # A template may have no header for tools and show what they answer as the user's words, in a tag.
    mark = b"<tool_response>"
    texts = [piece or tokenizer.convert_ids_to_tokens(token).encode() for token, piece in enumerate(pieces)]
    begins = np.array([mark.startswith(text) or text.startswith(mark) for text in texts])
    first = ids[np.minimum(start + size, len(ids) - 1)]
    for message in np.flatnonzero((roles == "user") & begins[first]):
        words = ids[start[message] + size[message] : end[message]][: len(mark)]
        if b"".join(texts[token] for token in words).startswith(mark):
            roles[message] = "tool"
    return roles, size


# The counts.


def count_roles(tokens: Tokens, messages: Messages) -> dict[str, dict]:
    """Role -> how many tokens of its messages (header and end token included) there are, and have a label."""
    role = messages.role[messages.of_token]
    size = len(messages.names)
    counts = zip(np.bincount(role, minlength=size), np.bincount(role[tokens.trained], minlength=size), strict=True)
    return {
        str(name): {
            "tokens": int(total),
            "trained": int(trained),
            "trained_tokens": int(trained),  # the name that mask_report.json has had from its beginning
            "trained_share": _share(trained, total),
        }
        for name, (total, trained) in zip(messages.names, counts, strict=True)
    }


def _share(part: int, whole: int) -> float:
    return round(int(part) / max(int(whole), 1), 4)


class Replies:
    """What is trained of each reply; arrays of shape (replies,).

    `trained` and `words` count tokens (the end token is no word). True where: `ended`, the end token is there;
    `end_trained`, it has a label; `whole`, all from the first word to the end has one; `border`, something has one
    that the template writes and the model never: the header, or what follows the end.
    """

    def __init__(self, tokens: Tokens, messages: Messages):
        chosen, before = messages.reply, tokens.trained_before
        start, content, end, stop = (
            positions[chosen] for positions in (messages.start, messages.content, messages.end, messages.stop)
        )
        last = np.where(stop >= 0, stop, end - 1)
        self.row = messages.row[chosen]
        self.ended = stop >= 0
        self.words = np.maximum(last - content + ~self.ended, 0)
        self.trained = before[end] - before[start]
        self.end_trained = self.ended & tokens.trained[stop]
        self.whole = before[last + 1] - before[content] == last + 1 - content
        self.border = (before[content] > before[start]) | (before[end] > before[last + 1])


def padding_share(lengths: np.ndarray) -> float:
    """The share of padding where random batches of 8 rows are padded to their longest."""
    shuffled = np.random.default_rng(0).permutation(lengths)
    padded = np.zeros(-(-len(lengths) // BATCH) * BATCH, np.int64)
    padded[: len(shuffled)] = shuffled
    in_batch = np.minimum(BATCH, len(lengths) - BATCH * np.arange(len(padded) // BATCH))
    return round(1 - int(lengths.sum()) / max(int((padded.reshape(-1, BATCH).max(1) * in_batch).sum()), 1), 4)


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths -> {"50": the length that half of them do not exceed, ...}."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    return dict(zip(map(str, PERCENTILES), values, strict=True))


def describe_lengths(lengths: np.ndarray, of: str = "row") -> dict:
    """Rows' lengths in tokens -> percentiles, histogram, and what fits into windows of some sizes.

    `windows`: for the sizes that --max_length usually has and for each percentile, the share of rows and of tokens in
    rows that fit whole, the rows that best-fit packing makes of them, the share of padding in these, and in batches
    of 8 unpacked rows. `suggested_max_length` is the smallest multiple of 64 into which 99 % of the rows fit.
    """
    shares = percentiles(lengths)
    longest = shares["100"]
    # The last bin takes the tail: with even bins one long row would squeeze all others into the first.
    width = max(-(-shares["99"] // (BINS - 1)), 1)
    edges = [*range(0, longest, width)][:BINS]
    counts = np.histogram(lengths, [*edges, longest + 1])[0]
    windows = []
    for size in sorted({*WINDOWS, *shares.values()}):
        fitting = lengths[lengths <= size]
        tokens, packed = int(fitting.sum()), len(best_fit(fitting, size))
        windows.append(
            {
                "max_length": size,
                "rows_share": _share(len(fitting), len(lengths)),
                "tokens_share": _share(tokens, lengths.sum()),
                "packed_rows": packed,
                "packed_padding": round(1 - tokens / max(packed * size, 1), 4),
                "unpacked_padding": padding_share(fitting),
            }
        )
    return {
        "of": of,
        "mean": round(float(lengths.mean()), 1),
        "percentiles": shares,
        "histogram": {"edges": [*edges, longest], "counts": counts.tolist()},
        "windows": windows,
        "suggested_max_length": -(-shares["99"] // 64) * 64,
    }


# The findings.


class Findings(list):
    """Findings, the worst first when sorted; each {"name", "severity", "count", "text", "advice", "places"}."""

    def add(self, name: str, severity: str, count: int, text: str, advice: str, places: Iterable[str] = ()) -> None:
        """Append one, with the first few of its places; nothing if `count` is 0."""
        if count:
            finding = {"name": name, "severity": severity, "count": int(count), "text": text, "advice": advice}
            self.append({**finding, "places": list(islice(places, PLACES))})

    def in_order(self) -> list[dict]:
        """The worst first, otherwise as they were found."""
        return sorted(self, key=lambda finding: SEVERITIES.index(finding["severity"]))


def check_tokenizer(found: Findings, tokenizer: PreTrainedTokenizerFast) -> None:
    """Find what makes a tokenizer unfit for training."""
    if tokenizer.eos_token_id is None:
        text, advice = "the tokenizer has no end token (eos_token)", "Set one, or no reply can end."
        found.add("no_end_token", "error", 1, text, advice)
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        text = f"pad_token and eos_token are both {tokenizer.eos_token!r}"
        advice = "Give padding a token of its own: where padding is masked, the end of each reply would be too."
        found.add("padding_is_end_token", "error", 1, text, advice)


def check_mask(
    found: Findings, tokens: Tokens, messages: Messages, replies: Replies, tokenizer, every_reply: bool = True
) -> None:
    """Find wrong labels. `every_reply`: whether the options ask to train all replies (false for pairs too)."""
    trained, before = tokens.trained, tokens.trained_before
    tags = "Check the generation tags of the chat template."
    if not trained.any():
        found.add("nothing_trained", "error", len(tokens), "no token has a label: nothing would be learnt", tags)
        return
    per_row = before[tokens.starts[1:]] - before[tokens.starts[:-1]]
    empty = np.flatnonzero(per_row == 0)
    text = f"{len(empty):,} of {len(tokens):,} rows have no trained token"
    advice = "They cost time and teach nothing. Leave them out, or check their roles."
    found.add("rows_without_trained_token", "warning", len(empty), text, advice, tokens.places(empty))

    wrong = np.flatnonzero(trained & (tokens.labels != tokens.ids))
    text = f"{len(wrong):,} labels differ from the token at their own position"
    advice = "The model shifts the labels itself: a label is the token beside it, not the next one, or it is -100."
    found.add("labels_differ", "error", len(wrong), text, advice, tokens.places(tokens.row_of(wrong)))

    foreign = before[messages.end] - before[messages.start]
    foreign[messages.reply | (messages.names[messages.role] == OTHER)] = 0
    names = ", ".join(np.unique(messages.names[messages.role][foreign > 0]))
    text = f"{foreign.sum():,} tokens of {names} have a label; only the assistant's may"
    found.add("other_roles_trained", "error", foreign.sum(), text, tags, tokens.places(messages.row[foreign > 0]))

    learnt = replies.trained > 0
    missing = learnt & ~replies.end_trained
    places = tokens.places(replies.row[missing])
    if missing.all() or (learnt.any() and not replies.end_trained.any()):
        text = f"no reply's end token {tokenizer.eos_token!r} has a label: the model would never learn to stop"
        found.add("end_never_trained", "error", missing.sum(), text, tags, places)
    else:
        text = f"{missing.sum():,} of {learnt.sum():,} trained replies end without a trained {tokenizer.eos_token!r}"
        advice = "Cut conversations after a reply, not within, or the model learns to stop less often."
        found.add("end_not_trained", "warning", missing.sum(), text, advice, places)

    border = replies.border
    text = f"in {border.sum():,} of {learnt.sum():,} trained replies the header or what follows the end has a label"
    advice = f"The mask is shifted, or its tags are too wide: the template writes these tokens. {tags}"
    found.add("border_trained", "error", border.sum(), text, advice, tokens.places(replies.row[border]))
    partly = learnt & ~replies.whole & ~missing & ~border
    text = f"{partly.sum():,} of {learnt.sum():,} trained replies have words without a label"
    advice = (
        "Right where only a part is meant to be learnt (an answer without its reasoning); else check the template."
    )
    found.add("replies_partly_trained", "warning", partly.sum(), text, advice, tokens.places(replies.row[partly]))
    if every_reply:
        without = ~learnt & (per_row[replies.row] > 0)
        text = f"{without.sum():,} of {len(learnt):,} replies are context only"
        advice = "Right where the options or the rows choose the turns to train."
        found.add("replies_not_trained", "info", without.sum(), text, advice, tokens.places(replies.row[without]))


def check_replies(found: Findings, tokens: Tokens, replies: Replies) -> None:
    """Find replies that say nothing, or next to nothing."""
    learnt = replies.trained > 0
    empty, short = learnt & (replies.words == 0), learnt & (replies.words > 0) & (replies.words <= SHORT_REPLY)
    text = f"{empty.sum():,} trained replies have no word before their end token"
    advice = "The model would learn to say nothing. Remove them."
    found.add("empty_replies", "warning", empty.sum(), text, advice, tokens.places(replies.row[empty]))
    text = f"{short.sum():,} of {learnt.sum():,} trained replies are of {SHORT_REPLY} tokens at most"
    advice = "Look whether they are answers."
    found.add("short_replies", "info", short.sum(), text, advice, tokens.places(replies.row[short]))


def check_structure(found: Findings, tokens: Tokens, messages: Messages, tokenizer) -> None:
    """Find control tokens where no template puts them: a text that was taken for structure."""
    ids = tokens.ids
    if not messages.is_chatml:
        return
    of_token = messages.of_token
    stop = messages.stop[of_token]
    stray = (ids == tokenizer.eos_token_id) & (stop >= 0) & (np.arange(len(ids)) > stop)
    stray |= ids == (-1 if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) else tokenizer.pad_token_id)
    stray |= (messages.names[messages.role] == OTHER)[of_token]
    same = (messages.role[1:] == messages.role[:-1]) & (messages.row[1:] == messages.row[:-1])
    same &= np.isin(messages.names[messages.role[1:]], ("system", "user", "assistant"))
    rows = np.concatenate([tokens.row_of(np.flatnonzero(stray)), messages.row[1:][same]])
    count = len(np.unique(rows))
    text = f"in {count:,} rows control tokens stand where no template puts them, or a role speaks twice running"
    advice = (
        "Text was taken for control tokens: whoever wrote it chose the roles. Tokenise text without special tokens."
    )
    found.add("control_tokens_in_text", "error", count, text, advice, tokens.places(rows))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The strings of the tokens that are structure and no text, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


def search_text(tokens: Tokens, tokenizer: PreTrainedTokenizerFast, pattern: re.Pattern[bytes]) -> np.ndarray:
    """The positions of the tokens in whose text a match of `pattern` begins; no match spans special tokens."""
    pieces = [piece or NO_TEXT for piece in text_bytes(tokenizer)]
    sizes = np.array([len(piece) for piece in pieces])
    offsets, text = np.cumsum(sizes) - sizes, np.frombuffer(b"".join(pieces), np.uint8)
    found = []
    row = 0
    while row < len(tokens):  # whole rows at a time, so that the memory is bounded and no match is cut
        next_row = max(int(np.searchsorted(tokens.starts, tokens.starts[row] + SEARCHED)), row + 1)
        begin, end = tokens.starts[row], tokens.starts[min(next_row, len(tokens))]
        ids, row = tokens.ids[begin:end], next_row
        size = sizes[ids]
        starts = np.cumsum(size) - size
        index = np.repeat(offsets[ids] - starts, size) + np.arange(size.sum())
        matches = np.array([match.start() for match in pattern.finditer(text[index].tobytes())], np.int64)
        found.append(begin + np.searchsorted(starts, matches, side="right") - 1)
    return np.concatenate(found)


def check_text(found: Findings, tokens: Tokens, messages: Messages, tokenizer) -> None:
    """Find special tokens spelled out within text, by role."""
    names = [name.encode() for name in special_tokens(tokenizer)]
    positions = search_text(tokens, tokenizer, re.compile(b"|".join(map(re.escape, names))))
    roles = messages.names[messages.role[messages.of_token[positions]]]
    for role in np.unique(roles):
        rows = np.unique(tokens.row_of(positions[roles == role]))
        text = f"special tokens are spelled out in the {role} text of {len(rows):,} rows"
        advice = "They are tokenised as plain text and control nothing. Look whether the rows are attacks or mishaps."
        found.add("special_tokens_in_text", "warning", len(rows), text, advice, tokens.places(rows))
        found[-1]["role"] = str(role)


def check_copies(found: Findings, tokens: Tokens, held_out: Tokens | None, replies_per_row: int = 1) -> None:
    """Find rows (of pairs: two rows at a time) that occur more than once, or are held out and trained on."""

    def keys(part: Tokens) -> list[tuple[int, ...]]:
        return list(zip(*(part.hashes[start::replies_per_row] for start in range(replies_per_row)), strict=True))

    first: dict[tuple[int, ...], int] = {}
    copies, where = [], tokens.where[::replies_per_row]
    for number, key in enumerate(keys(tokens)):
        # A row that a mixture takes several times is no copy.
        if where[first.setdefault(key, number)] != where[number]:
            copies.append((number, first[key]))
    places = (f"{where[number]} (as {where[original]})" for number, original in copies)
    text = (
        f"{len(copies):,} of {len(where):,} rows ({_share(len(copies), len(where)):.1%}) are copies of an earlier one"
    )
    found.add("duplicate_rows", "warning", len(copies), text, "Remove them, or they weigh more than others.", places)
    if held_out is not None and len(held_out):
        both = [(number, first[key]) for number, key in enumerate(keys(held_out)) if key in first]
        held_where = held_out.where[::replies_per_row]
        places = (f"{held_where[number]} (as {where[original]})" for number, original in both)
        text = f"{len(both):,} of {len(held_where):,} held-out rows are trained on too"
        advice = "The held-out loss would flatter. Remove them from one side."
        found.add("held_out_rows_trained", "warning", len(both), text, advice, places)


def check_cuts(found: Findings, tokens: Tokens, lengths_before: np.ndarray, size: int = 1) -> tuple[int, int]:
    """Find conversations of which a part was cut off; returns how many there are and how many tokens they lost.

    `lengths_before` (rows,) are the lengths of the conversations that the rows are made of, those of one conversation
    next to each other; of pairs (`size` 2) that of the longer side.
    """
    lengths = tokens.lengths.reshape(-1, size).max(1)
    before, where = lengths_before[::size], np.array(tokens.where[::size], object)
    first = np.flatnonzero(np.append(True, where[1:] != where[:-1]))
    lost = np.maximum(before[first] - np.add.reduceat(lengths, first), 0)
    cut = int((lost > 0).sum())
    text = (
        f"{cut:,} of {len(first):,} rows ({_share(cut, len(first)):.1%}) were cut to --max_length, and with that "
        f"{lost.sum():,} tokens ({_share(lost.sum(), before[first].sum()):.1%}) lost"
    )
    severity = "warning" if _share(cut, len(first)) > CUT_SHARE else "info"
    found.add("truncated_rows", severity, cut, text, "Raise --max_length if they matter.", where[first[lost > 0]])
    return cut, int(lost.sum())


def check_left_out(found: Findings, reading: Reading, on_bad_rows: str | None) -> None:
    """Find rows that were read and are not trained on. `on_bad_rows` is the policy that a run has."""
    counts, total = reading.counts, sum(bad.total for bad in reading.bad)
    allowed = 0 if on_bad_rows == "error" else BAD_ROW_SHARE
    for bad in reading.bad:
        refused = bad.count > allowed * bad.total and on_bad_rows != "skip"
        stops = " A run would stop at them without --on_bad_rows skip." if refused else ""
        for count, problem, places in bad.reasons.values():
            name, advice = next((known[1:] for known in REASONS if known[0] in problem), ("bad_rows", "Mend them."))
            text = f"{count:,} of {bad.total:,} rows are left out: {'in the first ' * (count > 1)}{problem}"
            found.add(name, "error" if refused else "warning", count, text, advice + stops, places)
    long = counts["dropped"]
    reasons = [reason for bad in reading.too_long for reason in bad.reasons.values()]
    problem = next((problem for _, problem, _ in reasons), "")
    text = (
        f"{long:,} of {total:,} rows ({_share(long, total):.1%}) are left out: {'in the first ' * (long > 1)}{problem}"
    )
    advice = "Raise it, or shorten them."
    found.add("too_long_rows", "warning", long, text, advice, reading.places.get("dropped", ()))
    text = f"{counts['untrained']:,} of {total:,} rows have no reply to train and are left out"
    advice = "Their flags, weights or the options leave all of their replies out."
    places = reading.places.get("untrained", ())
    found.add("rows_without_trained_token", "warning", counts["untrained"], text, advice, places)
    text = f"{counts['split']:,} of {total:,} rows are longer than --max_length and split into several"
    found.add("split_rows", "info", counts["split"], text, "Nothing to do.", reading.places.get("split", ()))
    lost = sum(bad.count for bad in reading.bad) + counts["dropped"] + counts["untrained"]
    if lost > LOST_SHARE * total:
        text = f"{lost:,} of {total:,} rows ({_share(lost, total):.1%}) are left out"
        advice = (
            f"More than {LOST_SHARE:.0%} are a mistake more often than not. Their reasons are findings of their own."
        )
        found.add("rows_lost", "error", lost, text, advice)


def check_pairs(found: Findings, tokens: Tokens) -> None:
    """Find pairs that teach nothing, the opposite of others, or length. Rows are chosen, rejected, chosen, ..."""
    pairs = list(zip(tokens.hashes[::2], tokens.hashes[1::2], strict=True))
    where = tokens.where[::2]
    same = [place for place, (chosen, rejected) in zip(where, pairs, strict=True) if chosen == rejected]
    text = f"in {len(same):,} of {len(pairs):,} pairs chosen and rejected are the same tokens"
    advice = "They have no preference to learn. Remove them."
    found.add("identical_pairs", "warning", len(same), text, advice, same)
    known = set(pairs)
    opposite = [place for place, (a, b) in zip(where, pairs, strict=True) if a != b and (b, a) in known]
    text = f"{len(opposite):,} pairs stand in the data the other way round too"
    found.add("contradicting_pairs", "warning", len(opposite), text, "Keep one of each two.", opposite)
    trained = np.diff(tokens.trained_before[tokens.starts])
    chosen, rejected = trained[::2], trained[1::2]
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    share = max(longer, shorter) / max(longer + shorter, 1)
    if share > LONGER_SHARE and longer + shorter >= 20:
        text = (
            f"chosen is longer than rejected in {_share(longer, len(chosen)):.0%} of the pairs and shorter in "
            f"{_share(shorter, len(chosen)):.0%} (mean {chosen.mean():.0f} and {rejected.mean():.0f} tokens)"
        )
        advice = (
            "Length alone tells them apart: the model may learn to be long or short. Compare its replies' lengths."
        )
        found.add("length_bias", "warning", max(longer, shorter), text, advice)


# The report.


class Inspection:
    """Rows, what was read off them, and the report, a dict fit for JSON (docs/inspect.md names its fields)."""

    def __init__(self, stage: str, tokens: Tokens, messages: Messages, report: dict):
        self.stage, self.tokens, self.messages, self.report = stage, tokens, messages, report

    def row(self, number: int) -> dict:
        """One row as {"where", "input_ids", "labels"}; of pairs also "reply", which of the two it is."""
        span = slice(self.tokens.starts[number], self.tokens.starts[number + 1])
        reply = {"reply": REPLIES[number % 2]} if self.stage == "dpo" else {}
        ids, labels = (values[span].tolist() for values in (self.tokens.ids, self.tokens.labels))
        return {"where": self.tokens.where[number], **reply, "input_ids": ids, "labels": labels}

    def find(self, where: str) -> list[int]:
        """The rows at a place, "file:line", or the end of one, ":12"; raises UserError where there is none."""
        found = [number for number, place in enumerate(self.tokens.where) if place == where]
        found = found or [number for number, place in enumerate(self.tokens.where) if place.endswith(where)]
        if not found:
            known = f"{self.tokens.where[0]} to {self.tokens.where[-1]}"
            raise UserError(f"--row {where}: found no such row among {known}. It may be left out: see the findings.")
        return found

    def title(self, number: int) -> str:
        """The place of a row, and which reply of a pair it is."""
        return self.tokens.where[number] + (f" ({REPLIES[number % 2]})" if self.stage == "dpo" else "")

    def errors(self) -> list[dict]:
        """The findings that stop a run."""
        return [finding for finding in self.report["findings"] if finding["severity"] == "error"]

    def stop(self, on_findings: str) -> None:
        """Raises UserError if there are errors and they are not to be taken as warnings."""
        if on_findings != "error" or not (told := self.errors()):
            return
        if any(finding["name"] == "rows_lost" for finding in told):
            told += [f for f in self.report["findings"] if f["name"] in LEFT_OUT and f["severity"] != "error"]
        listed = "".join(
            f"\n  {finding['name']}: {finding['text']}. {finding['advice']}"
            + "".join(f"\n    {place}" for place in finding["places"])
            for finding in told
        )
        raise UserError(f"the inspection of the data found errors:{listed}\nTo train it still: --on_findings warn.")


def inspect_rows(
    stage: str,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerFast,
    *,
    found: Findings | None = None,
    held_out: Tokens | None = None,
    lengths_before: np.ndarray | None = None,
    lengths_read: np.ndarray | None = None,
    every_reply: bool = True,
) -> Inspection:
    """Finished rows of "sft", or of "dpo" (chosen, rejected, chosen, ...), -> their report.

    Args:
        found: what was found before.
        held_out: the held-out rows.
        lengths_before: see `check_cuts`.
        lengths_read: the lengths of all that was read, also of what was left out as too long.
        every_reply: whether the options ask to train all replies.
    """
    found = Findings() if found is None else found
    size = len(REPLIES) if stage == "dpo" else 1
    check_tokenizer(found, tokenizer)
    messages = Messages(tokens, tokenizer)
    replies = Replies(tokens, messages)
    check_mask(found, tokens, messages, replies, tokenizer, every_reply and stage == "sft")
    check_structure(found, tokens, messages, tokenizer)
    check_text(found, tokens, messages, tokenizer)
    check_replies(found, tokens, replies)
    cut, lost = check_cuts(found, tokens, tokens.lengths if lengths_before is None else lengths_before, size)
    check_copies(found, tokens, held_out, size)
    trained = np.diff(tokens.trained_before[tokens.starts])
    lengths = describe_lengths(
        tokens.lengths.reshape(-1, size).max(1) if lengths_read is None else lengths_read,
        "pair (its longer side)" if stage == "dpo" else "conversation",
    )
    if stage == "dpo":
        check_pairs(found, tokens)
        for start, name in enumerate(REPLIES):
            of_reply = trained[start::2]
            lengths[name] = {"mean": round(float(of_reply.mean()), 1), "percentiles": percentiles(of_reply)}
    report = {
        "stage": stage,
        "rows": len(tokens) // size,
        "rows_without_trained_token": int((trained == 0).sum()),
        "truncated_rows": cut,
        "truncated_tokens": lost,
        "replies": len(replies.row),
        "replies_trained": int((replies.trained > 0).sum()),
        "replies_with_end_trained": int(replies.end_trained.sum()),
        "tokens": len(tokens.ids),
        "trained_tokens": int(trained.sum()),
        "trained_share": _share(trained.sum(), len(tokens.ids)),
        "roles": count_roles(tokens, messages),
        "lengths": lengths,
        "findings": found.in_order(),
    }
    return Inspection(stage, tokens, messages, report)


def inspect_chats(
    stage: str, rows: ChatRows, tokenizer, on_bad_rows: str | None = None, every_reply: bool = True
) -> Inspection:
    """What `load_conversations` ("sft") or `load_preferences` ("dpo") gives -> its report, see `inspect_rows`."""
    size = len(REPLIES) if stage == "dpo" else 1

    def flat(part: Dataset, where: Sequence[str]) -> Tokens:
        return Tokens(preference_labels(part) if stage == "dpo" else part, np.repeat(where, size).tolist())

    found = Findings()
    check_left_out(found, rows.reading, on_bad_rows)
    return inspect_rows(
        stage,
        flat(rows.train, rows.where),
        tokenizer,
        found=found,
        held_out=rows.eval and flat(rows.eval, rows.reading.held_out),
        lengths_before=np.repeat(rows.lengths, size),
        lengths_read=np.array(rows.reading.lengths),
        every_reply=every_reply,
    )


def has_roles(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of the chat template's conversations tell the roles, so that no loader has to."""
    return BOS_TOKEN in tokenizer.chat_template


# Documents.


class Documents:
    """What `Messages` is for chats: the tokens of blocks are the documents' own, or the end tokens between them."""

    names = np.array(["document", "end"])
    role = np.array([0, 1])

    def __init__(self, tokens: Tokens, tokenizer: PreTrainedTokenizerFast):
        self.of_token = (tokens.ids == tokenizer.eos_token_id).astype(np.int64)


def document_lengths(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The tokens of each document, its end token included, as far as it lies in the blocks."""
    ends = np.flatnonzero(tokens.ids == tokenizer.eos_token_id) + 1
    edges = np.union1d(ends, [0, len(tokens.ids)])
    return np.diff(edges)


class Texts:
    """The documents in some files, read once more for what only the text tells."""

    def __init__(self, paths: Sequence[str], tokenizer: PreTrainedTokenizerFast):
        self.bad = BadRows("skip")
        self.count = self.bytes = 0
        self.first: dict[int, str] = {}  # hash -> place
        self.copies, self.marked = [], []
        names = special_tokens(tokenizer)
        for row in read_rows(paths, self.bad, to_document):
            raw = row.data.encode()
            self.count += 1
            self.bytes += len(raw)
            if (original := self.first.setdefault(xxhash.xxh3_128_intdigest(raw), row.where)) != row.where:
                self.copies.append((row.where, original))
            if any(name in row.data for name in names):
                self.marked.append(row.where)


def inspect_documents(
    blocks: Dataset, facts: dict, texts: Texts, tokenizer, held_out: Texts | None = None, found: Findings | None = None
) -> Inspection:
    """Blocks of `documents.load_blocks`, its counts of them and the texts they were made from -> their report."""
    found = Findings() if found is None else found
    check_tokenizer(found, tokenizer)
    tokens = Tokens(blocks, [f"block {number}" for number in range(1, len(blocks) + 1)])
    documents = Documents(tokens, tokenizer)
    ends = int(documents.of_token.sum())
    if ends < facts["documents"] - facts["dropped_tokens"]:  # at most each dropped token ended a document
        text = f"{facts['documents']:,} documents, but only {ends:,} end tokens between them"
        advice = f"Each document must be followed by {tokenizer.eos_token!r}, or the model learns to run on."
        found.add("documents_not_separated", "error", facts["documents"] - ends, text, advice)
    partial = np.array([not _is_text(piece) for piece in text_bytes(tokenizer)])
    parts = int(partial[tokens.ids].sum())
    if _share(parts, len(tokens.ids)) > PARTS_SHARE:
        text = f"{_share(parts, len(tokens.ids)):.1%} of the tokens are parts of a character"
        advice = "The tokenizer knows few of these characters: one trained on such text, or a larger one, takes fewer."
        found.add("split_characters", "warning", parts, text, advice)
    dropped = _share(facts["dropped_tokens"], facts["tokens"])
    text = f"{facts['dropped_tokens']:,} tokens ({dropped:.1%}) at the end do not fill a block"
    advice = "They are left out. With so little text, take a smaller --block_size."
    found.add("dropped_tail", "warning", facts["dropped_tokens"] if dropped > CUT_SHARE else 0, text, advice)
    copies = len(texts.copies)
    text = f"{copies:,} of {texts.count:,} documents ({_share(copies, texts.count):.1%}) are copies of an earlier one"
    places = (f"{where} (as {original})" for where, original in texts.copies)
    found.add("duplicate_rows", "warning", copies, text, "Remove them, or they weigh more than others.", places)
    if held_out:
        both = [(where, texts.first[digest]) for digest, where in held_out.first.items() if digest in texts.first]
        text = f"{len(both):,} of {held_out.count:,} held-out documents are trained on too"
        places = (f"{where} (as {original})" for where, original in both)
        advice = "The held-out loss would flatter. Remove them from one side."
        found.add("held_out_rows_trained", "warning", len(both), text, advice, places)
    text = f"special tokens are spelled out in {len(texts.marked):,} documents"
    advice = "They are tokenised as plain text and control nothing. Look whether the rows are attacks or mishaps."
    found.add("special_tokens_in_text", "warning", len(texts.marked), text, advice, texts.marked)
    trained = int(tokens.trained.sum())
    report = {
        "stage": "pretrain",
        "rows": len(tokens),
        "documents": facts["documents"],
        "bytes": texts.bytes,
        "bytes_per_token": round(texts.bytes / max(facts["tokens"] - facts["documents"], 1), 3),
        "end_tokens": ends,
        "dropped_tokens": facts["dropped_tokens"],
        "dropped_share": dropped,
        "partial_character_share": _share(parts, len(tokens.ids)),
        "tokens": len(tokens.ids),
        "trained_tokens": trained,
        "trained_share": _share(trained, len(tokens.ids)),
        "roles": count_roles(tokens, documents),
        "lengths": describe_lengths(document_lengths(tokens, tokenizer), of="document"),
        "findings": found.in_order(),
    }
    return Inspection("pretrain", tokens, documents, report)


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


# Files.


def recognise_stage(words: Sequence[str]) -> str:
    """What the first usable row of some files is for: "dpo", "sft" or "pretrain"; raises UserError."""
    converters = {"dpo": to_preference, "sft": to_conversation, "pretrain": to_document}
    problems: dict[str, str] = {}
    for row in islice(read_rows(data_paths(words), "skip"), RECOGNISED):
        for stage, convert in converters.items():
            try:
                convert(row.data)
            except BadRowError as problem:
                problems.setdefault(stage, f"{row.where}: {problem}")
            else:
                return stage
    found = "\n".join(f"  as {stage}: {problem}" for stage, problem in problems.items())
    raise UserError(
        f"the stage cannot be told from the first {RECOGNISED} rows:\n{found}\nMend them, or name the --stage."
    )


def data_paths(words: Sequence[str]) -> list[str]:
    """Words of `--train_files` -> the paths in them."""
    return [path for source in parse_sources(words) for path in source.paths]


def inspect_files(
    stage: str, data_args, tokenizer, max_length: int, chat_args: ChatArguments | None = None
) -> Inspection:
    """Files, read and tokenised as a run of the stage does it -> their report; bad rows are findings.

    Raises:
        UserError: as the stage's loader.
    """
    policy, data_args = data_args.on_bad_rows, dataclasses.replace(data_args, on_bad_rows="skip")
    if stage == "pretrain":
        texts = Texts(data_paths(data_args.train_files), tokenizer)
        held_out = Texts(data_args.eval_files, tokenizer) if data_args.eval_files else None
        found = Findings()
        reading = Reading()
        reading.bad.append(texts.bad)
        check_left_out(found, reading, policy)
        blocks = load_blocks(data_args, tokenizer, max_length)
        return inspect_documents(blocks.train, blocks.facts["train"], texts, tokenizer, held_out, found)
    chat_args = chat_args or ChatArguments()
    set_chat_template(tokenizer, chat_args.chat_template)
    if stage == "dpo":
        rows = load_preferences(data_args, tokenizer, max_length, chat_args)
    else:
        rows = load_conversations(data_args, tokenizer, max_length, chat_args, roles=not has_roles(tokenizer))
    return inspect_chats(stage, rows, tokenizer, policy, chat_args.train_turns == "all")
