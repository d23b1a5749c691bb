"""The formats of raw data files: bytes -> rows, each with the place where it stands.

A reader yields for every row its place (a line number, or "row N") and a function without arguments that gives the
row's dict or raises BadRowError. What makes the rest of a file unreadable is a UserError. Readers stream: they hold
one row (at most ROW_LIMIT), one batch of rows, or one buffer at a time, never a file.
"""

import codecs
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from minimind.errors import UserError

ROW_LIMIT = 1 << 28  # bytes of one row; what is longer is most likely a file without line ends
BUFFER = 1 << 20  # bytes read at a time
# Buffered column by column; by default a whole row group, which may be the whole file, is read ahead.
PARQUET_OPTIONS = {"buffer_size": BUFFER, "pre_buffer": False, "page_checksum_verification": True}
BATCH = 256  # rows of a parquet or arrow file turned into Python objects at a time
MAX_DEPTH = 100  # lists and objects within each other in one row
CONTAINERS = {dict, list}
BOM = codecs.BOM_UTF8
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
JSON_ROW = "one JSON object per line (a .json file may also be one list of objects)"
JSON_SPACE = re.compile(r"[ \t\n\r]*")
KEY_END = re.compile(rb'"[ \t\n\r]*:')
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
TEXT_UNITS = ("file", "paragraph", "line")

Parsable = tuple[int | str, Callable[[], dict]]
Progress = Callable[[int], Any]


class BadRowError(ValueError):
    """A row that cannot be used; the text says what was found and what was expected."""


def check_text(text: str, name: str) -> None:
    """Refuse (BadRowError) a text that holds a NUL: it is binary data, or was cut out of it."""
    if (position := text.find("\0")) >= 0:
        raise BadRowError(f"{name}: found a NUL character at offset {position}, expected text")


def shown(value: Any, limit: int = 60) -> str:
    """A value -> the start of its JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[:limit] + "..."


def decoded(raw: bytes) -> str:
    """UTF-8 bytes -> text; raises BadRowError naming the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"found byte 0x{raw[error.start]:02x} at byte offset {error.start}, expected UTF-8 text "
            "(a Chinese file from Windows: iconv -f gb18030 -t utf-8)"
        ) from None


# JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise BadRowError(f"found the key {shown(twice)} twice in one object, expected each key once")
    return value


def _no_constant(name: str) -> None:
    raise BadRowError(f"found {name}, which is not JSON, expected a number or null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise BadRowError(f"found the number {digits[:20]}..., expected one within the range of floating point")
    return number


def _integer(digits: str) -> int | float:
    if len(digits) <= 20 and -(2**63) <= (number := int(digits)) < 2**64:
        return number
    return _finite(digits)


LENIENT = json.JSONDecoder()
STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
)


def count_keys(value: dict | list, depth: int = 1) -> int:
    """The keys of all objects within a value; raises BadRowError where it is nested deeper than MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise BadRowError(f"found lists and objects nested more than {MAX_DEPTH} deep, expected a row of text")
    count, items = (len(value), value.values()) if isinstance(value, dict) else (0, value)
    for item in items:  # the parsers make no subclasses, and most items are text: tests in order of speed
        if item.__class__ is not str and item.__class__ in CONTAINERS:
            count += count_keys(item, depth + 1)
    return count


def _checked(value: Any, text: str) -> dict:
    """What the strict decoder made of `text` -> the row; raises BadRowError."""
    if isinstance(value, dict | list):
        count_keys(value)
    if not isinstance(value, dict):
        raise BadRowError(f"found {shown(value)}, expected a JSON object, such as {{...}}")
    if SURROGATE_ESCAPE.search(text):  # JSON can escape half a character, which no tokenizer can encode
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(
                "found half of a surrogate pair (\\ud800 to \\udfff), expected whole characters"
            ) from None
    return value


def _parse_strictly(raw: bytes) -> dict:
    text = decoded(raw).strip().removeprefix("\ufeff")
    try:
        value = STRICT.decode(text)
    except BadRowError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")
        raise BadRowError(f"found {text[:60]!r}, which is not JSON ({reason}), expected {JSON_ROW}") from None
    return _checked(value, text)


def parse_line(raw: bytes) -> dict:
    """The bytes of one line -> its JSON object; integers beyond 64 bits become floats. Raises BadRowError.

    The fast parser decides where it is seen to be right, else the strict one.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _parse_strictly(raw)
    # An object that names a key twice has fewer keys than were written. Text may look like the end of a key too, so
    # the count of those is never too low, and where it is too high the strict parser tells.
    if isinstance(value, dict) and len(KEY_END.findall(raw)) == count_keys(value):
        return value
    return _parse_strictly(raw)


def _refuse(problem: BadRowError) -> dict:
    raise problem


