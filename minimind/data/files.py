"""Raw data files -> rows, each with the place it came from.

A row that cannot be used is a *bad row*: named as `file:line` with what was found and what was expected, then refused or
skipped as `--on_bad_rows` says. Only a file whose structure is lost (a broken JSON list, an unclosed CSV quote) is
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from minimind.errors import UserError

logger = logging.getLogger(__name__)

BAD_ROW_SHARE = 0.001  # without a policy, more bad rows than this are an error
BAD_ROWS_NAMED = 5
BOM = b"\xef\xbb\xbf"
JSON_ROW = 'one JSON object per line, such as {"text": "..."}'
LIST_START = re.compile(r"\s*\[\s*")
LIST_SEPARATOR = re.compile(r"\s*(?:,\s*|(?P<end>\])\s*\Z)")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class Row(NamedTuple):
    """One row of a data file: `where` is "file:line" ("file:row N" for parquet)."""

    where: str
    data: Any


class BadRow(ValueError):
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
    """UTF-8 bytes -> text; raises BadRow naming the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"found byte 0x{raw[error.start]:02x} at byte offset {error.start}, expected UTF-8 text "
            "(a Chinese file from Windows: iconv -f gb18030 -t utf-8)"
        ) from None


def _json_row(value: Any, may_hold_surrogates: bool) -> dict:
    if not isinstance(value, dict):
        raise BadRow(f"found {shown(value)}, expected a JSON object, such as {{...}}")
    if may_hold_surrogates:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:  # JSON may escape half a character, which no tokenizer can encode
            raise BadRow("found half of a surrogate pair (\\ud800 to \\udfff), expected whole characters") from None
    return value


def _attempt(make: Callable[..., dict], *arguments: Any) -> dict | BadRow:
    """Call `make`; a BadRow is returned, since a generator that raised it could not go on to the next row."""
    try:
        return make(*arguments)
    except BadRow as problem:
        return problem


def _parse_line(raw: bytes) -> dict:
    text = decoded(raw)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"found {shown(text.strip())}, which is not JSON ({error}), expected {JSON_ROW}") from None
    return _json_row(value, SURROGATE_ESCAPE.search(text) is not None)


def _read_jsonl(path: Path, file: BinaryIO) -> Iterator[tuple]:
    for number, raw in enumerate(file, 1):
        raw = raw.removeprefix(BOM) if number == 1 else raw
        if raw.strip():
            yield number, _attempt(_parse_line, raw)


def _read_json(path: Path, file: BinaryIO) -> Iterator[tuple]:
    """A list of objects, or one object per line. Items are decoded one by one, so that each has its line number."""
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    if start and not start.startswith(b"["):
        yield from _read_jsonl(path, file)
        return
    try:
        text = decoded(file.read().removeprefix(BOM))
        if (opening := LIST_START.match(text)) is None:
            return
        decoder, position, line = json.JSONDecoder(), opening.end(), 1 + opening.group().count("\n")
        surrogates = SURROGATE_ESCAPE.search(text) is not None
        end = re.compile(r"\]\s*\Z").match(text, position)
        while not end:
            value, after = decoder.raw_decode(text, position)
            yield line, _attempt(_json_row, value, surrogates)
            if (separator := LIST_SEPARATOR.match(text, after)) is None:
                raise json.JSONDecodeError("Expecting ',' or the end of the list", text, after)
            line += text.count("\n", position, separator.end())
            position, end = separator.end(), separator["end"]
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON at column {error.colno} ({error.msg}), expected a list of objects. "
            "Mend the file there, or store one object per line as .jsonl, where bad rows can be skipped."
        ) from None
    except (BadRow, RecursionError) as error:
        raise UserError(f"{path}: {error}. Save the file again as a UTF-8 list of objects.") from None


def _read_txt(path: Path, file: BinaryIO) -> Iterator[tuple]:
    raw = file.read().removeprefix(BOM).replace(b"\r\n", b"\n")
    yield 1, _attempt(lambda: {"text": decoded(raw)})


def _read_csv(path: Path, file: BinaryIO, delimiter: str = ",") -> Iterator[tuple]:
    # The csv module refuses fields above 128 KiB by default; a document may be longer.
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header, line = None, 1
    try:
        for fields in reader:
            if fields and header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise UserError(f"{path}:{line}: found the header {header}, expected each column name once.")
            elif fields:
                yield line, _attempt(_csv_row, header, fields)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: not {path.suffix[1:]} ({error}), expected fields with their quotes closed and doubled "
            "inside. Mend the row that starts there."
        ) from None


def _csv_row(header: list[str], fields: list[str]) -> dict:
    if len(fields) != len(header):
        raise BadRow(f"found {len(fields)} fields, expected {len(header)}: {', '.join(header)}")
    for field in fields:
        decoded(field.encode("utf-8", "surrogateescape"))
    return dict(zip(header, fields, strict=True))


def _read_tsv(path: Path, file: BinaryIO) -> Iterator[tuple]:
    return _read_csv(path, file, delimiter="\t")


def _read_parquet(path: Path, file: BinaryIO) -> Iterator[tuple]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024):
            for number, data in enumerate(batch.to_pylist(), number + 1):
                yield f"row {number}", data
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}:row {number + 1}: not readable as parquet ({error}). Download it again.") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
