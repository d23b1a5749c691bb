"""`minimind evaluate`: the score card of a model, its controls, and the comparison of cards."""

# ruff: noqa: F401 (the public names of this room)

from minimind.score_card.minimal_pairs import MinimalPair, PairsTask, read_pairs
from minimind.score_card.tasks import Result, Task
