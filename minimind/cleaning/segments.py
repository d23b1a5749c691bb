"""The work of one process: a batch of rows through the steps that look at one row at a time."""

import datetime
import decimal
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minimind.cleaning.counts import CHANGED, Counts
from minimind.cleaning.procedure import Procedure
from minimind.cleaning.row_texts import RowTexts
from minimind.cleaning.steps import Dedup, Transform

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


def segments_of(procedure: Procedure) -> list[Segment]:
    """The segments of a procedure, one more than it has `Dedup` steps."""
    segments, steps = [], []
    for label, step in zip(procedure.labels, procedure.steps, strict=True):
        if isinstance(step, Dedup):
            segments.append(Segment(steps, (label, step)))
            steps = []
        else:
            steps.append((label, step))
    return [*segments, Segment(steps, None)]


@dataclass
class Result:
    """A batch after one segment: what is left, as items with the keys of its dedup step, or as
    lines of JSON."""

    items: list[Item] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def group_of(procedure: Procedure, row: dict) -> str | None:
    """The group a row is counted in, or None."""
    value = row.get(procedure.settings.group_by) if procedure.settings.group_by else None
    return value if isinstance(value, str) else None


def run_segment(
    procedure: Procedure, number: int, items: list[Item], as_lines: bool = True
) -> Result:
    """Put items through a segment of the procedure, changing the rows in place.

    The last segment returns lines; without `as_lines` every segment returns items, and no keys.
    """
    segment, limit = segments_of(procedure)[number], procedure.settings.examples
    result = Result()
    counts = result.counts
    for item in items:
        texts, group = RowTexts(item.row), group_of(procedure, item.row)
        if number == 0 and group is not None:
            counts.group(group)["rows_in"] += 1
            counts.group(group)["characters_in"] += len(texts.all_text)
        if not all(
            _apply(label, step, item, texts, group, counts, limit) for label, step in segment.steps
        ):
            continue
        if segment.dedup or not as_lines:
            result.items.append(item)
            if as_lines:
                result.keys.append(segment.dedup[1].key(texts.all_text))
        else:
            result.lines.append(to_line(item.row))
            if group is not None:
                counts.group(group)["rows_out"] += 1
                counts.group(group)["characters_out"] += len(texts.all_text)
    return result


def _apply(
    label: str,
    step: Any,
    item: Item,
    texts: RowTexts,
    group: str | None,
    counts: Counts,
    limit: int,
) -> bool:
    """Put one row through one step, counted; returns whether it stays."""
    before, step_counts = texts.all_text, counts.step(label)
    example = {"number": item.number, "where": item.where, "before": before}
    step_counts.rows_in += 1
    step_counts.characters_in += len(before)
    if isinstance(step, Transform):
        changed, emptied = (texts.mask if step.machine else texts.replace)(step)
        reason = NOTHING_LEFT if emptied else None
        if changed and not emptied:
            step_counts.rows_changed += 1
            step_counts.add_example(CHANGED, limit, **example, after=texts.all_text)
    else:
        reason = step.reason(before if step.reads_all else texts.prose)
    if reason is not None:
        counts.remove(label, reason, group, limit, **example)
        return False
    step_counts.characters_out += len(texts.all_text)
    return True


def to_line(row: dict) -> bytes:
    """A row as its line of JSON, dates as ISO 8601 text."""
    return json.dumps(row, ensure_ascii=False, default=_to_json).encode() + b"\n"


def _to_json(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")
