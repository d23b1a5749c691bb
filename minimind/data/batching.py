"""Items in batches of bounded size."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(
    items: Iterable[T], size: Callable[[T], int], count: int, limit: int = 2**22
) -> Iterator[list[T]]:
    """Items in lists of `count`, or fewer where their sizes (such as characters) reach `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if len(batch) == count or total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
