"""Raw data files -> rows, each with the place it came from.

A row that cannot be used is a *bad row*: named as `file:line` with what was found and what was expected, then refused
or skipped as `--on_bad_rows` says. Only a file whose structure is lost (a broken JSON list, an unclosed CSV quote) is
refused whatever the policy, because nobody can say how many rows would be lost with it.
"""

import csv
import glob
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from minimind.errors import UserError

logger = logging.getLogger(__name__)

BAD_ROW_SHARE = 0.001  # without a policy, more bad rows than this are an error
BAD_ROWS_NAMED = 5
BOM = b"\xef\xbb\xbf"
JSON_ROW = "one JSON object per line (a .json file may also be one list of objects)"
JSON_LIST_START = re.compile(r"\s*\[\s*(?P<end>\]\s*\Z)?")
JSON_LIST_SEPARATOR = re.compile(r"\s*(?:,\s*|(?P<end>\])\s*\Z)")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

Parsable = tuple[int | str, Callable[[], dict]]


class Row(NamedTuple):
    """One row of a data file: `where` is "file:line" ("file:row N" for parquet)."""

    where: str
    data: Any


class BadRowError(ValueError):
    """A row that cannot be used; the text says what was found and what was expected."""


class BadRows:
    """The bad rows of one reading and the policy for them, one of `"error"`, `"skip"` and None.

    "error" refuses the first; "skip" leaves out all; None leaves them out while they are at most 0.1 % of the rows.
    """

    def __init__(self, policy: str | None = None):
        if policy not in (None, "error", "skip"):
            raise UserError(f"on_bad_rows: found {policy!r}, expected error, skip or nothing (skip at most 0.1 %)")
        self.policy = policy
        self.count = 0
        self.first: list[tuple[str, str]] = []

    def add(self, where: str, problem: str) -> None:
        """Count one bad row; raises UserError at once if the policy is "error"."""
        self.count += 1
        if len(self.first) < BAD_ROWS_NAMED:
            self.first.append((where, problem))
        if self.policy == "error":
            raise UserError(f"{self}\nMend the row, or leave out bad rows with --on_bad_rows skip.")

    def finish(self, total: int) -> None:
        """Judge the bad rows among `total`: one warning where they may be skipped, UserError where not."""
        if self.count and self.count == total:
            raise UserError(f"{self}\nNo usable row is left of {total:,}. Check the format of the files.")
        if self.policy is None and self.count > BAD_ROW_SHARE * total:
            raise UserError(
                f"{self}\n{self.count:,} of {total:,} rows are bad, and without --on_bad_rows at most "
                f"{BAD_ROW_SHARE:.1%} are left out. Mend them, or leave them out with --on_bad_rows skip."
            )
        self.warn(total)

    def warn(self, total: int) -> None:
        """Say in one warning how many of `total` rows were skipped; nothing if none was."""
        if self.count:
            logger.warning("skipped %s of %s rows: %s", f"{self.count:,}", f"{total:,}", self)

    def __str__(self) -> str:
        (where, problem), *others = self.first
        if not others:
            return f"{where}: {problem}"
        ellipsis = ", ..." if self.count > len(self.first) else ""
        return f"{where}: {problem} (and {self.count - 1:,} more: {', '.join(w for w, _ in others)}{ellipsis})"


