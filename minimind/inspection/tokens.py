"""Rows of token ids and labels as flat arrays."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from minimind.data.packing import IGNORED


def ratio(part: int, total: int) -> float:
    """The share of a part, to four digits; 0 of nothing."""
    return round(int(part) / max(int(total), 1), 4)


class Tokens:
    """Rows of tokens: row r is `ids[starts[r]:starts[r + 1]]`.

    Shapes: `ids`, `labels` (tokens,); `starts` (rows + 1,); `lengths` (rows,). `where` is the place
    of each row. If the loader recorded roles, for templates whose ids do not show them, `roles`
    (tokens,) are indices into `role_names`, otherwise `roles` is None.
    """

    def __init__(self, rows: Dataset, where: Sequence[str] | None = None):
        self.ids, self.starts = _flat(rows, "input_ids")
        self.labels, starts = self.ids, self.starts  # in blocks every token is trained
        if "labels" in rows.column_names:
            self.labels, starts = _flat(rows, "labels")
        if not np.array_equal(self.starts, starts):
            raise ValueError("a row's input_ids and labels differ in length")
        self.lengths = np.diff(self.starts)
        names = (f"row {number}" for number in range(1, len(self) + 1))
        self.where = list(names if where is None else where)
        self.roles, self.role_names = None, []
        if "roles" in rows.column_names:
            roles = pc.list_flatten(rows.with_format("arrow")[:]["roles"]).combine_chunks()
            encoded = roles.dictionary_encode()
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
        """Row numbers -> the places of these rows, each once."""
        return [self.where[row] for row in np.unique(rows)]

    @cached_property
    def hashes(self) -> list[int]:
        """A hash of each row's ids."""
        edges = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [xxhash.xxh3_128_intdigest(self.ids[start:end].tobytes()) for start, end in edges]


def _flat(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists -> all its values in one array, and where each list begins in it (and the
    last one ends)."""
    chunks = rows.with_format("arrow")[:][name].chunks
    lengths = np.concatenate([[0], *(pc.list_value_length(chunk).to_numpy() for chunk in chunks)])
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    return values.astype(np.int64), np.cumsum(lengths)
