"""CSV, Parquet and Arrow files -> rows."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import decoded
from minimind.data.lines import BUFFER, ROW_LIMIT, Parsable

# Buffered column by column; by default a complete row group, which may be the whole file, is read
# ahead
PARQUET_OPTIONS = {"buffer_size": BUFFER, "pre_buffer": False, "page_checksum_verification": True}
BATCH = 256  # rows of a parquet or arrow file turned into Python objects at a time
UNREADABLE = (pa.ArrowException, ValueError, OverflowError)
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
REMEDIES = {",": "Name the file .csv", "\t": "Name the file .tsv"}

Progress = Callable[[int], Any]


# CSV


def read_csv(
    path: Path, file: BinaryIO, text_unit: str, delimiter: str = ","
) -> Iterator[Parsable]:
    """One row per record, which may have several lines, under the names in the first record."""
    csv.field_size_limit(ROW_LIMIT)  # by default 128 KiB; a document may be longer
    header, line = None, 1
    try:
        with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as lines:
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
            " quotes inside them doubled. Fix the row that starts there."
        ) from None


def _check_header(where: str, header: list[str], delimiter: str) -> None:
    """Raise UserError for a header that is not UTF-8, repeats a name or has another delimiter."""
    try:
        decoded(",".join(header).encode("utf-8", "surrogateescape"))
    except BadRowError as problem:
        raise UserError(f"{where}: {problem}. Save the file again in UTF-8.") from None
    if len(set(header)) < len(header):
        raise UserError(f"{where}: found the header {header}, expected each column name once.")
    other = next((mark for mark in DELIMITERS if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other:
        remedy = REMEDIES.get(other, "Save it again with commas")
        raise UserError(
            f"{where}: found the header {header[0]!r}, with {DELIMITERS[other]} between the"
            f" columns, expected {DELIMITERS[delimiter]}. {remedy}."
        )


def _csv_row(header: list[str], fields: list[str]) -> dict:
    if len(fields) != len(header):
        names = ", ".join(header)
        raise BadRowError(f"found {len(fields)} fields, expected {len(header)}: {names}")
    for field in fields:
        decoded(field.encode("utf-8", "surrogateescape"))
    return dict(zip(header, fields, strict=True))


# Parquet and Arrow


def read_parquet(path: Path, reached: Progress) -> Iterator[Parsable]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, **PARQUET_OPTIONS) as file:
            done, size = 0, path.stat().st_size
            for batch in file.iter_batches(batch_size=BATCH):
                yield batch
                done += len(batch)
                reached(size * done // file.metadata.num_rows)

    return _columnar_rows(path, batches())


def read_arrow(path: Path, reached: Progress) -> Iterator[Parsable]:
    """Arrow's IPC file, or IPC stream, which `datasets` writes; one batch at a time."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(path)) as source:
            size, is_file = source.size(), source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            count = reader.num_record_batches if is_file else 0
            stored = map(reader.get_batch, range(count)) if is_file else reader
            for done, batch in enumerate(stored, 1):
                batch.validate(full=True)  # wrong offsets would be read outside of its memory
                yield batch
                reached(size * done // count if is_file else source.tell())

    return _columnar_rows(path, batches())


def _columnar_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Parsable]:
    done = 0
    try:
        for stored in batches:
            names = stored.schema.names
            if len(set(names)) < len(names):
                raise UserError(f"{path}: found the columns {names}, expected each name once.")
            for start in range(0, len(stored), BATCH):
                batch = stored.slice(start, BATCH)
                try:
                    rows = [partial(dict, row) for row in batch.to_pylist()]
                except UNREADABLE:  # one by one, to name the bad row
                    rows = [partial(_columnar_row, batch, index) for index in range(len(batch))]
                for row in rows:
                    done += 1
                    yield f"row {done}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}: after row {done} not readable as {path.suffix[1:]} ({error}). Download it"
            " again."
        ) from None


def _columnar_row(batch: pa.RecordBatch, index: int) -> dict:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UNREADABLE as error:
        raise BadRowError(
            f"found values that cannot be read ({error}), expected UTF-8 text"
        ) from None
