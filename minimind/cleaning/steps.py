"""What a step of a recipe is. A step is a frozen dataclass: its fields are its options, with their
only defaults.

Transform   text -> text
Filter      text -> why the row is removed, or None
Dedup       text -> key, and an index of the keys seen that names the earlier row a key repeats
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from minimind.common.errors import UserError


@dataclass(frozen=True)
class Step:
    """One step with its options. Options that do not fit raise ValueError from `__post_init__`."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions the result depends on

    def files(self) -> list[str]:
        """Files the step reads besides the rows, as given in the recipe."""
        return []

    def prepare(self) -> None:
        """Load what the step needs, once in each process; raises UserError."""


@dataclass(frozen=True)
class Transform(Step):
    """Changes each text of a row by itself."""

    machine: ClassVar[bool] = False  # reaches into machine-written JSON (tool calls) too

    def __call__(self, text: str) -> str:
        """A text -> the text after the step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Filter(Step):
    """Removes rows."""

    # Judges all texts of the row; default: its prose, without tool calls and rejected
    whole: ClassVar[bool] = False

    def reason(self, text: str) -> str | None:
        """The joined texts of a row -> why it is removed, in a few words that many rows share; None
        keeps it."""
        raise NotImplementedError


class Index(Protocol):
    """The rows seen so far by a `Dedup` step."""

    def find_or_add(self, key: Any, number: int) -> int | None:
        """The number of the earlier row that `key` repeats; None if it repeats none, and then it is
        remembered."""

    def take_new(self) -> dict[str, Any]:
        """What was remembered since the last call, as numpy arrays."""

    def restore(self, arrays: dict[str, Any]) -> None:
        """Remember again what `take_new` gave."""


@dataclass(frozen=True)
class Dedup(Step):
    """Removes rows that repeat an earlier one; the first stays."""

    def key(self, text: str) -> Any:
        """The joined texts of a row -> what its copies have in common; computed by the worker
        processes."""
        raise NotImplementedError

    def index(self) -> Index:
        """An empty index."""
        raise NotImplementedError


def closest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for a misspelt name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def fits(value: Any, expected: Any) -> bool:
    """Whether a value from YAML is of the type `expected`; an int is a float, a bool is not an
    int."""
    if expected is Any:
        return True
    if isinstance(expected, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(expected))
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def type_name(expected: Any) -> str:
    """How a type is called in a message about YAML."""
    if isinstance(expected, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(expected)))
    if typing.get_origin(expected) is list:
        return f"a list, each item {type_name(*typing.get_args(expected))}"
    names = {
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        types.NoneType: "null",
    }
    return names.get(expected, str(expected))


def build(cls: type, options: Any, where: str) -> Any:
    """A dataclass from the options of a recipe, each checked by name and type; raises UserError
    naming `where`."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        raise UserError(f"{where}: found {options!r}, expected options as 'name: value' pairs.")
    expected = {
        name: hint
        for name, hint in typing.get_type_hints(cls).items()
        if typing.get_origin(hint) is not ClassVar
    }
    for name, value in options.items():
        if name not in expected:
            known = ", ".join(expected) or "none"
            raise UserError(
                f"{where}: found the unknown option {name!r}{closest(str(name), expected)},"
                f" expected: {known}."
            )
        if not fits(value, expected[name]):
            raise UserError(
                f"{where}: {name}: found {value!r}, expected {type_name(expected[name])}."
            )
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


def options_of(step: Any) -> dict[str, Any]:
    """All options of a step with their values."""
    return dataclasses.asdict(step)
