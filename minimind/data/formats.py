"""The formats of raw data files: bytes -> rows, each with the place where it stands.

A reader yields for every row its place (a line number, or "row N") and a function without arguments
that gives the row's dict or raises BadRowError. What makes the rest of a file unreadable is a
UserError. Readers stream: they hold one row (at most ROW_LIMIT), one batch of rows, or one buffer
at a time, never a file.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import decoded
from minimind.data.json_files import (
    BOM,
    BUFFER,
    ROW_LIMIT,
    Parsable,
    read_json,
    read_jsonl,
    read_lines,
    too_long,
)

# Buffered column by column; by default a whole row group, which may be the whole file, is read
# ahead.
PARQUET_OPTIONS = {"buffer_size": BUFFER, "pre_buffer": False, "page_checksum_verification": True}
BATCH = 256  # rows of a parquet or arrow file turned into Python objects at a time
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
TEXT_UNITS = ("file", "paragraph", "line")

Progress = Callable[[int], Any]


# Text and tables


def _as_text(raw: bytes) -> dict:
    return {"text": decoded(raw.replace(b"\r\n", b"\n"))}


def _paragraph(lines: Iterable[tuple[int, bytes | None]]) -> tuple[int, bytes | None]:
    """Lines that belong together -> the first one's number and all their bytes; None for more than
    ROW_LIMIT."""
    start, kept, size = 0, [], 0
    for number, line in lines:
        start = start or number
        size += ROW_LIMIT + 1 if line is None else len(line)
        if size <= ROW_LIMIT:
            kept.append(line)
    return start, b"".join(kept) if size <= ROW_LIMIT else None


def _read_txt(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """One document per file, per paragraph (lines with no blank one between them) or per line that
    is not blank."""
    if text_unit == "file":
        chunks = islice(iter(partial(file.read, BUFFER), b""), ROW_LIMIT // BUFFER + 1)
        raw = b"".join(chunks).removeprefix(BOM)
        if len(raw) > ROW_LIMIT:
            raise UserError(
                f"{path}: found more than {ROW_LIMIT:,} bytes, too many for one document. Read it"
                " with --text_unit paragraph or --text_unit line."
            )
        yield 1, partial(_as_text, raw)
        return
    numbered = read_lines(file)
    for blank, group in groupby(numbered, lambda pair: pair[1] is not None and not pair[1].strip()):
        if not blank:
            for number, raw in group if text_unit == "line" else [_paragraph(group)]:
                yield number, too_long if raw is None else partial(_as_text, raw.rstrip(b"\r\n"))


def _csv_row(header: list[str], fields: list[str]) -> dict:
    if len(fields) != len(header):
        raise BadRowError(
            f"found {len(fields)} fields, expected {len(header)}: {', '.join(header)}"
        )
    for field in fields:
        decoded(field.encode("utf-8", "surrogateescape"))
    return dict(zip(header, fields, strict=True))


def _check_header(where: str, header: list[str], delimiter: str) -> None:
    try:
        decoded(",".join(header).encode("utf-8", "surrogateescape"))
    except BadRowError as problem:
        raise UserError(f"{where}: {problem}. Save the file again in UTF-8.") from None
    if len(set(header)) < len(header):
        raise UserError(f"{where}: found the header {header}, expected each column name once.")
    other = next((mark for mark in DELIMITERS if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other:
        remedy = {",": "Name the file .csv", "\t": "Name the file .tsv"}.get(
            other, "Save it again with commas"
        )
        raise UserError(
            f"{where}: found the header {header[0]!r}, with {DELIMITERS[other]} between the"
            f" columns, expected {DELIMITERS[delimiter]}. {remedy}."
        )


def _read_csv(
    path: Path, file: BinaryIO, text_unit: str, delimiter: str = ","
) -> Iterator[Parsable]:
    # The module refuses fields above 128 KiB by default; a document may be longer
    csv.field_size_limit(ROW_LIMIT)
    header, line = None, 1
    try:
        with io.TextIOWrapper(
            file, encoding="utf-8-sig", errors="surrogateescape", newline=""
        ) as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for fields in reader:
                if fields and header is None:
                    header = fields
                    _check_header(f"{path}:{line}", header, delimiter)
                elif fields:
                    yield line, partial(_csv_row, header, fields)
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: found a broken row ({error}), expected fields with closed quotes, and"
            " quotes inside them doubled. Mend the row that starts there."
        ) from None


def _columnar_row(batch: pa.RecordBatch, index: int) -> dict:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise BadRowError(
            f"found values that cannot be read ({error}), expected UTF-8 text"
        ) from None


def _columnar_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Parsable]:
    done = 0
    try:
        for whole in batches:
            if len(set(whole.schema.names)) < len(whole.schema.names):
                raise UserError(
                    f"{path}: found the columns {whole.schema.names}, expected each name once."
                )
            for start in range(0, len(whole), BATCH):
                batch = whole.slice(start, BATCH)
                try:
                    rows = batch.to_pylist()
                except (
                    pa.ArrowException,
                    ValueError,
                    OverflowError,
                ):  # each row by itself, to name the bad one
                    rows = [partial(_columnar_row, batch, index) for index in range(len(batch))]
                for row in rows:
                    done += 1
                    yield f"row {done}", row if callable(row) else partial(dict, row)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}: after row {done} not readable as {path.suffix[1:]} ({error}). Download it"
            " again."
        ) from None


def _read_parquet(path: Path, reached: Progress) -> Iterator[Parsable]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, **PARQUET_OPTIONS) as file:
            done, size = 0, path.stat().st_size
            for batch in file.iter_batches(batch_size=BATCH):
                yield batch
                done += len(batch)
                reached(size * done // file.metadata.num_rows)

    yield from _columnar_rows(path, batches())


def _read_arrow(path: Path, reached: Progress) -> Iterator[Parsable]:
    """Arrow's IPC file and IPC stream, which `datasets` writes; in memory is one batch as it was
    written."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(path)) as source:
            size, is_file = source.size(), source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            count = reader.num_record_batches if is_file else 0
            for done, batch in enumerate(
                map(reader.get_batch, range(count)) if is_file else reader, 1
            ):
                # Offsets in a damaged file would be read beyond its memory
                batch.validate(full=True)
                yield batch
                reached(size * done // count if is_file else source.tell())

    yield from _columnar_rows(path, batches())


# A reader of text gets the open file; a reader of tables opens it by itself, since pyarrow reads
# from anywhere in it.
TEXT_READERS = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
}
TABLE_READERS = {".parquet": _read_parquet, ".arrow": _read_arrow}
KNOWN = f"{', '.join([*TEXT_READERS, *TABLE_READERS])}; text also with .gz or .zst"


