"""One JSON text -> an object, parsed strictly: unique keys, complete characters, finite numbers."""

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


def parse_line(raw: bytes) -> dict:
    """The JSON object in the bytes of one line; integers beyond 64 bits become floats.

    The fast parser keeps the last value of a repeated key, so its result counts only if it has as
    many keys as the text has key ends. Other text may look like a key end too, never the reverse:
    where the counts differ the strict parser, which takes twice the time, decides.

    Raises:
        BadRowError: not JSON, not an object, or one that loses something.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _parse_strictly(raw)
    if isinstance(value, dict) and len(KEY_END.findall(raw)) == count_keys(value):
        return value
    return _parse_strictly(raw)


def count_keys(value: dict | list, depth: int = 1) -> int:
    """The keys of all objects within a value; raises BadRowError for one nested too deep."""
    if depth > MAX_DEPTH:
        raise BadRowError(
            f"found lists and objects nested more than {MAX_DEPTH} deep, expected a row of text"
        )
    count, items = (len(value), value.values()) if isinstance(value, dict) else (0, value)
    # Parsers return no subclasses, and most items are text: the fastest test comes first
    for item in items:
        if item.__class__ is not str and item.__class__ in CONTAINERS:
            count += count_keys(item, depth + 1)
    return count


def _parse_strictly(raw: bytes) -> dict:
    text = decoded(raw).strip().removeprefix("\ufeff")
    text = text.removesuffix(",") if text.endswith("},") else text  # a list without its brackets
    try:
        value = STRICT.decode(text)
    except BadRowError:
        raise
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")
        if reason.startswith("Unterminated"):
            reason += "; a line break within a text is written \\n"
        raise BadRowError(
            f"found {text[:60]!r}, which is not JSON ({reason}), expected {JSON_ROW}"
        ) from None
    return check_object(value, text)


def check_object(value: Any, text: str) -> dict:
    """The object that STRICT decoded from `text`; raises BadRowError for another value, too deep a
    nesting and half characters."""
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
                "found half of a surrogate pair (\\ud800 to \\udfff), expected complete characters"
            ) from None
    return value


# The strict decoder


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise BadRowError(f"found the key {shown(key)} twice in one object, expected each key once")
    return value


def _no_constant(name: str) -> None:
    raise BadRowError(f"found {name}, which is not JSON, expected a number or null")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise BadRowError(
            f"found the number {digits[:20]}..., expected one within the range of floating point"
        )
    return number


def _integer(digits: str) -> int | float:
    if len(digits) <= 20 and -(2**63) <= (number := int(digits)) < 2**64:
        return number
    return _finite(digits)


STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_integer
)
