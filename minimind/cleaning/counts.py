"""What each step did: counts that can be added up in any grouping, and a few examples chosen by
content."""

import dataclasses
import heapq
from dataclasses import dataclass, field
from typing import Any

import xxhash

EXCERPT = 400  # characters of an example
CHANGED = "changed"


def excerpt(text: str, start: int = 0, size: int = EXCERPT) -> str:
    """At most `size` characters of a text from `start` on, with dots where more was cut."""
    return (
        ("…" if start else "")
        + text[start : start + size]
        + ("…" if len(text) > start + size else "")
    )


def around_change(before: str, after: str, size: int = EXCERPT // 2) -> tuple[str, str]:
    """Two texts -> excerpts of both around their first difference."""
    length = min(len(before), len(after))
    first = next((index for index in range(length) if before[index] != after[index]), length)
    start = max(first - size // 4, 0)
    return excerpt(before, start, size), excerpt(after, start, size)


@dataclass
class StepCounts:
    """One step's counts. Characters are those of all texts of the rows; `rows_out` is `rows_in -
    rows_removed`."""

    rows_in: int = 0
    rows_changed: int = 0
    rows_removed: int = 0
    characters_in: int = 0
    characters_out: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add_example(
        self, reason: str, limit: int, number: int, where: str, before: str, **more: Any
    ) -> None:
        """Keep an example if its content's hash is among the `limit` smallest of its reason: no
        matter in which order the rows come, the same ones are kept, from all over the data.
        """
        kept = self.examples.setdefault(reason, [])
        order = [xxhash.xxh3_64_intdigest(before.encode("utf-8", "replace")), number]
        if limit and (len(kept) < limit or order < kept[-1]["order"]):
            if "after" in more:
                before, more["after"] = around_change(before, more["after"])
            kept.append({"order": order, "where": where, "before": excerpt(before), **more})
            self._trim(reason, limit)

    def _trim(self, reason: str, limit: int) -> None:
        self.examples[reason] = heapq.nsmallest(
            limit, self.examples[reason], key=lambda example: example["order"]
        )

    def merge(self, other: "StepCounts", limit: int) -> None:
        """Add another count of the same step."""
        for name in ("rows_in", "rows_changed", "rows_removed", "characters_in", "characters_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for reason, examples in other.examples.items():
            self.examples.setdefault(reason, []).extend(examples)
            self._trim(reason, limit)


@dataclass
class Counts:
    """The counts of all steps by their label, and of the groups of rows; how many rows were split
    at boundary markers spelled out in them, by the first of these, and how many rows that added."""

    steps: dict[str, StepCounts] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    markers: dict[str, int] = field(default_factory=dict)
    rows_added: int = 0

    def step(self, label: str) -> StepCounts:
        """The counts of a step."""
        return self.steps.setdefault(label, StepCounts())

    def group(self, name: str) -> dict[str, Any]:
        """The counts of a group."""
        empty = {
            "rows_in": 0,
            "characters_in": 0,
            "rows_out": 0,
            "characters_out": 0,
            "removed": {},
        }
        return self.groups.setdefault(name, empty)

    def remove(
        self, label: str, reason: str, group: str | None, limit: int, **example: Any
    ) -> None:
        """Count a removed row."""
        counts = self.step(label)
        counts.rows_removed += 1
        counts.reasons[reason] = counts.reasons.get(reason, 0) + 1
        counts.add_example(reason, limit, **example)
        if group is not None:
            removed = self.group(group)["removed"]
            removed[label] = removed.get(label, 0) + 1

    def merge(self, other: "Counts", limit: int) -> None:
        """Add other counts of the same recipe."""
        for label, counts in other.steps.items():
            self.step(label).merge(counts, limit)
        for name, theirs in other.groups.items():
            ours = self.group(name)
            for field_name in ("rows_in", "characters_in", "rows_out", "characters_out"):
                ours[field_name] += theirs[field_name]
            for label, count in theirs["removed"].items():
                ours["removed"][label] = ours["removed"].get(label, 0) + count
        self.rows_added += other.rows_added
        for marker, count in other.markers.items():
            self.markers[marker] = self.markers.get(marker, 0) + count

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Counts":
        """From `as_dict`'s JSON."""
        steps = {label: StepCounts(**counts) for label, counts in data["steps"].items()}
        return cls(**{**data, "steps": steps})
