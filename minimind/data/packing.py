"""Token streams -> rows of at most `block_size` tokens, and rows -> batches.

A stream is a flat array of complete documents, each ended by EOS. Raw text never tokenises to EOS,
so the documents in a row end where its EOS are, and nothing else has to be stored.

    wrapped     A A A EOS B B | B B B B EOS C | C ...       cut every block_size tokens; all full
    bfd_split   B B B B B B | B EOS C C C EOS | A A A EOS   cut only in documents that are longer
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from minimind.common.errors import UserError

# Tokens among which bfd_split looks for what fits; more would hardly fill the rows better
WINDOW = 2**22
IGNORED = -100
# Sizes that differ from batch to batch are rounded up to a multiple of this. On a CPU oneDNN keeps
# what it prepared for each of the last 1,024 shapes of a product in bf16, about 1 MB or more each.
SHAPE_STEP = 128
STRATEGIES = ("wrapped", "bfd_split")


class PackedRows(NamedTuple):
    """Rows one after the other: all `ids` (tokens,), and the `lengths` of the rows (rows,)."""

    ids: np.ndarray
    lengths: np.ndarray


NO_ROWS = PackedRows(np.empty(0, dtype=int), np.empty(0, dtype=int))


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
        """Return the rows that are full now; does not copy the stream where nothing is left over
        from the one before."""
        stream = stream if self.rest is None else np.concatenate((self.rest, stream))
        count = len(stream) // self.block_size
        cut = count * self.block_size
        self.rest = stream[cut:] if cut < len(stream) else None
        return PackedRows(stream[:cut], np.full(count, self.block_size))

    def finish(self) -> PackedRows:
        """Return no row."""
        return NO_ROWS


class BestFit:
    """Fill rows with complete documents by best-fit decreasing, WINDOW tokens at a time.

    A document longer than a row is cut into full rows and a rest; nothing is lost. TRL calls the
    same bfd_split.
    """

    def __init__(self, block_size: int, eos_token_id: int):
        self.block_size, self.eos_token_id = block_size, eos_token_id
        self.window: list[np.ndarray] = []
        self.size = 0

    def add(self, stream: np.ndarray) -> PackedRows:
        """Return the rows of a window, once it is complete."""
        self.window.append(stream)
        self.size += len(stream)
        return self.finish() if self.size >= WINDOW else NO_ROWS

    def finish(self) -> PackedRows:
        """Return the rows of everything that waits."""
        if not self.size:
            return NO_ROWS
        stream = np.concatenate(self.window)
        self.window, self.size = [], 0
        return _fill_rows(stream, self.block_size, self.eos_token_id)


def packer(strategy: str, block_size: int, eos_token_id: int) -> Wrapped | BestFit:
    """Return the packer of a `--packing_strategy`; raises UserError."""
    if strategy not in STRATEGIES:
        raise UserError(f"--packing_strategy {strategy}: expected one of {', '.join(STRATEGIES)}.")
    return Wrapped(block_size) if strategy == "wrapped" else BestFit(block_size, eos_token_id)


def _fill_rows(stream: np.ndarray, block_size: int, eos_token_id: int) -> PackedRows:
    """Cut the documents of a stream into pieces of at most a row, and fill rows with pieces."""
    # Where each document starts and ends, and how many pieces it has: all full but the last
    ends = np.flatnonzero(stream == eos_token_id) + 1
    starts = np.concatenate(([0], ends[:-1]))
    pieces = -(-(ends - starts) // block_size)

    # Where each piece starts, and its length
    cuts = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + cuts * block_size
    lengths = np.minimum(np.repeat(ends, pieces) - starts, block_size)

    # The pieces in the order of their rows, some at a time: an index takes eight times a token
    bins = best_fit(lengths, block_size)
    order = np.concatenate(bins)
    ids, done = np.empty(len(stream), dtype=stream.dtype), 0
    for some in np.array_split(order, len(stream) // WINDOW + 1):
        # The index in the stream of each of their tokens: the piece's start, and the place in it
        sizes = lengths[some]
        places = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids[done : done + len(places)] = stream[np.repeat(starts[some], sizes) + places]
        done += len(places)
    return PackedRows(ids, np.array([lengths[row].sum() for row in bins]))


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the items of each bin by best-fit decreasing; no length is above `capacity`.

    The free spaces are the bits of one number, so that the smallest one that fits is found at once.
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
    """Return which tokens of the rows are predicted, (tokens,).

    These are all but the first of a row, and with `document_mask` the first of a document.
    """
    target = np.ones(len(rows.ids), dtype=bool)
    target[np.cumsum(rows.lengths) - rows.lengths] = False
    if document_mask:
        target[1:] &= rows.ids[:-1] != eos_token_id
    return target


class BlockCollator:
    """Rows -> input_ids and labels, both (batch, longest row); the model shifts the labels itself.

    With `document_mask` also position_ids (batch, longest row) that restart with every document, by
    which the model keeps documents apart on every attention back-end. Then a document's first token
    has no label, as if the document were a row of its own.

        input_ids    A A EOS B B EOS pad      position_ids 0 1 2 0 1 2 0
        labels       A A EOS - B EOS -        (nothing predicts the first token of a row)
    """

    def __init__(self, pad_token_id: int, eos_token_id: int, document_mask: bool = False):
        self.pad_token_id, self.eos_token_id = pad_token_id, eos_token_id
        self.document_mask = document_mask

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        lengths = np.array([len(row["input_ids"]) for row in rows])
        used = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(used.shape, self.pad_token_id)
        input_ids[used] = np.concatenate([row["input_ids"] for row in rows])
        batch = {"input_ids": input_ids, "labels": np.where(used, input_ids, IGNORED)}
        if self.document_mask:
            starts = np.zeros_like(used)
            starts[:, 1:] = (input_ids[:, :-1] == self.eos_token_id) | ~used[:, 1:]
            batch["labels"][starts] = IGNORED
            columns = np.arange(used.shape[1])
            latest_start = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
            batch["position_ids"] = columns - latest_start
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def max_targets(labels: torch.Tensor) -> int:
    """The number of labels other than -100, rounded up to a multiple of `SHAPE_STEP`."""
    count = int((labels != IGNORED).sum())
    return min(-(-count // SHAPE_STEP) * SHAPE_STEP, labels.numel())


class PaddedCollator:
    """Rows of one conversation each (input_ids, labels) -> a batch with an attention_mask, for
    models with virtual tokens in front of each row, which take no position_ids.

    `embedded` is the number of those that peft adds to the labels itself, those of prompt tuning;
    loss_weights get as many zeros. Otherwise as `PackedCollator`; `max_targets` counts the first
    label too, which the last of the virtual tokens predicts.
    """

    def __init__(self, pad_token_id: int, multiple: int | None = None, embedded: int = 0):
        self.pad_token_id, self.multiple = pad_token_id, multiple or 1
        self.embedded = embedded

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | int]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = len(rows), -(-longest // self.multiple) * self.multiple
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "loss_weights": 0.0}
        batch = {name: torch.full(shape, fills[name]) for name in fills if name in rows[0]}
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            for name, values in batch.items():
                values[index, : len(row["input_ids"])] = torch.as_tensor(row.get(name, 1))
        if "loss_weights" in batch:
            batch["loss_weights"] = pad(batch["loss_weights"], (self.embedded, 0))
        return {**batch, "max_targets": max_targets(batch["labels"])}


class PackedCollator:
    """Rows of complete conversations (input_ids, labels, seq_lengths) -> a batch in which they
    cannot see each other.

    Position ids that restart keep them apart, on every attention back-end, without an attention
    mask. Identical to TRL's padding-free collator except: the rows stay rows, since one row of
    batch x length tokens would need a mask of that size squared. A row without seq_lengths is one
    conversation; loss_weights are kept where rows have them. Batches are as long as a `multiple`.
    `max_targets` is about the number of labels to predict: here it is known without waiting for a
    device.

        input_ids    a a a b b pad        position_ids 0 1 2 0 1 0
    """

    def __init__(self, pad_token_id: int, multiple: int | None = None):
        self.pad_token_id, self.multiple = pad_token_id, multiple or 1

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | int]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = len(rows), -(-longest // self.multiple) * self.multiple
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED, "loss_weights": 0.0}
        batch = {name: torch.full(shape, fills[name]) for name in fills if name in rows[0]}
        positions = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            used = len(row["input_ids"])
            for name, values in batch.items():
                values[index, :used] = torch.as_tensor(row[name])
            lengths = (*row.get("seq_lengths", [used]), shape[1] - used)
            positions[index] = torch.cat([torch.arange(length) for length in lengths])
        targets = max_targets(batch["labels"][:, 1:])
        return {**batch, "position_ids": positions, "max_targets": targets}
