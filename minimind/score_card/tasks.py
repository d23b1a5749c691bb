"""What a task of the score card is, and the card of a model."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from minimind.evaluation.scoring import Subject
from minimind.evaluation.statistics import Measure, estimate

CONTROLS = "controls"  # the result of those, in a card beside the tasks'


class TaskResult(NamedTuple):
    """What a task found: its `measures` by name, the `section` of the card's JSON with the task's
    name, other `entries` of the card's JSON, and by the keys of items `details` of them, such as
    the replies.

    The measures are compared between models and drawn. The first stands for all, and those that
    matter more come first: a table shows only as many as fit.
    """

    measures: Mapping[str, Measure]
    section: dict
    entries: Mapping[str, Any] = {}
    details: Mapping[str, Mapping[str, Any]] = {}


class Task(Protocol):
    """Something a model can be scored by. It read and checked its file when it was made.

    Its attributes decide, together with the model, what `run` returns: a result is used again as
    long as they have the same `repr`. Names that begin with _ are left out of that.

    It may have two more methods, the second only if a control can take the model's place:

        item_texts() -> Mapping[str, Sequence[str]]
            the texts of each item that a model may have learned by heart, by the item's key
        shuffled(generator: np.random.Generator) -> Task | None
            the same items with labels that are drawn anew; None where items have no labels
    """

    name: str  # of the section in the card's JSON, such as "pairs"
    needs_chat: bool = False  # whether it asks, so that a base model cannot do it

    def run(self, subject: Subject) -> TaskResult:
        """Score a model, or a control in its place."""
        ...


class Card(NamedTuple):
    """What a model's directory scored: the result of each task by the task's name."""

    directory: str
    results: Mapping[str, TaskResult]

    def entries(self) -> dict[str, Any]:
        """The card as JSON: the section of each task, and by its name in "measures" all its
        measures, as `estimate` describes them."""
        entries: dict[str, Any] = {"directory": self.directory}
        for name, result in self.results.items():
            entries |= {name: result.section} if result.section else {}
            entries |= result.entries
        estimates = {
            task: {name: estimate(measure) for name, measure in result.measures.items()}
            for task, result in self.results.items()
            if result.measures
        }
        return entries | {"measures": estimates}
