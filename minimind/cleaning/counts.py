"""What each step did: counts that can be added up in any grouping, and a few examples chosen by
content."""

import dataclasses
import heapq
from dataclasses import dataclass, field
from typing import Any

import xxhash

EXCERPT = 400  # characters of an example
CHANGED = "changed"
GROUP_COUNTS = ("rows_in", "characters_in", "rows_out", "characters_out")


def excerpt(text: str, start: int = 0, size: int = EXCERPT) -> str:
    """At most `size` characters of a text from `start` on, with dots where more was cut."""
    cut = "…" if len(text) > start + size else ""
    return ("…" if start else "") + text[start : start + size] + cut


def around_change(before: str, after: str, size: int = EXCERPT // 2) -> tuple[str, str]:
    """Two texts -> excerpts of both around their first difference."""
    length = min(len(before), len(after))
    first = next((index for index in range(length) if before[index] != after[index]), length)
    start = max(first - size // 4, 0)
    return excerpt(before, start, size), excerpt(after, start, size)


def add(counts: dict[str, int], others: dict[str, int]) -> None:
    """Add `others` to `counts`, name by name."""
    for name, count in others.items():
        counts[name] = counts.get(name, 0) + count


@dataclass
class StepCounts:
    """One step's counts. Characters are those of all texts of the rows; what comes out is `rows_in
    - rows_removed`."""

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
        """Keep an example if its content's hash is among the `limit` smallest of its reason: in
        whatever order the rows come, the same ones are kept, from all over the data."""
        examples = self.examples.setdefault(reason, [])
        order = [xxhash.xxh3_64_intdigest(before.encode("utf-8", "replace")), number]
        if limit and (len(examples) < limit or order < examples[-1]["order"]):
            if "after" in more:
                before, more["after"] = around_change(before, more["after"])
            examples.append({"order": order, "where": where, "before": excerpt(before), **more})
            self._trim(reason, limit)

    def _trim(self, reason: str, limit: int) -> None:
        examples = self.examples[reason]
        self.examples[reason] = heapq.nsmallest(limit, examples, key=lambda each: each["order"])

    def merge(self, other: "StepCounts", limit: int) -> None:
        """Add another count of the same step."""
        for name in ("rows_in", "rows_changed", "rows_removed", "characters_in", "characters_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        add(self.reasons, other.reasons)
        for reason, examples in other.examples.items():
            self.examples.setdefault(reason, []).extend(examples)
            self._trim(reason, limit)


@dataclass
class Counts:
    """The counts of all steps by their label, and of the groups of rows.

    `markers` counts the rows that were split at boundary markers spelled out in them, by the first
    marker of each, and `rows_added` the rows that this added.
    """

    steps: dict[str, StepCounts] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    markers: dict[str, int] = field(default_factory=dict)
    rows_added: int = 0

    def step(self, label: str) -> StepCounts:
        """The counts of a step."""
        return self.steps.setdefault(label, StepCounts())

    def group(self, name: str) -> dict[str, Any]:
        """The counts of a group."""
        return self.groups.setdefault(name, {**dict.fromkeys(GROUP_COUNTS, 0), "removed": {}})

    def remove(
        self, label: str, reason: str, group: str | None, limit: int, **example: Any
    ) -> None:
        """Count a removed row."""
        counts = self.step(label)
        counts.rows_removed += 1
        add(counts.reasons, {reason: 1})
        counts.add_example(reason, limit, **example)
        if group is not None:
            add(self.group(group)["removed"], {label: 1})

    def merge(self, other: "Counts", limit: int) -> None:
        """Add other counts of the same procedure."""
        for label, counts in other.steps.items():
            self.step(label).merge(counts, limit)
        for name, counts in other.groups.items():
            group = self.group(name)
            add(group, {field_name: counts[field_name] for field_name in GROUP_COUNTS})
            add(group["removed"], counts["removed"])
        self.rows_added += other.rows_added
        add(self.markers, other.markers)

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Counts":
        """The counts from the JSON of `as_dict`."""
        steps = {label: StepCounts(**counts) for label, counts in data["steps"].items()}
        return cls(**{**data, "steps": steps})
