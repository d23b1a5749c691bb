"""Documents -> packed rows in an Arrow file: tokenised in threads, packed and written in order."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa

from minimind.data.packing import PackedRows, is_target, packer

BATCH = 2**18  # characters that one thread tokenises at a time
AHEAD = 2**24  # characters that may wait to be written, unless one document has more


class BlockWriter:
    """Writes one Arrow file of rows, and counts what is in it.

    Args:
        encoder: texts -> their ids in one array, each text followed by EOS.
        pool, threads: the executor in which `encoder` runs, and how many threads it has.
        bytes_of: token id -> its bytes of UTF-8.
        options: block_size, packing_strategy and document_mask.
    """

    def __init__(
        self, path: Path, encoder: Callable, pool, threads: int, bytes_of: np.ndarray, options: dict
    ):
        self.encoder, self.pool, self.ahead = encoder, pool, 2 * threads
        self.block_size, self.document_mask = options["block_size"], options["document_mask"]
        self.packer = packer(options["packing_strategy"], self.block_size, encoder.eos_token_id)
        self.bytes_of = bytes_of
        self.texts: list[str] = []
        self.characters = self.waiting = 0
        self.pending: deque[tuple[int, Future]] = deque()
        self.counts = dict.fromkeys(("documents", "tokens", "blocks", "targets", "target_bytes"), 0)
        self.packed = 0  # tokens
        self.schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(encoder.dtype))})
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_stream(self.sink, self.schema)

    def add(self, text: str) -> None:
        """Take one document."""
        self.texts.append(text)
        self.characters += len(text)
        if self.characters >= BATCH:
            self._submit(self.ahead)

    def finish(self) -> dict[str, int]:
        """Write what is left, close the file and return the counts."""
        self._submit(ahead=0)
        self._write(self.packer.finish())
        self.writer.close()
        self.sink.close()
        padding = self.counts["blocks"] * self.block_size - self.packed
        dropped = self.counts["tokens"] - self.packed
        return {**self.counts, "padding": padding, "dropped_tokens": dropped}

    def _submit(self, ahead: int) -> None:
        """Have the texts tokenised, and write the oldest results until at most `ahead` are left."""
        if self.texts:
            self.counts["documents"] += len(self.texts)
            self.pending.append((self.characters, self.pool.submit(self.encoder, self.texts)))
            self.waiting += self.characters
            self.texts, self.characters = [], 0
        while self.pending and (len(self.pending) > ahead or self.waiting > AHEAD):
            characters, future = self.pending.popleft()
            self.waiting -= characters
            ids = future.result()
            self.counts["tokens"] += len(ids)
            self._write(self.packer.add(ids))

    def _write(self, rows: PackedRows) -> None:
        if not len(rows.lengths):
            return
        offsets = np.concatenate(([0], np.cumsum(rows.lengths))).astype(np.int32)
        ids = rows.ids.astype(self.encoder.dtype, copy=False)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))
        self.writer.write_batch(pa.record_batch([column], schema=self.schema))
        targets = is_target(rows, self.document_mask, self.encoder.eos_token_id)
        self.counts["blocks"] += len(rows.lengths)
        self.counts["targets"] += int(targets.sum())
        self.counts["target_bytes"] += int(self.bytes_of[ids[targets]].sum())
        self.packed += len(ids)
