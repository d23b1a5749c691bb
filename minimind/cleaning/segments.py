"""The work of one process: a batch of rows through the steps that look at one row at a time."""

import datetime
import decimal
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minimind.cleaning.counts import CHANGED, Counts
from minimind.cleaning.recipe import Recipe
from minimind.cleaning.steps import Dedup, Transform
from minimind.cleaning.texts import Texts

NOTHING_LEFT = "no text left"


class Item(NamedTuple):
    """A row on its way: its number in the input from 1 on (bad rows counted), its place and its
    fields."""

    number: int
    where: str
    row: dict


class Segment(NamedTuple):
    """A run of steps for single rows, and the `Dedup` step that ends it (None for the last)."""

    steps: list[tuple[str, Any]]
    dedup: tuple[str, Any] | None


def segments_of(recipe: Recipe) -> list[Segment]:
    """A recipe -> its segments; there is one more than `Dedup` steps."""
    segments, steps = [], []
    for label, step in zip(recipe.labels, recipe.steps, strict=True):
        if isinstance(step, Dedup):
            segments.append(Segment(steps, (label, step)))
            steps = []
        else:
            steps.append((label, step))
    return [*segments, Segment(steps, None)]


@dataclass
class Done:
    """A batch after one segment: what is left, as items with the keys of its dedup step, or as
    lines of JSON."""

    items: list[Item] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def group_of(recipe: Recipe, row: dict) -> str | None:
    """The group a row is counted in, or None."""
    value = row.get(recipe.settings.group_by) if recipe.settings.group_by else None
    return value if isinstance(value, str) else None


def run_segment(recipe: Recipe, number: int, items: list[Item], as_lines: bool = True) -> Done:
    """Put items through the recipe's segment with this number, changing the rows in place.

    The last segment gives lines; without `as_lines` each gives items, and no keys.
    """
    segments = segments_of(recipe)
    segment, limit = segments[number], recipe.settings.examples
    done = Done()
    for item in items:
        texts, group = Texts(item.row), group_of(recipe, item.row)
        if number == 0 and group is not None:
            done.counts.group(group)["rows_in"] += 1
            done.counts.group(group)["characters_in"] += len(texts.whole)
        if not all(
            _apply(label, step, item, texts, group, done.counts, limit)
            for label, step in segment.steps
        ):
            continue
        if not as_lines:
            done.items.append(item)
        elif segment.dedup:
            done.items.append(item)
            done.keys.append(segment.dedup[1].key(texts.whole))
        else:
            done.lines.append(to_line(item.row))
            if group is not None:
                done.counts.group(group)["rows_out"] += 1
                done.counts.group(group)["characters_out"] += len(texts.whole)
    return done


def _apply(
    label: str, step: Any, item: Item, texts: Texts, group: str | None, counts: Counts, limit: int
) -> bool:
    """Put one row through one step, counted; returns whether it stays."""
    before, step_counts = texts.whole, counts.step(label)
    step_counts.rows_in += 1
    step_counts.characters_in += len(before)
    reason = None
    if isinstance(step, Transform):
        changed, emptied = (texts.mask if step.machine else texts.replace)(step)
        reason = NOTHING_LEFT if emptied else None
        if changed and not emptied:
            step_counts.rows_changed += 1
            step_counts.add_example(
                CHANGED, limit, item.number, item.where, before, after=texts.whole
            )
    else:
        reason = step.reason(before if step.whole else texts.prose)
    if reason is not None:
        counts.remove(
            label, reason, group, limit, number=item.number, where=item.where, before=before
        )
        return False
    step_counts.characters_out += len(texts.whole)
    return True


def to_line(row: dict) -> bytes:
    """A row -> its line of JSON, dates as ISO 8601 text."""
    return json.dumps(row, ensure_ascii=False, default=_to_json).encode() + b"\n"


def _to_json(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
