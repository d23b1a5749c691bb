"""The lines of a text file, and a txt file -> rows."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import decoded

ROW_LIMIT = 1 << 28  # bytes of one row; a longer one is most likely a file without line ends
BUFFER = 1 << 20  # bytes read at a time
BOM = codecs.BOM_UTF8

# A row's place (a line number, or "row N") and a function that returns it or raises BadRowError
Parsable = tuple[int | str, Callable[[], dict]]


def too_long() -> dict:
    """Parse a row beyond ROW_LIMIT: raise BadRowError."""
    raise BadRowError(
        f"found a row of more than {ROW_LIMIT:,} bytes, expected shorter rows, with line ends"
        " between"
    )


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number the lines of a file; None stands for one of more than ROW_LIMIT bytes."""
    for number, raw in enumerate(iter(partial(file.readline, ROW_LIMIT), b""), 1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        if len(raw) == ROW_LIMIT and not raw.endswith(b"\n"):
            line = None
            while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
                pass
        yield number, line


def read_txt(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """One document per file, per paragraph (between blank lines) or per line that is not blank."""
    if text_unit == "file":
        chunks = islice(iter(partial(file.read, BUFFER), b""), ROW_LIMIT // BUFFER + 1)
        raw = b"".join(chunks).removeprefix(BOM)
        if len(raw) > ROW_LIMIT:
            raise UserError(
                f"{path}: found more than {ROW_LIMIT:,} bytes, too many for one document. Read it"
                " with --text_unit paragraph or --text_unit line."
            )
        yield 1, partial(_document, raw)
        return

    lines = read_lines(file)
    for is_blank, group in groupby(lines, lambda pair: pair[1] is not None and not pair[1].strip()):
        if not is_blank:
            for number, raw in group if text_unit == "line" else [_paragraph(group)]:
                yield number, too_long if raw is None else partial(_document, raw.rstrip(b"\r\n"))


def _document(raw: bytes) -> dict:
    return {"text": decoded(raw.replace(b"\r\n", b"\n"))}


def _paragraph(lines: Iterable[tuple[int, bytes | None]]) -> tuple[int, bytes | None]:
    """The first number and all bytes of some lines; None for more than ROW_LIMIT bytes."""
    start, parts, size = 0, [], 0
    for number, line in lines:
        start = start or number
        size += ROW_LIMIT + 1 if line is None else len(line)
        if size <= ROW_LIMIT:
            parts.append(line)
    return start, b"".join(parts) if size <= ROW_LIMIT else None
