"""The options of steps: dataclasses from YAML, each value checked by name, type and range."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, ClassVar

from minimind.common.errors import UserError

TYPE_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
}


def closest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for a misspelt name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def fits(value: Any, expected: Any) -> bool:
    """Whether a value from YAML is of the type `expected`; an int is a float, a bool is no int."""
    options = typing.get_args(expected)
    if isinstance(expected, types.UnionType):
        return any(fits(value, option) for option in options)
    if typing.get_origin(expected) is list:
        return isinstance(value, list) and all(fits(item, options[0]) for item in value)
    if expected in (int, float):
        expected = int | float if expected is float else int
        return isinstance(value, expected) and not isinstance(value, bool)
    return isinstance(value, expected)


def type_name(expected: Any) -> str:
    """What a type is called in a message about YAML."""
    if isinstance(expected, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(expected)))
    if typing.get_origin(expected) is list:
        return f"a list, each item {type_name(*typing.get_args(expected))}"
    return TYPE_NAMES[expected]


def build(cls: type, options: Any, where: str) -> Any:
    """A dataclass with the options of a recipe; raises UserError naming `where`."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise UserError(f"{where}: found {options!r}, expected options as 'name: value' pairs.")
    hints = typing.get_type_hints(cls).items()
    expected = {name: hint for name, hint in hints if typing.get_origin(hint) is not ClassVar}
    for name, value in options.items():
        if name not in expected:
            known = ", ".join(expected) or "none"
            raise UserError(
                f"{where}: found the unknown option {name!r}{closest(str(name), expected)},"
                f" expected: {known}."
            )
        if not fits(value, expected[name]):
            wanted = type_name(expected[name])
            raise UserError(f"{where}: {name}: found {value!r}, expected {wanted}.")
    try:
        return cls(**options)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from None


def check_share(step: Any, *names: str) -> None:
    """Raise ValueError if an option that is a share lies outside of 0 to 1."""
    for name in names:
        value = getattr(step, name)
        for share in value if isinstance(value, list) else [value]:
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name}: found {share}, expected 0 to 1")


def check_positive(step: Any, *names: str) -> None:
    """Raise ValueError if an option that is a count is below 1."""
    for name in names:
        value = getattr(step, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
