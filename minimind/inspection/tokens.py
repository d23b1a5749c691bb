"""Rows of token ids and labels, and what is read off them: roles, messages, replies, lengths."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.files import read_rows, to_document
from minimind.data.markers import Boundaries
from minimind.data.packing import IGNORED, best_fit
from minimind.tokenizer import BOS_TOKEN, text_bytes

HEADER = 12  # tokens at the start of a message among which its role must stand
ROLE = re.compile(rb"[A-Za-z_]+")
OTHER = "other"  # the role of what cannot be told
WINDOWS = (256, 512, 1024, 2048)
PERCENTILES = (50, 90, 95, 99, 100)
BINS = 16  # of the length histogram
BATCH = 8  # rows padded to the longest of them, where padding is estimated
NO_TEXT = b"\xff"  # stands for a special token among bytes of text; UTF-8 has no such byte


class Tokens:
    """Rows of tokens as flat arrays: row r is `ids[starts[r]:starts[r + 1]]`.

    Shapes: `ids`, `labels` (tokens,); `starts` (rows + 1,); `lengths` (rows,). `where` names the
    place of each row. Where the rows have a column of roles, `roles` (tokens,) are indices into
    `role_names`, otherwise None: whose each token is by the loader's account, for templates whose
    ids do not tell it.
    """

    def __init__(
        self, rows: Dataset | Sequence[Mapping[str, Any]], where: Sequence[str] | None = None
    ):
        columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
        self.ids, self.starts = _flat(rows, "input_ids")
        # Blocks have no labels: every token is trained.
        self.labels, starts = (
            _flat(rows, "labels") if "labels" in columns else (self.ids, self.starts)
        )
        if not np.array_equal(self.starts, starts):
            raise ValueError("a row's input_ids and labels differ in length")
        self.lengths = np.diff(self.starts)
        self.where = (
            list(where)
            if where is not None
            else [f"row {number}" for number in range(1, len(self) + 1)]
        )
        self.roles, self.role_names = None, []
        if "roles" in columns and isinstance(rows, Dataset):
            encoded = (
                pc.list_flatten(rows.with_format("arrow")[:]["roles"])
                .combine_chunks()
                .dictionary_encode()
            )
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
    """A column of lists -> all its values in one array, and where each list starts in it (and the
    last one ends)."""
    if isinstance(rows, Dataset):
        chunks = rows.with_format("arrow")[:][name].chunks
        lengths = np.concatenate(
            [[0], *(pc.list_value_length(chunk).to_numpy() for chunk in chunks)]
        )
        values = [chunk.flatten().to_numpy() for chunk in chunks]
        return np.concatenate(values).astype(np.int64), np.cumsum(lengths)
    starts = np.cumsum([0, *(len(row[name]) for row in rows)])
    return np.fromiter((value for row in rows for value in row[name]), np.int64, starts[-1]), starts


class Messages:
    """The messages of some rows, read off the ids; arrays of shape (messages,).

    `start` and `end` (exclusive) are positions in the flat arrays, `content` is the first position
    after the header, `stop` that of the end token (-1: there is none), `row` the row, `role` an
    index into `names`, `reply` whether the assistant says it.

    In ChatML the ids tell the role; what a user message calls <tool_response> is the tool's. Of
    another template the loader's roles are taken; without them all is "other", and each run of
    trained tokens is taken for a reply, so that at least its end can be judged.
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
            roles, header = (
                np.full(len(self.start), OTHER, object),
                np.zeros(len(self.start), np.int64),
            )
            if tokens.roles is not None:
                roles = np.array(tokens.role_names, object)[tokens.roles[self.start]]
        self.end = np.append(self.start[1:], len(ids))
        self.row = tokens.row_of(self.start)
        self.content = self.start + header
        # Where a header ends cannot be told: the words begin with the first that is trained
        if not self.is_chatml:
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
    """Where messages start -> their roles, "other" without a readable header, and the tokens of
    their headers."""
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

    # A template may have no header for tools and show what they answer as the user's words, in a
    # tag.
    mark = b"<tool_response>"
    texts = [
        piece or tokenizer.convert_ids_to_tokens(token).encode()
        for token, piece in enumerate(pieces)
    ]
    begins = np.array([mark.startswith(text) or text.startswith(mark) for text in texts])
    first = ids[np.minimum(start + size, len(ids) - 1)]
    for message in np.flatnonzero((roles == "user") & begins[first]):
        words = ids[start[message] + size[message] : end[message]][: len(mark)]
        if b"".join(texts[token] for token in words).startswith(mark):
            roles[message] = "tool"
    return roles, size


