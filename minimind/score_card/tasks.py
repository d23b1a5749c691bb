"""What a task of the score card is."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from minimind.evaluation.scoring import Subject
from minimind.evaluation.statistics import Measure


class Result(NamedTuple):
    """What a task found: its `measures` by name (first the one that stands for all), which are
    compared between models and drawn, and the `section` of the card's JSON."""

    measures: Mapping[str, Measure]
    section: dict


class Task(Protocol):
    """Something a model can be scored by. It read and checked its file when it was made."""

    name: str  # of the section in the card's JSON, such as "pairs"

    def run(self, subject: Subject) -> Result:
        """Score a model, or a control in its place."""
        ...

    def texts(self) -> Mapping[str, Sequence[str]]:
        """What a model could have learned by heart of each item, by the item's key in the
        measures."""
        ...

    def shuffled(self, generator: np.random.Generator) -> "Task | None":
        """The same items with random labels; None where they have none."""
        ...
