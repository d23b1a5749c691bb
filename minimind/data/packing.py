"""Token streams -> rows of at most `block_size` tokens, and rows -> batches.

A stream is a flat array of whole documents, each ended by EOS. Raw text never tokenises to EOS, so
the borders of the documents in a row are where its EOS are, and nothing else has to be stored.

    wrapped     A A A EOS B B | B B B B EOS C | C ...         every row full; only the tail of the corpus is lost
    bfd_split   B B B B B B | B EOS C C C EOS | A A A EOS     a document is cut only if longer than a row
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from minimind.common.errors import UserError

# Tokens among which bfd_split looks for what fits; more would fill the rows hardly better
WINDOW = 2**22
IGNORED = -100
STRATEGIES = ("wrapped", "bfd_split")


class PackedRows(NamedTuple):
    """Rows one after the other: `ids` (tokens,) and how many of them each row has, `lengths`
    (rows,)."""

    ids: np.ndarray
    lengths: np.ndarray


class Wrapped:
    """Cut the joined streams every `block_size` tokens; the last partial row is lost.

    >>> packer = Wrapped(4)
    >>> [packer.add(np.array(stream)).ids.tolist() for stream in ([5, 6, 7, 2, 8, 2], [9, 9, 2])]
    [[5, 6, 7, 2], [8, 2, 9, 9]]
    """

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.rest: np.ndarray | None = None

    def add(self, stream: np.ndarray) -> PackedRows:
        """The rows that are full now; `stream` itself is not copied where nothing was left over."""
        stream = stream if self.rest is None else np.concatenate((self.rest, stream))
        count = len(stream) // self.block_size
        self.rest = stream[count * self.block_size :] if len(stream) % self.block_size else None
        return PackedRows(stream[: count * self.block_size], np.full(count, self.block_size))

    def finish(self) -> PackedRows:
        """No row."""
        return PackedRows(np.empty(0, dtype=int), np.empty(0, dtype=int))


class BestFit:
    """Fill rows with whole documents by best-fit decreasing, WINDOW tokens at a time; nothing is
    lost.

    A document longer than a row is cut into full rows and a rest. TRL has the same under the name
    bfd_split.
    """

    def __init__(self, block_size: int, eos_token_id: int):
        self.block_size, self.eos_token_id = block_size, eos_token_id
        self.window: list[np.ndarray] = []
        self.size = 0

    def add(self, stream: np.ndarray) -> PackedRows:
        """Rows of all that waits, once that is a window."""
        self.window.append(stream)
        self.size += len(stream)
        return (
            self.finish() if self.size >= WINDOW else PackedRows(stream[:0], np.empty(0, dtype=int))
        )

    def finish(self) -> PackedRows:
        """Rows of all that waits."""
        stream = np.concatenate(self.window) if self.window else np.empty(0, dtype=int)
        self.window, self.size = [], 0
        return (
            _fill(stream, self.block_size, self.eos_token_id)
            if len(stream)
            else PackedRows(stream, stream)
        )


def packer(strategy: str, block_size: int, eos_token_id: int) -> Wrapped | BestFit:
    """The packer of a `--packing_strategy`; raises UserError."""
    if strategy not in STRATEGIES:
        raise UserError(f"--packing_strategy {strategy}: expected one of {', '.join(STRATEGIES)}.")
    return Wrapped(block_size) if strategy == "wrapped" else BestFit(block_size, eos_token_id)


def _fill(stream: np.ndarray, block_size: int, eos_token_id: int) -> PackedRows:
    ends = np.flatnonzero(stream == eos_token_id) + 1
    starts = np.concatenate(([0], ends[:-1]))
    pieces = -(-(ends - starts) // block_size)  # pieces of each document, all full but the last
    cuts = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + cuts * block_size
    lengths = np.minimum(np.repeat(ends, pieces) - starts, block_size)
    bins = best_fit(lengths, block_size)
    order = np.concatenate(bins)
    ids, done = np.empty(len(stream), dtype=stream.dtype), 0
    for some in np.array_split(order, len(stream) // WINDOW + 1):  # an index is eight times a token
        # The index of every token in the stream, piece by piece: its piece's start, and its place
        # in the piece.
        sizes = lengths[some]
        places = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids[done : done + len(places)] = stream[np.repeat(starts[some], sizes) + places]
        done += len(places)
    return PackedRows(ids, np.array([lengths[row].sum() for row in bins]))


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the items of each bin. Each length is at most `capacity`.

    The set of free spaces is the bits of one number, so that the smallest space that fits is found
    at once.
    """
    bins: list[list[int]] = []
    open_bins: defaultdict[int, list[list[int]]] = defaultdict(list)
    spaces = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[space].pop()
            if not open_bins[space]:
                spaces &= ~(1 << space)
        else:
            space, chosen = capacity, []
            bins.append(chosen)
        chosen.append(item)
        if space > length:
            open_bins[space - length].append(chosen)
            spaces |= 1 << (space - length)
    return bins