def _too_long() -> dict:
    raise BadRowError(f"found a row of more than {ROW_LIMIT:,} bytes, expected shorter rows, with line ends between")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, with their numbers; None for one of more than ROW_LIMIT bytes."""
    for number, raw in enumerate(iter(partial(file.readline, ROW_LIMIT), b""), 1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        if len(raw) == ROW_LIMIT and not raw.endswith(b"\n"):
            line = None
            while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
                pass
        yield number, line


def _read_jsonl(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    for number, line in _lines(file):
        if line is None:
            yield number, _too_long
        elif line and not line.isspace():
            yield number, partial(parse_line, line)


class _Window:
    """The stretch of a text file that is being parsed; what lies before `position` is dropped as more is read."""

    def __init__(self, file: BinaryIO):
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.line, self.column, self.ended = "", 0, 1, 1, False

    def advance(self, end: int) -> None:
        """Go on to the position `end`; line and column follow."""
        if newlines := self.text.count("\n", self.position, end):
            self.line, self.column = self.line + newlines, end - self.text.rindex("\n", self.position, end)
        else:
            self.column += end - self.position
        self.position = end

    def read_more(self) -> None:
        """Read at least as much again as is left, so that a long value is not tried too often."""
        self.text, self.position = self.text[self.position :], 0
        raw = self.file.read(max(BUFFER, len(self.text)))
        try:
            self.text += self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            good = self.text + error.object[: error.start].decode("utf-8")
            self.text = good
            self.advance(len(good))
            decoded(error.object[error.start :])
        self.ended = not raw

    def next_character(self) -> str:
        """Go on to the next character that is no space; "" at the end of the file."""
        while True:
            self.advance(JSON_SPACE.match(self.text, self.position).end())
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def value(self) -> Callable[[], dict]:
        """Go on beyond the next value -> what gives it as a row; raises json.JSONDecodeError and RecursionError."""
        while True:
            try:
                parse, end = self._value()
            except json.JSONDecodeError as error:
                # What was cut off at the end of the text fails there, or as a string that does not end.
                cut_off = error.pos > len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if self.ended or not cut_off or len(self.text) - self.position > ROW_LIMIT:
                    raise
            else:
                if end < len(self.text) - 2 or self.ended:  # a number may go on: 1.5 and then e+16
                    self.advance(end)
                    return parse
            self.read_more()

    def _value(self) -> tuple[Callable[[], dict], int]:
        try:
            value, end = STRICT.raw_decode(self.text, self.position)
        except json.JSONDecodeError:
            raise
        except BadRowError as problem:
            return partial(_refuse, problem), LENIENT.raw_decode(self.text, self.position)[1]
        return partial(_checked, value, self.text[self.position : end]), end


def _read_json(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """A list of objects, decoded one by one as the file is read; otherwise as .jsonl."""
    if not file.peek(BUFFER).removeprefix(BOM).lstrip().startswith(b"["):
        yield from _read_jsonl(path, file, text_unit)
        return

    def broken(line: int, column: int, problem: str) -> UserError:
        return UserError(
            f"{path}:{line}: not JSON at column {column} ({problem}), expected a list of objects. "
            "Mend the file there, or store one object per line as .jsonl, where bad rows can be skipped."
        )

    window = _Window(file)
    try:
        window.next_character()
        window.advance(window.position + 1)
        character = window.next_character()
        while character != "]":
            line = window.line
            yield line, window.value()
            line, column = window.line, window.column
            character = window.next_character()
            if character == ",":
                window.advance(window.position + 1)
                window.next_character()
            elif character != "]":
                raise broken(line, column, "expecting ',' or the end of the list")
        window.advance(window.position + 1)
        if window.next_character():
            raise broken(window.line, window.column, "more text after the end of the list")
    except json.JSONDecodeError as error:
        window.advance(error.pos)
        raise broken(window.line, window.column, error.msg) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number or nesting beyond Python's limits
        raise UserError(f"{path}:{window.line}: {error}. Save the file again as a list of objects in UTF-8.") from None


# Text and tables


def _as_text(raw: bytes) -> dict:
    return {"text": decoded(raw.replace(b"\r\n", b"\n"))}


def _paragraph(lines: Iterable[tuple[int, bytes | None]]) -> tuple[int, bytes | None]:
    """Lines that belong together -> the first one's number and all their bytes; None for more than ROW_LIMIT."""
    start, kept, size = 0, [], 0
    for number, line in lines:
        start = start or number
        size += ROW_LIMIT + 1 if line is None else len(line)
        if size <= ROW_LIMIT:
            kept.append(line)
    return start, b"".join(kept) if size <= ROW_LIMIT else None


