"""What a row that cannot be used raises, and how its values are shown."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class BadRowError(ValueError):
    """A row that cannot be used; the text says what was found and what was expected."""


def check_text(text: str, name: str) -> None:
    """Refuse (BadRowError) a text that holds a NUL: it is binary data, or was cut out of it."""
    if (position := text.find("\0")) >= 0:
        raise BadRowError(f"{name}: found a NUL character at offset {position}, expected text")


def shown(value: Any, limit: int = 60) -> str:
    """A value -> the start of its JSON, for messages."""
    text = (
        json.dumps(value, ensure_ascii=False, default=str)
        .encode("utf-8", "backslashreplace")
        .decode("utf-8")
    )
    return text if len(text) <= limit else text[:limit] + "..."


def decoded(raw: bytes) -> str:
    """UTF-8 bytes -> text; raises BadRowError naming the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"found byte 0x{raw[error.start]:02x} at byte offset {error.start}, expected UTF-8 text"
            " (a Chinese file from Windows: iconv -f gb18030 -t utf-8)"
        ) from None


def batches(
    items: Iterable[T], size: Callable[[T], int], count: int, limit: int = 2**22
) -> Iterator[list[T]]:
    """Items in lists of `count`, shorter ones where their sizes (in characters, say) add up to
    `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if len(batch) == count or total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