# The counts.


def count_roles(tokens: Tokens, messages: Messages) -> dict[str, dict]:
    """Role -> how many tokens of its messages (header and end token included) there are, and have a
    label."""
    role = messages.role[messages.of_token]
    size = len(messages.names)
    counts = zip(
        np.bincount(role, minlength=size),
        np.bincount(role[tokens.trained], minlength=size),
        strict=True,
    )
    return {
        str(name): {
            "tokens": int(total),
            "trained": int(trained),
            # The name that mask_report.json has had from its beginning
            "trained_tokens": int(trained),
            "trained_share": ratio(trained, total),
        }
        for name, (total, trained) in zip(messages.names, counts, strict=True)
    }


def ratio(part: int, whole: int) -> float:
    return round(int(part) / max(int(whole), 1), 4)


class Replies:
    """What is trained of each reply; arrays of shape (replies,).

    `trained` and `words` count tokens (the end token is no word). True where: `ended`, the end
    token is there; `end_trained`, it has a label; `whole`, all from the first word to the end has
    one; `border`, something has one that the template writes and the model never: the header, or
    what follows the end.
    """

    def __init__(self, tokens: Tokens, messages: Messages):
        chosen, before = messages.reply, tokens.trained_before
        start, content, end, stop = (
            positions[chosen]
            for positions in (messages.start, messages.content, messages.end, messages.stop)
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
    return round(
        1 - int(lengths.sum()) / max(int((padded.reshape(-1, BATCH).max(1) * in_batch).sum()), 1), 4
    )


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths -> {"50": the length that half of them do not exceed, ...}."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    return dict(zip(map(str, PERCENTILES), values, strict=True))


def describe_lengths(lengths: np.ndarray, of: str = "row") -> dict:
    """Rows' lengths in tokens -> percentiles, histogram, and what fits into windows of some sizes.

    `windows`: for the sizes that --max_length usually has and for each percentile, the share of
    rows and of tokens in rows that fit whole, the rows that best-fit packing makes of them, the
    share of padding in these, and in batches of 8 unpacked rows. `suggested_max_length` is the
    smallest multiple of 64 into which 99 % of the rows fit.
    """
    shares = percentiles(lengths)
    longest = shares["100"]
    # The last bin takes the tail: with even bins one long row would squeeze all others into the
    # first.
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
                "rows_share": ratio(len(fitting), len(lengths)),
                "tokens_share": ratio(tokens, lengths.sum()),
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


class Documents:
    """What `Messages` is for chats: the tokens of blocks are the documents' own, or the end tokens
    between them."""

    names = np.array(["document", "end"])
    role = np.array([0, 1])

    def __init__(self, tokens: Tokens, tokenizer: PreTrainedTokenizerFast):
        self.of_token = (tokens.ids == tokenizer.eos_token_id).astype(np.int64)


def document_lengths(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The tokens of each document, its end token included, as far as it lies in the blocks."""
    ends = np.flatnonzero(tokens.ids == tokenizer.eos_token_id) + 1
    edges = np.union1d(ends, [0, len(tokens.ids)])
    return np.diff(edges)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The strings of the tokens that are structure and no text, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


class Texts:
    """The documents in some files, read once more for what only the text tells."""

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        markers: str = "split",
        columns: Columns | None = None,
    ):
        self.bad, self.boundaries, self.columns = (
            BadRows("skip"),
            Boundaries(markers),
            columns or Columns(),
        )
        self.count = self.bytes = 0
        self.first: dict[int, str] = {}  # hash -> place
        self.copies, self.marked, self.split = [], [], []
        names = special_tokens(tokenizer)
        for row in read_rows(paths, self.bad, to_document, columns=self.columns):
            before = self.boundaries.rows.total()
            try:
                documents = self.boundaries.split(row.data)
            except BadRowError as problem:
                self.bad.add(row.where, str(problem))
                continue
            if self.boundaries.rows.total() > before:
                self.split.append(row.where)
            for document in documents:
                self._add(document, row.where)
                if any(name in document for name in names):
                    self.marked.append(row.where)

    def _add(self, document: str, where: str) -> None:
        raw = document.encode()
        self.count += 1
        self.bytes += len(raw)
        if (original := self.first.setdefault(xxhash.xxh3_128_intdigest(raw), where)) != where:
            self.copies.append((where, original))