def _read_txt(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """One document per file, per paragraph (lines with no blank one between them) or per line that is not blank."""
    if text_unit == "file":
        chunks = islice(iter(partial(file.read, BUFFER), b""), ROW_LIMIT // BUFFER + 1)
        raw = b"".join(chunks).removeprefix(BOM)
        if len(raw) > ROW_LIMIT:
            raise UserError(
                f"{path}: found more than {ROW_LIMIT:,} bytes, too many for one document. Read it with --text_unit "
                "paragraph or --text_unit line."
            )
        yield 1, partial(_as_text, raw)
        return
    numbered = _lines(file)
    for blank, group in groupby(numbered, lambda pair: pair[1] is not None and not pair[1].strip()):
        if not blank:
            for number, raw in group if text_unit == "line" else [_paragraph(group)]:
                yield number, _too_long if raw is None else partial(_as_text, raw.rstrip(b"\r\n"))


def _csv_row(header: list[str], fields: list[str]) -> dict:
    if len(fields) != len(header):
        raise BadRowError(f"found {len(fields)} fields, expected {len(header)}: {', '.join(header)}")
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
        remedy = {",": "Name the file .csv", "\t": "Name the file .tsv"}.get(other, "Save it again with commas")
        raise UserError(
            f"{where}: found the header {header[0]!r}, with {DELIMITERS[other]} between the columns, expected "
            f"{DELIMITERS[delimiter]}. {remedy}."
        )


def _read_csv(path: Path, file: BinaryIO, text_unit: str, delimiter: str = ",") -> Iterator[Parsable]:
    csv.field_size_limit(ROW_LIMIT)  # the module refuses fields above 128 KiB by default; a document may be longer
    header, line = None, 1
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
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
            f"{path}:{line}: found a broken row ({error}), expected fields with closed quotes, and quotes inside them "
            "doubled. Mend the row that starts there."
        ) from None


def _columnar_row(batch: pa.RecordBatch, index: int) -> dict:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise BadRowError(f"found values that cannot be read ({error}), expected UTF-8 text") from None


def _columnar_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Parsable]:
    done = 0
    try:
        for whole in batches:
            if len(set(whole.schema.names)) < len(whole.schema.names):
                raise UserError(f"{path}: found the columns {whole.schema.names}, expected each name once.")
            for start in range(0, len(whole), BATCH):
                batch = whole.slice(start, BATCH)
                try:
                    rows = batch.to_pylist()
                except (pa.ArrowException, ValueError, OverflowError):  # each row by itself, to name the bad one
                    rows = [partial(_columnar_row, batch, index) for index in range(len(batch))]
                for row in rows:
                    done += 1
                    yield f"row {done}", row if callable(row) else partial(dict, row)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path}: after row {done} not readable as {path.suffix[1:]} ({error}). Download it again."
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
    """Arrow's IPC file and IPC stream, which `datasets` writes; in memory is one batch as it was written."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(path)) as source:
            size, is_file = source.size(), source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            count = reader.num_record_batches if is_file else 0
            for done, batch in enumerate(map(reader.get_batch, range(count)) if is_file else reader, 1):
                batch.validate(full=True)  # offsets in a damaged file would be read beyond its memory
                yield batch
                reached(size * done // count if is_file else source.tell())

    yield from _columnar_rows(path, batches())


# A reader of text gets the open file; a reader of tables opens it by itself, since pyarrow reads from anywhere in it.
TEXT_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
}
TABLE_READERS = {".parquet": _read_parquet, ".arrow": _read_arrow}
KNOWN = f"{', '.join([*TEXT_READERS, *TABLE_READERS])}; text also with .gz or .zst"


def format_of(path: Path) -> tuple[str | None, str | None]:
    """A path -> its format and its compression, as extensions; None for what is not known. Raises UserError.

    >>> format_of(Path("a.JSONL.gz"))
    ('.jsonl', '.gz')
    """
    *_, before, last = ["", *(suffix.lower() for suffix in path.suffixes)] if path.suffixes else ["", "", ""]
    if last not in COMPRESSIONS:
        return (last if last in TEXT_READERS or last in TABLE_READERS else None), None
    if before in TABLE_READERS:
        raise UserError(f"{path}: found {before} inside {last}, expected it as it is, compressed within. Unpack it.")
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
    """A file of text, unpacked; raises UserError if its first bytes show an encoding other than UTF-8."""
    with _Counted(path, reached) as raw:
        unpacked = pa.CompressedInputStream(raw, COMPRESSIONS[compression]) if compression else raw
        with io.BufferedReader(unpacked, BUFFER) as file:
            start = file.peek(4)[:4]
            encoding = next((name for mark, name in OTHER_ENCODINGS.items() if start.startswith(mark)), None)
            if not encoding and len(start) == 4 and (start[::2] == b"\0\0" or start[1::2] == b"\0\0"):
                encoding = "UTF-16"  # ASCII without a mark
            if encoding:
                raise UserError(
                    f"{path}:1: found {encoding} text (its first bytes are {start.hex(' ')}), expected UTF-8. "
                    f"Convert it: iconv -f {encoding} -t UTF-8."
                )
            yield file


def read_file(path: Path, text_unit: str, progress: Progress | None) -> Iterator[Parsable]:
    """The rows of one file. `progress` gets the bytes of the file, as it lies on the disk, since its last call.

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
        raise UserError(f"{path}: cannot be read ({error}). Check the file, or download it again.") from None
