"""Documents -> packed rows in an Arrow file."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa

from minimind.data.packing import Rows, is_target, packer

BATCH = 2**18  # characters tokenised at a time by one thread
AHEAD = 2**24  # characters that may wait for it, unless one document has more


class BlockWriter:
    """An Arrow file in the making: documents are tokenised by the threads of `pool`, packed and
    written in order."""

    def __init__(
        self, path: Path, encoder: Callable, pool, threads: int, bytes_of: np.ndarray, options: dict
    ):
        self.encoder, self.pool, self.ahead = encoder, pool, 2 * threads
        self.packer = packer(
            options["packing_strategy"], options["block_size"], encoder.eos_token_id
        )
        self.block_size, self.document_mask, self.bytes_of = (
            options["block_size"],
            options["document_mask"],
            bytes_of,
        )
        self.texts: list[str] = []
        self.characters = self.waiting = 0
        self.pending: deque[tuple[int, Future]] = deque()
        self.counts = dict.fromkeys(("documents", "tokens", "blocks", "targets", "target_bytes"), 0)
        self.packed = 0
        self.schema = pa.schema({"input_ids": pa.list_(pa.from_numpy_dtype(encoder.dtype))})
        self.sink = pa.OSFile(str(path), "wb")
        self.writer = pa.ipc.new_stream(self.sink, self.schema)

    def add(self, text: str) -> None:
        """Take one document."""
        self.texts.append(text)
        self.characters += len(text)
        if self.characters >= BATCH:
            self._submit()

    def finish(self) -> dict:
        """Write what is left and close the file; returns the counts."""
        self._submit(ahead=0)
        self._write(self.packer.finish())
        self.writer.close()
        self.sink.close()
        padding = self.counts["blocks"] * self.block_size - self.packed
        return {
            **self.counts,
            "padding": padding,
            "dropped_tokens": self.counts["tokens"] - self.packed,
        }

    def _submit(self, ahead: int | None = None) -> None:
        if self.texts:
            self.counts["documents"] += len(self.texts)
            self.pending.append((self.characters, self.pool.submit(self.encoder, self.texts)))
            self.waiting += self.characters
            self.texts, self.characters = [], 0
        while self.pending and (
            len(self.pending) > (self.ahead if ahead is None else ahead) or self.waiting > AHEAD
        ):
            characters, future = self.pending.popleft()
            self.waiting -= characters
            ids = future.result()
            self.counts["tokens"] += len(ids)
            self._write(self.packer.add(ids))

    def _write(self, rows: Rows) -> None:
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
