"""The formats of raw data files: bytes -> rows, each with its place.

    lines.py        .txt
    json_files.py   .json, .jsonl, .ndjson
    tables.py       .csv, .tsv, .parquet, .arrow

A reader yields for every row its place (a line number, or "row N") and a function without arguments
that returns the row's dict or raises BadRowError. What makes the rest of a file unreadable is a
UserError. Readers stream: they hold one row (at most ROW_LIMIT), one batch of rows, or one buffer
at a time, never a file.
"""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from minimind.common.errors import UserError
from minimind.data.json_files import read_json, read_jsonl
from minimind.data.lines import BUFFER, Parsable, read_txt
from minimind.data.tables import Progress, read_arrow, read_csv, read_parquet

OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_UNITS = ("file", "paragraph", "line")
# Readers of text get the open file; readers of tables open it themselves, since pyarrow reads from
# anywhere in it
TEXT_READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".txt": read_txt,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
}
TABLE_READERS = {".parquet": read_parquet, ".arrow": read_arrow}
KNOWN = f"{', '.join([*TEXT_READERS, *TABLE_READERS])}; text also with .gz or .zst"


def format_of(path: Path) -> tuple[str | None, str | None]:
    """The format and compression of a path, as extensions; None for unknown ones. Raises UserError.

    >>> format_of(Path("a.JSONL.gz"))
    ('.jsonl', '.gz')
    """
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last not in COMPRESSIONS:
        return (last if last in TEXT_READERS or last in TABLE_READERS else None), None
    if before in TABLE_READERS:
        raise UserError(
            f"{path}: found {before} inside {last}, expected it as it is, since it is compressed"
            " internally. Unpack it."
        )
    return (before if before in TEXT_READERS else None), last


def read_file(path: Path, text_unit: str, progress: Progress | None) -> Iterator[Parsable]:
    """The rows of one file. `progress` gets the bytes of the file on the disk that were read since
    its last call.

    Raises:
        UserError: the file, or the rest of it, cannot be read.
    """
    done = 0

    def reached(position: int) -> None:
        nonlocal done
        if progress and position > done:
            progress(position - done)
            done = position

    name, compression = format_of(path)
    try:
        if name in TABLE_READERS:
            yield from TABLE_READERS[name](path, reached)
        else:
            with _opened(path, compression, reached) as file:
                yield from TEXT_READERS[name](path, file, text_unit)
        reached(path.stat().st_size)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Check the file, or download it again."
        ) from None


@contextmanager
def _opened(path: Path, compression: str | None, reached: Progress) -> Iterator[BinaryIO]:
    """Open a text file, unpacked; raises UserError for another encoding than UTF-8."""
    with _PositionedFile(path, reached) as raw:
        unpacked = pa.CompressedInputStream(raw, COMPRESSIONS[compression]) if compression else raw
        with io.BufferedReader(unpacked, BUFFER) as file:
            start = file.peek(4)[:4]
            names = (name for mark, name in OTHER_ENCODINGS.items() if start.startswith(mark))
            encoding = next(names, None)
            has_gaps = start[::2] == b"\0\0" or start[1::2] == b"\0\0"
            if not encoding and len(start) == 4 and has_gaps:
                encoding = "UTF-16"  # ASCII without a mark
            if encoding:
                raise UserError(
                    f"{path}:1: found {encoding} text (its first bytes are {start.hex(' ')}),"
                    f" expected UTF-8. Convert it: iconv -f {encoding} -t UTF-8."
                )
            yield file


class _PositionedFile(io.RawIOBase):
    """A file as raw bytes that reports how far it has been read to `reached`."""

    def __init__(self, path: Path, reached: Progress):
        self._file, self._reached = path.open("rb", buffering=0), reached

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        self._reached(self._file.tell())
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
