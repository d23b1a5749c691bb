"""The kinds of cleaning steps. A step is a frozen dataclass: its fields are its options, with their
only defaults.

Transform   text -> text
Filter      text -> why the row is removed, or None
Dedup       text -> key, and an index of the keys seen that names the earlier row a key repeats
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class CleaningStep:
    """One step with its options. Options that do not fit raise ValueError from `__post_init__`."""

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions the result depends on

    def files(self) -> list[str]:
        """Files the step reads besides the rows, as the recipe names them."""
        return []

    def prepare(self) -> None:
        """Load what the step needs, once in each process; raises UserError."""


@dataclass(frozen=True)
class Transform(CleaningStep):
    """Changes each text of a row separately."""

    machine: ClassVar[bool] = False  # reaches into machine-written JSON (tool calls) too

    def __call__(self, text: str) -> str:
        """The text after the step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Filter(CleaningStep):
    """Removes rows."""

    # Reads all texts of the row; default: its prose, without tool calls and rejected replies
    reads_all: ClassVar[bool] = False

    def reason(self, text: str) -> str | None:
        """Why a row with these joined texts is removed, in a few words that many rows share; None
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
        """Remember again what `take_new` returned."""


@dataclass(frozen=True)
class Dedup(CleaningStep):
    """Removes rows that repeat an earlier one; the first stays."""

    def key(self, text: str) -> Any:
        """What a row with these joined texts has in common with its copies; computed by the worker
        processes."""
        raise NotImplementedError

    def index(self) -> Index:
        """An empty index."""
        raise NotImplementedError