def format_of(path: Path) -> tuple[str | None, str | None]:
    """A path -> its format and its compression, as extensions; None for what is not known. Raises
    UserError.

    >>> format_of(Path("a.JSONL.gz"))
    ('.jsonl', '.gz')
    """
    *_, before, last = (
        ["", *(suffix.lower() for suffix in path.suffixes)] if path.suffixes else ["", "", ""]
    )
    if last not in COMPRESSIONS:
        return (last if last in TEXT_READERS or last in TABLE_READERS else None), None
    if before in TABLE_READERS:
        raise UserError(
            f"{path}: found {before} inside {last}, expected it as it is, compressed within."
            " Unpack it."
        )
    return (before if before in TEXT_READERS else None), last


class _Counted(io.RawIOBase):
    """A file as raw bytes; `reached` learns how far it has been read."""

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


@contextmanager
def _opened(path: Path, compression: str | None, reached: Progress) -> Iterator[BinaryIO]:
    """A file of text, unpacked; raises UserError if its first bytes show an encoding other than
    UTF-8."""
    with _Counted(path, reached) as raw:
        unpacked = pa.CompressedInputStream(raw, COMPRESSIONS[compression]) if compression else raw
        with io.BufferedReader(unpacked, BUFFER) as file:
            start = file.peek(4)[:4]
            encoding = next(
                (name for mark, name in OTHER_ENCODINGS.items() if start.startswith(mark)), None
            )
            if (
                not encoding
                and len(start) == 4
                and (start[::2] == b"\0\0" or start[1::2] == b"\0\0")
            ):
                encoding = "UTF-16"  # ASCII without a mark
            if encoding:
                raise UserError(
                    f"{path}:1: found {encoding} text (its first bytes are {start.hex(' ')}),"
                    f" expected UTF-8. Convert it: iconv -f {encoding} -t UTF-8."
                )
            yield file


def read_file(path: Path, text_unit: str, progress: Progress | None) -> Iterator[Parsable]:
    """The rows of one file. `progress` gets the bytes of the file, as it lies on the disk, since
    its last call.

    Raises:
        UserError: the file, or what is left of it, cannot be read.
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
