"""JSON text -> an object, parsed strictly: each key once, whole characters, finite numbers."""

import json
import math
import re
from collections import Counter
from typing import Any

import orjson

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import decoded, shown

MAX_DEPTH = 100  # lists and objects within each other in one row
CONTAINERS = {dict, list}
JSON_ROW = "one JSON object per line (a .json file may also be one list of objects)"
KEY_END = re.compile(rb'"[ \t\n\r]*:')
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise BadRowError(
            f"found the key {shown(twice)} twice in one object, expected each key once"
        )
    return value


def _no_constant(name: str) -> None:
    raise BadRowError(f"found {name}, which is not JSON, expected a number or null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise BadRowError(
            f"found the number {digits[:20]}..., expected one within the range of floating point"
        )
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
    """The keys of all objects within a value; raises BadRowError where it is nested deeper than
    MAX_DEPTH."""
    if depth > MAX_DEPTH:
        raise BadRowError(
            f"found lists and objects nested more than {MAX_DEPTH} deep, expected a row of text"
        )
    count, items = (len(value), value.values()) if isinstance(value, dict) else (0, value)
    # The parsers make no subclasses, and most items are text: tests in order of speed
    for item in items:
        if item.__class__ is not str and item.__class__ in CONTAINERS:
            count += count_keys(item, depth + 1)
    return count


def _checked(value: Any, text: str) -> dict:
    """What the strict decoder made of `text` -> the row; raises BadRowError."""
    if isinstance(value, dict | list):
        count_keys(value)
    if not isinstance(value, dict):
        raise BadRowError(f"found {shown(value)}, expected a JSON object, such as {{...}}")
    # JSON can escape half a character, which no tokenizer can encode
    if SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise BadRowError(
                "found half of a surrogate pair (\\ud800 to \\udfff), expected whole characters"
            ) from None
    return value


def _parse_strictly(raw: bytes) -> dict:
    text = decoded(raw).strip().removeprefix("\ufeff")
    text = text.removesuffix(",") if text.endswith("},") else text  # a list without its brackets
    try:
        value = STRICT.decode(text)
    except BadRowError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")
        reason += (
            "; a line break within a text is written \\n"
            if reason.startswith("Unterminated")
            else ""
        )
        raise BadRowError(
            f"found {text[:60]!r}, which is not JSON ({reason}), expected {JSON_ROW}"
        ) from None
    return _checked(value, text)


def parse_line(raw: bytes) -> dict:
    """The bytes of one line -> its JSON object; integers beyond 64 bits become floats. Raises
    BadRowError.

    The fast parser decides where it is seen to be right, else the strict one.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _parse_strictly(raw)
    # An object that names a key twice has fewer keys than were written. Text may look like the end
    # of a key too, so the count of those is never too low, and where it is too high the strict
    # parser tells.
    if isinstance(value, dict) and len(KEY_END.findall(raw)) == count_keys(value):
        return value
    return _parse_strictly(raw)
