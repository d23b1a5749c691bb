"""JSON files -> rows: one object per line, a list of objects, or one object that holds the rows."""

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated
from minimind.data.bad_rows import decoded
from minimind.data.columns import KNOWN
from minimind.data.json_objects import STRICT, check_object, parse_line
from minimind.data.lines import BOM, BUFFER, ROW_LIMIT, Parsable, read_lines, too_long

logger = logging.getLogger(__name__)

LENIENT = json.JSONDecoder()
JSON_SPACE = re.compile(r"[ \t\n\r]*")
SPREAD = re.compile(rb'\{\s*["}]|\[\s*[\]{]')  # how an object, or a list of objects, begins
# Keys that hold the rows
WRAPPERS = ("train", "data", "rows", "examples", "instances", "items", "records", "samples")


def read_jsonl(path: Path, file: BinaryIO, text_unit: str) -> Iterator[Parsable]:
    """One object per line; objects or a list that are spread over lines are read as .json."""
    if SPREAD.match(_start(file)) and _first_line(file) in (b"{", b"["):
        yield from read_json(path, file, text_unit)
        return
    for number, line in read_lines(file):
        if line is None:
            yield number, too_long
        elif line and not line.isspace():
            yield number, partial(parse_line, line)


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
        if first and second:
            yield from chain((first, second), rows)
        elif first:
            yield from _rows_within(path, *first)


def _start(file: BinaryIO) -> bytes:
    """The content of the buffer, from the first character that is not white space."""
    return file.peek(BUFFER).removeprefix(BOM).lstrip()


def _first_line(file: BinaryIO) -> bytes:
    """The first line in the buffer that is not blank, stripped."""
    return _start(file).split(b"\n", 1)[0].rstrip()


def _is_spread(file: BinaryIO) -> bool:
    """Whether the first object continues after its first line; a line that is cut off within a
    string is taken for a broken row."""
    line = _first_line(file)
    is_cut = line.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') % 2
    return bool(SPREAD.match(_start(file))) and not is_cut and not line.endswith((b"}", b"},"))


# Values that are spread over lines


def _read_list(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    window = _Window(path, file)
    with window.naming_errors():
        window.next_character()
        window.advance(window.position + 1)
        character = window.next_character()
        while character != "]":
            yield window.line, window.value()
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


def _read_objects(path: Path, file: BinaryIO) -> Iterator[Parsable]:
    """Objects one after the other, each over several lines; a single one may hold the rows."""
    window = _Window(path, file)
    with window.naming_errors():
        window.next_character()
        line, parse = window.line, window.value()
        if not window.next_character():
            yield from _rows_within(path, line, parse)
            return
        yield line, parse
        while window.next_character():
            yield window.line, window.value()


class _Window:
    """The part of a JSON file that is being parsed; earlier text is dropped as more is read."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.line, self.column, self.ended = "", 0, 1, 1, False

    def advance(self, end: int) -> None:
        """Move to the position `end`, and count lines and columns."""
        if newlines := self.text.count("\n", self.position, end):
            self.line += newlines
            self.column = end - self.text.rindex("\n", self.position, end)
        else:
            self.column += end - self.position
        self.position = end

    def read_more(self) -> None:
        """Read at least as much as is left, so that a long value is not tried too often."""
        self.text, self.position = self.text[self.position :], 0
        raw = self.file.read(max(BUFFER, len(self.text)))
        try:
            self.text += self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode("utf-8")
            self.advance(len(self.text))
            decoded(error.object[error.start :])
        self.ended = not raw

    def next_character(self) -> str:
        """Move to the next character that is not white space; "" at the end of the file."""
        while True:
            self.advance(JSON_SPACE.match(self.text, self.position).end())
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.read_more()

    def value(self) -> Callable[[], dict]:
        """Move beyond the next value; returns a function that returns it as a row or refuses it.

        Raises json.JSONDecodeError and RecursionError.
        """
        while True:
            try:
                parse, end = self._value()
            except json.JSONDecodeError as error:
                # A value that is cut off at the end of the text fails there, or as a string
                # without end
                is_unterminated = error.msg.startswith("Unterminated string")
                is_cut = is_unterminated or error.pos > len(self.text) - 16
                if self.ended or not is_cut or len(self.text) - self.position > ROW_LIMIT:
                    raise
            else:
                # A number may continue, as 1.5 by e+16
                if end < len(self.text) - 2 or self.ended:
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
        return partial(check_object, value, self.text[self.position : end]), end

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Turn what the decoders raise into one UserError with the place in the file."""
        is_list = _start(self.file).startswith(b"[")
        try:
            yield
        except json.JSONDecodeError as error:
            self.advance(error.pos)
            if not is_list and len(self.text) > ROW_LIMIT:
                raise UserError(
                    f"{self.path}: found one object of more than {ROW_LIMIT:,} bytes, expected a"
                    " list of objects, or one object per line as .jsonl."
                ) from None
            raise _broken(self.path, self.line, self.column, error.msg) from None
        # Not UTF-8, or a number or nesting beyond Python's limits
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}:{self.line}: {error}. Save the file again as a list of objects in"
                " UTF-8."
            ) from None


def _refuse(problem: BadRowError) -> dict:
    raise problem


def _broken(path: Path, line: int, column: int, problem: str) -> UserError:
    return UserError(
        f"{path}:{line}: not JSON at column {column} ({problem}), expected a list of objects. "
        "Fix the file there, or store one object per line as .jsonl, where bad rows can be skipped."
    )


# Rows within one object


def _rows_within(path: Path, place: int | str, parse: Callable[[], dict]) -> Iterator[Parsable]:
    """The rows that the only object of a file holds, or the object itself."""
    try:
        value = parse()
    except BadRowError as problem:
        yield place, partial(_refuse, problem)
        return
    rows = rows_of(value, str(path))
    if rows == [value]:
        yield place, partial(dict, value)
    else:
        yield from ((f"row {number}", partial(dict, row)) for number, row in enumerate(rows, 1))


def rows_of(value: dict, name: str) -> list[dict]:
    """The rows within the one object of a file: in a list under a usual key, as columns, or the
    object itself.

    Of a "train" part beside others, such as "test", only that is read, which is logged.
    """
    parts = {key: part for key, part in value.items() if _holds_rows(part)}
    has_wrapper = len(parts) == 1 or not parts.keys().isdisjoint(WRAPPERS)
    if not has_wrapper or not KNOWN.isdisjoint(map(str.lower, value)):
        return _transposed(value) or [value]
    key = next((key for key in WRAPPERS if key in parts), next(iter(parts)))
    if others := [other for other in parts if other != key]:
        left_out = ", ".join(map(repr, others))
        message = f"{name}: read the rows of {key!r}, not those of {left_out}"
        logger.warning("%s", translated(message))
    return [  # the Hub's viewer wraps each row once more
        row["row"] if "row_idx" in row and isinstance(row.get("row"), dict) else row
        for row in parts[key]
    ]


def _holds_rows(part: Any) -> bool:
    """Whether a value is a list of objects, as rows are."""
    return isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)


def _transposed(value: dict) -> list[dict] | None:
    """Columns -> rows: lists of equal length, or dicts by the same numbers (pandas'); None for
    anything that is not a table."""
    # The "split" layout of pandas
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
