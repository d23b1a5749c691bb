"""JSON files -> rows: one object a line, one list of objects, or one object that holds the rows.

Objects are parsed strictly (each key once, whole characters, finite numbers) and lists piece by
piece.
"""

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated
from minimind.data.bad_rows import decoded
from minimind.data.columns import KNOWN
from minimind.data.json_objects import LENIENT, STRICT, _checked, parse_line

logger = logging.getLogger(__name__)

ROW_LIMIT = 1 << 28  # bytes of one row; what is longer is most likely a file without line ends
BUFFER = 1 << 20  # bytes read at a time
BOM = codecs.BOM_UTF8
JSON_SPACE = re.compile(r"[ \t\n\r]*")
SPREAD = re.compile(rb'\{\s*["}]|\[\s*[\]{]')  # how an object, or a list of objects, begins
# Keys that hold the rows
WRAPPERS = ("train", "data", "rows", "examples", "instances", "items", "records", "samples")

Parsable = tuple[int | str, Callable[[], dict]]


def refuse(problem: BadRowError) -> dict:
    raise problem


def too_long() -> dict:
    raise BadRowError(
        f"found a row of more than {ROW_LIMIT:,} bytes, expected shorter rows, with line ends"
        " between"
    )


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, with their numbers; None for one of more than ROW_LIMIT
    bytes."""
    for number, raw in enumerate(iter(partial(file.readline, ROW_LIMIT), b""), 1):
        line = raw.removeprefix(BOM) if number == 1 else raw
        if len(raw) == ROW_LIMIT and not raw.endswith(b"\n"):
            line = None
            while (rest := file.readline(BUFFER)) and not rest.endswith(b"\n"):
                pass
        yield number, line


def read_jsonl(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """One object a line; objects or a list that are spread over lines are read as .json."""
    if SPREAD.match(_start(file)) and _first_line(file) in (b"{", b"["):
        yield from read_json(path, file, text_unit)
        return
    for number, line in read_lines(file):
        if line is None:
            yield number, too_long
        elif line and not line.isspace():
            yield number, partial(parse_line, line)


def _start(file: BinaryIO) -> bytes:
    """What is in the buffer, from the first character that is no space."""
    return file.peek(BUFFER).removeprefix(BOM).lstrip()


def _first_line(file: BinaryIO) -> bytes:
    """The first line that is not blank, as far as it is in the buffer, without the space around
    it."""
    return _start(file).split(b"\n", 1)[0].rstrip()


def _is_spread(file: BinaryIO) -> bool:
    """Whether the first object goes on beyond its first line; a line that is cut within a string
    does not."""
    line = _first_line(file)
    is_cut = line.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') % 2
    return bool(SPREAD.match(_start(file))) and not is_cut and not line.endswith((b"}", b"},"))


class _Window:
    """The stretch of a text file that is being parsed; what lies before `position` is dropped as
    more is read."""

    def __init__(self, file: BinaryIO):
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.line, self.column, self.ended = "", 0, 1, 1, False

    def advance(self, end: int) -> None:
        """Go on to the position `end`; line and column follow."""
        if newlines := self.text.count("\n", self.position, end):
            self.line, self.column = (
                self.line + newlines,
                end - self.text.rindex("\n", self.position, end),
            )
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
        """Go on beyond the next value -> what gives it as a row; raises json.JSONDecodeError and
        RecursionError."""
        while True:
            try:
                parse, end = self._value()
            except json.JSONDecodeError as error:
                # What was cut off at the end of the text fails there, or as a string that does not
                # end.
                cut_off = error.pos > len(self.text) - 16 or error.msg.startswith(
                    "Unterminated string"
                )
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
            return partial(refuse, problem), LENIENT.raw_decode(self.text, self.position)[1]
        return partial(_checked, value, self.text[self.position : end]), end


def read_json(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """A list of objects, decoded one by one as the file is read; one object that holds the rows; or
    as .jsonl."""
    if _start(file).startswith(b"["):
        yield from _read_list(path, file)
    elif _is_spread(file):
        yield from _read_objects(path, file)
    else:
        rows = read_jsonl(path, file, text_unit)
        first, second = next(rows, None), next(rows, None)
        if first and second is None:
            yield from _rows_within(path, *first)
        elif first:
            yield first
            yield second
            yield from rows


def _read_objects(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    """Objects one after the other, each over several lines; one alone may hold the rows."""
    window = _Window(file)
    try:
        window.next_character()
        line, parse = window.line, window.value()
        if not window.next_character():
            yield from _rows_within(path, line, parse)
            return
        yield line, parse
        while window.next_character():
            line = window.line
            yield line, window.value()
    except json.JSONDecodeError as error:
        window.advance(error.pos)
        if len(window.text) > ROW_LIMIT:
            raise UserError(
                f"{path}: found one object of more than {ROW_LIMIT:,} bytes, expected a list of"
                " objects, or one object per line as .jsonl."
            ) from None
        raise _broken(path, window.line, window.column, error.msg) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}:{window.line}: {error}. Save the file again as a list of objects in UTF-8."
        ) from None


def _rows_within(path: Path, place: int | str, parse: Callable[[], dict]) -> Iterator[Parsable]:
    """The rows that the only object of a file holds, or is."""
    try:
        value = parse()
    except BadRowError as problem:
        yield place, partial(refuse, problem)
        return
    rows = rows_of(value, str(path))
    if rows == [value]:
        yield place, partial(dict, value)
    else:
        yield from ((f"row {number}", partial(dict, row)) for number, row in enumerate(rows, 1))


def rows_of(value: dict, name: str) -> list[dict]:
    """The rows within the one object of a file: in a list under a usual key, as columns, or the
    object itself.

    Of a "train" part beside others, such as "test", only that is read; a log line says so.
    """
    parts = {key: part for key, part in value.items() if _holds_rows(part)}
    if KNOWN.isdisjoint(map(str.lower, value)) and (
        len(parts) == 1 or not parts.keys().isdisjoint(WRAPPERS)
    ):
        key = next((key for key in WRAPPERS if key in parts), next(iter(parts)))
        if others := [other for other in parts if other != key]:
            left_out = ", ".join(map(repr, others))
            logger.warning(
                "%s", translated(f"{name}: read the rows of {key!r}, not those of {left_out}")
            )
        return [
            row["row"] if "row_idx" in row and isinstance(row.get("row"), dict) else row
            for row in parts[key]
        ]
    return _transposed(value) or [value]


def _holds_rows(part: Any) -> bool:
    """Whether a value is a list of objects, as rows are."""
    return isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)


def _transposed(value: dict) -> list[dict] | None:
    """Columns -> rows: lists of equal length, or dicts by the same numbers (pandas'); None where it
    is no table."""
    # pandas' "split"
    if set(value) >= {"columns", "data"} and all(isinstance(row, list) for row in value["data"]):
        return [dict(zip(value["columns"], row, strict=False)) for row in value["data"]]
    columns = list(value.values())
    kinds = {type(column) for column in columns}
    if kinds == {list} and len({len(column) for column in columns}) == 1:
        # One row with lists of messages
        if any(isinstance(item, dict) for column in columns for item in column):
            return None
        return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    numbered = kinds == {dict} and columns[0] and all(map(str.isdecimal, columns[0]))
    if numbered and all(column.keys() == columns[0].keys() for column in columns):
        return [{key: column[index] for key, column in value.items()} for index in columns[0]]
    return None


def _broken(path: Path, line: int, column: int, problem: str) -> UserError:
    return UserError(
        f"{path}:{line}: not JSON at column {column} ({problem}), expected a list of objects. "
        "Fix the file there, or store one object per line as .jsonl, where bad rows can be skipped."
    )


def _read_list(path: Path, file: BinaryIO) -> Iterator[Parsable]:
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
                raise _broken(path, line, column, "expecting ',' or the end of the list")
        window.advance(window.position + 1)
        if window.next_character():
            raise _broken(path, window.line, window.column, "more text after the end of the list")
    except json.JSONDecodeError as error:
        window.advance(error.pos)
        raise _broken(path, window.line, window.column, error.msg) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # not UTF-8, a number or nesting beyond Python's limits
        raise UserError(
            f"{path}:{window.line}: {error}. Save the file again as a list of objects in UTF-8."
        ) from None
