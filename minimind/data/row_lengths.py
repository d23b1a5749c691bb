"""How many tokens the rows of a stage have."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple


class RowLength(NamedTuple):
    """Tokens of a row.

    tokens: of all its sequences; of a preference pair two, so the prompt twice.
    length: in a batch; of a pair whose prompt is shared all three parts, else the longer sequence.
    predicted: those that the head has to predict.
    """

    tokens: int
    length: int
    predicted: int


def row_lengths(columns: dict[str, list], pairs: bool, shared_prompts: bool) -> list[RowLength]:
    """The lengths of rows; of `pairs`, with their prompts once where these are shared."""
    if not pairs:
        lengths = map(len, columns["input_ids"])
        return [RowLength(length, length, length) for length in lengths]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = zip(*(map(len, columns[name]) for name in names), strict=True)
    return [
        RowLength(
            2 * prompt + chosen + rejected,
            prompt + (chosen + rejected if shared_prompts else max(chosen, rejected)),
            chosen + rejected,
        )
        for prompt, chosen, rejected in rows
    ]


def shares(lengths: Sequence[RowLength]) -> dict[str, float]:
    """Of pairs with shared prompts: for each position, how many are `predicting`, and how many
    tokens are `counted`."""
    positions = fmean(each.length for each in lengths)
    return {
        "predicting": fmean(each.predicted for each in lengths) / positions,
        "counted": fmean(each.tokens for each in lengths) / positions,
    }