def shown(value: Any, limit: int = 60) -> str:
    """A value -> the start of its JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
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


def _json_row(value: Any, text: str) -> dict:
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


def _parse_line(raw: bytes) -> dict:
    text = decoded(raw).strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")
        raise BadRowError(f"found {text[:60]!r}, which is not JSON ({reason}), expected {JSON_ROW}") from None
    return _json_row(value, text)


# A reader yields the place of each row and a function without arguments that gives its dict or raises BadRowError.


def _read_jsonl(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    for number, raw in enumerate(file, 1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        if line.strip():
            yield number, partial(_parse_line, line)


def _read_json(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    """A list of objects, decoded one by one so that each has its line number; otherwise as .jsonl."""
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    if not start.startswith(b"["):
        yield from _read_jsonl(path, file)
        return
    try:
        text, line, position = decoded(file.read().removeprefix(BOM)), 1, 0
        separator, decoder = JSON_LIST_START.match(text), json.JSONDecoder()
        while separator and not separator["end"]:
            line += text.count("\n", position, separator.end())
            value, position = decoder.raw_decode(text, separator.end())
            yield line, partial(_json_row, value, text[separator.end() : position])
            line += text.count("\n", separator.end(), position)
            if (separator := JSON_LIST_SEPARATOR.match(text, position)) is None:
                raise json.JSONDecodeError("Expecting ',' or the end of the list", text, position)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON at column {error.colno} ({error.msg}), expected a list of objects. "
            "Mend the file there, or store one object per line as .jsonl, where bad rows can be skipped."
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # BadRowError of `decoded`, a number or nesting beyond Python's limits
        raise UserError(f"{path}: {error}. Save the file again as a list of objects in UTF-8.") from None


def _read_txt(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    raw = file.read().removeprefix(BOM).replace(b"\r\n", b"\n")
    yield 1, lambda: {"text": decoded(raw)}


def _csv_row(header: list[str], fields: list[str]) -> dict:
    if len(fields) != len(header):
        raise BadRowError(f"found {len(fields)} fields, expected {len(header)}: {', '.join(header)}")
    for field in fields:
        decoded(field.encode("utf-8", "surrogateescape"))
    return dict(zip(header, fields, strict=True))


def _read_csv(path: Path, file: BinaryIO, delimiter: str = ",") -> Iterator[Parsable]:
    csv.field_size_limit(2**31 - 1)  # the module refuses fields above 128 KiB by default; a document may be longer
    header, line = None, 1
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for fields in reader:
                if fields and header is None:
                    header = fields
                    if len(set(header)) < len(header):
                        raise UserError(f"{path}:{line}: found the header {header}, expected each column name once.")
                elif fields:
                    yield line, partial(_csv_row, header, fields)
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: found a broken row ({error}), expected fields with closed quotes, and quotes inside them "
            "doubled. Mend the row that starts there."
        ) from None


def _read_parquet(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    done = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for number, data in enumerate(batch.to_pylist(), done + 1):
                yield f"row {number}", partial(dict, data)
            done += len(batch)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: after row {done} not readable as parquet ({error}). Download it again.") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
KNOWN = f"{', '.join(READERS)}, also with .gz"


def _reader(path: Path) -> Callable[[Path, BinaryIO], Iterator[Parsable]] | None:
    return READERS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def expand(paths: Sequence[str]) -> list[Path]:
    """Files, directories (searched to the bottom) and globs -> the data files, each once, in a stable order.

    Directories and globs give their files with known extensions, hidden ones left out. Raises UserError for a path
    that does not exist or gives no file, an unknown extension and an empty file.
    """
    if not paths:
        raise UserError(f"found no data files, expected at least one file, directory or glob ({KNOWN}).")
    files: dict[Path, None] = {}
    for given in map(str, paths):
        path = Path(given).expanduser()
        if path.is_file():
            if _reader(path) is None:
                raise UserError(
                    f"{given}: found the extension {path.suffix!r}, expected {KNOWN}. Convert or rename it."
                )
            found = [path]
        elif path.is_dir():
            inside = [file.relative_to(path) for file in sorted(path.rglob("*"))]
            found = [path / file for file in inside if not any(part.startswith(".") for part in file.parts)]
        elif glob.has_magic(given):
            found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (absolute too)
        else:
            raise UserError(f"{given}: does not exist, expected a file, directory or glob. Looked in {Path.cwd()}.")
        found = [file for file in found if file.is_file() and _reader(file)]
        if not found:
            raise UserError(f"{given}: found no data file in it, expected files with {KNOWN}. Check the path.")
        files |= dict.fromkeys(found)
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file}: found an empty file, expected rows. Remove it or create it again.")
    return list(files)


def content_hash(paths: Iterable[Path]) -> str:
    """One hash over the bytes of some files, in their order."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _read_file(path: Path) -> Iterator[Parsable]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _reader(path)(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}). Check the file, or download it again.") from None


def read_rows(
    paths: Sequence[str], on_bad_rows: str | BadRows | None = None, convert: Callable[[dict], Any] = lambda data: data
) -> Iterator[Row]:
    """Files, directories and globs -> their rows, streamed; `Row.data` is what `convert` makes of the row's dict.

    A row that `convert` refuses with BadRowError is a bad row like one that cannot be parsed. Raises UserError at once
    for what `expand` refuses; while reading for a broken file and for bad rows, as `BadRows` says; and if no row is
    left. Without a policy bad rows are judged at the end, so do not act on the rows before the iteration is over.
    """
    bad = on_bad_rows if isinstance(on_bad_rows, BadRows) else BadRows(on_bad_rows)
    return _rows(expand(paths), bad, convert)


def _rows(files: list[Path], bad: BadRows, convert: Callable[[dict], Any]) -> Iterator[Row]:
    total = 0
    try:
        for path in files:
            for place, parse in _read_file(path):
                total += 1
                try:
                    row = Row(f"{path}:{place}", convert(parse()))
                except BadRowError as problem:
                    bad.add(f"{path}:{place}", str(problem))
                else:
                    yield row
    except GeneratorExit:  # the caller had enough; what was skipped is still said
        bad.warn(total)
        raise
    if not total:
        raise UserError(f"{', '.join(map(str, files))}: found no rows, expected at least one. Check the files.")
    bad.finish(total)


def to_document(data: dict) -> str:
    """A row -> the text of its field "text", or "content" if it has no "text"; raises BadRowError."""
    name = "text" if data.get("text") is not None or data.get("content") is None else "content"
    if name not in data:
        raise BadRowError(f"found keys {shown(list(data))}, expected 'text': a string")
    if not isinstance(data[name], str):
        raise BadRowError(f"found {name!r}: {shown(data[name])}, expected a string")
    if not data[name].strip():
        raise BadRowError(f"found {name!r} without text, expected a string that is not empty")
    return data[name]


def read_documents(paths: Sequence[str], on_bad_rows: str | None = None) -> Iterator[str]:
    """Files, directories and globs -> the documents in them, streamed; raises UserError as `read_rows`."""
    return (row.data for row in read_rows(paths, on_bad_rows, to_document))
