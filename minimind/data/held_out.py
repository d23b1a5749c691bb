"""Which rows are held out for evaluation, where no files are given for it."""

from collections.abc import Sequence
from heapq import heappush, heappushpop
from typing import Any

import xxhash


class HoldOut:
    """Chooses rows by a hash of their content: the `limit` smallest below `ratio` of the range.

        0 ..... h3 .. h1 ......... h5 | ..... h2 ......... h4 ..... 2^64      ratio 0.4, limit 2:
                -------                                                       rows 3 and 1

    The choice is spread over all sources, depends on nothing but the rows, and puts all copies of a
    row on one side.
    """

    def __init__(self, ratio: float, limit: int):
        self.threshold, self.limit = ratio * 2**64, limit
        self.rows: dict[int, list] = {}  # hash -> the rows held out so far
        self.largest: list[int] = []  # a heap of the negated hashes

    def offer(self, text: str, row: Any) -> Sequence:
        """Take a row with its text, and return the rows that are now certain to be trained on.

        Mostly this is the row itself; rows of a hash that a smaller one displaces come later.
        """
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
        """Return the held-out rows, copies beside each other."""
        return [row for copies in self.rows.values() for row in copies]