def is_target(rows: PackedRows, document_mask: bool, eos_token_id: int) -> np.ndarray:
    """Which tokens of the rows are predicted, (tokens,): not the first of a row; with
    `document_mask` not the first of a document either."""
    target = np.ones(len(rows.ids), dtype=bool)
    target[np.cumsum(rows.lengths) - rows.lengths] = False
    if document_mask:
        target[1:] &= rows.ids[:-1] != eos_token_id
    return target


class BlockCollator:
    """PackedRows -> input_ids and labels, both (batch, longest row); the model shifts the labels itself.

    With `document_mask` also position_ids (batch, longest row) that restart with every document, by
    which the model keeps documents apart on every attention back-end. Then a document's first token
    has no label, as if the document were a row of its own.

        input_ids    A A EOS B B EOS pad      position_ids 0 1 2 0 1 2 0
        labels       A A EOS - B EOS -        (of a row's first token no model asks)
    """

    def __init__(self, pad_token_id: int, eos_token_id: int, document_mask: bool = False):
        self.pad_token_id, self.eos_token_id, self.document_mask = (
            pad_token_id,
            eos_token_id,
            document_mask,
        )

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(row["input_ids"]) for row in rows])
        used = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(used.shape, self.pad_token_id)
        input_ids[used] = np.concatenate([row["input_ids"] for row in rows])
        labels = np.where(used, input_ids, IGNORED)
        if not self.document_mask:
            return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        starts = np.zeros_like(used)
        starts[:, 1:] = (input_ids[:, :-1] == self.eos_token_id) | ~used[:, 1:]
        labels[starts] = IGNORED
        columns = np.arange(used.shape[1])
        position_ids = columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }


class PackedCollator:
    """Rows of whole conversations (input_ids, labels, seq_lengths) -> a batch in which they cannot
    see each other.

    Isolation comes from `position_ids` that restart, and from giving no attention mask; it holds on
    every attention back-end. Identical to TRL's padding-free collator except: the rows stay rows,
    since one row of batch x length tokens would need a mask of that size squared. A row without
    seq_lengths is one conversation; loss_weights, where rows have them, come along.

        input_ids    a a a b b pad        position_ids 0 1 2 0 1 0
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED}
        if "loss_weights" in rows[0]:
            fills["loss_weights"] = 0.0
        batch = {name: torch.full((len(rows), length), fill) for name, fill in fills.items()}
        batch["position_ids"] = torch.zeros((len(rows), length), dtype=torch.long)
        for index, row in enumerate(rows):
            used = len(row["input_ids"])
            for name in fills:
                batch[name][index, :used] = torch.as_tensor(row[name])
            lengths = row.get("seq_lengths", [used])
            batch["position_ids"][index] = torch.cat(
                [torch.arange(n) for n in (*lengths, length - used)]
            )
        return batch
