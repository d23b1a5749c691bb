"""Which rows are held out."""

from collections.abc import Sequence
from heapq import heappush, heappushpop
from typing import Any

import xxhash


class HoldOut:
    """Chooses the held-out rows by a hash of their content: the `limit` smallest among a share
    `ratio` of all hashes.

    So the choice is spread over all sources, depends on nothing but the rows, and copies lie on one
    side.
    """

    def __init__(self, ratio: float, limit: int):
        self.threshold, self.limit = ratio * 2**64, limit
        self.rows: dict[int, list] = {}
        self.largest: list[int] = []  # a heap of the negated hashes that are held out

    def offer(self, text: str, row: Any) -> Sequence:
        """The rows that are certain now to be trained on: mostly this one."""
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if digest in self.rows:
            self.rows[digest].append(row)
            return ()
        full = len(self.largest) >= self.limit
        if digest >= self.threshold or self.limit == 0 or (full and digest > -self.largest[0]):
            return (row,)
        self.rows[digest] = [row]
        if full:
            return self.rows.pop(-heappushpop(self.largest, -digest))
        heappush(self.largest, -digest)
        return ()

    def chosen(self) -> list:
        """The held-out rows, copies beside each other."""
        return [row for copies in self.rows.values() for row in copies]
