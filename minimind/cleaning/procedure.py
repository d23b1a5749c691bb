"""The procedure of a cleaning: its steps in order, as a recipe lists them.

steps:
  - fix_unicode
  - length: {min_chars: 20}
  - near_dedup: {threshold: 0.8}
"""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from minimind.cleaning import duplicates, extras, filters, normalization, personal
from minimind.cleaning.options import build, check_positive, closest
from minimind.cleaning.steps import CleaningStep
from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.common.recipes import read_recipe
from minimind.data.markers import POLICIES

FORMAT_VERSION = 2  # part of every key: raise it when the same input and recipe give another output

STEPS: dict[str, type[CleaningStep]] = {
    step.name: step
    for step in (
        normalization.FixUnicode,
        normalization.RemoveMarkup,
        normalization.ControlCharacters,
        normalization.Whitespace,
        filters.Length,
        filters.Language,
        filters.Quality,
        duplicates.ExactDedup,
        duplicates.NearDedup,
        duplicates.Decontaminate,
        personal.MaskPersonalData,
    )
}


@dataclass(frozen=True)
class Settings:
    """The options of a recipe besides its steps."""

    examples: int = 5  # shown in the report for each step and each reason
    rows_per_shard: int = 20_000  # of the input; also what an interruption costs at most
    group_by: str | None = "source"  # field of the rows whose values are counted apart
    # Documents at the markers spelled out in them, or "keep", or "error"
    boundary_markers: str = "split"

    def __post_init__(self):
        check_positive(self, "rows_per_shard")
        if self.boundary_markers not in POLICIES:
            raise ValueError(
                f"boundary_markers: found {self.boundary_markers!r}, expected {', '.join(POLICIES)}"
            )
        if self.examples < 0:
            raise ValueError(f"examples: found {self.examples}, expected at least 0")


@dataclass(frozen=True)
class Procedure:
    """The steps of one cleaning, in order, and its settings."""

    steps: list[CleaningStep]
    settings: Settings = field(default_factory=Settings)

    @property
    def labels(self) -> list[str]:
        """One name for each step; the second step of a kind is "length#2"."""
        labels: list[str] = []
        names: Counter[str] = Counter()
        for step in self.steps:
            names[step.name] += 1
            count = names[step.name]
            labels.append(step.name if count == 1 else f"{step.name}#{count}")
        return labels

    @property
    def packages(self) -> list[str]:
        """The packages whose versions the output depends on."""
        return sorted({package for step in self.steps for package in step.packages})

    def as_dict(self) -> dict[str, Any]:
        """The procedure with all options spelled out, as `from_dict` reads it."""
        steps = [{step.name: dataclasses.asdict(step)} for step in self.steps]
        return {"steps": steps, **dataclasses.asdict(self.settings)}

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> "Procedure":
        """The procedure from what a recipe's YAML holds; raises UserError naming `where`."""
        entries = data.get("steps") if isinstance(data, dict) else None
        if not isinstance(entries, list) or not entries:
            raise UserError(
                f"{where}: found no list of steps, expected 'steps:' with at least one of"
                f" {_known()}."
            )
        steps = []
        for number, entry in enumerate(entries, 1):
            if isinstance(entry, str):
                entry = {entry: None}
            if not isinstance(entry, dict) or len(entry) != 1:
                raise UserError(
                    f"{where}: step {number}: found {entry!r}, expected a name or one 'name:"
                    " {options}'."
                )
            ((name, options),) = entry.items()
            if name not in STEPS:
                raise UserError(
                    f"{where}: step {number}: found the unknown step"
                    f" {name!r}{closest(str(name), STEPS)}, expected one of {_known()}."
                )
            steps.append(build(STEPS[name], options, f"{where}: step {number} ({name})"))
        settings = {name: value for name, value in data.items() if name != "steps"}
        return cls(steps, build(Settings, settings, where))

    def prepare(self) -> None:
        """Load what the steps need; raises UserError."""
        for step in self.steps:
            step.prepare()

    def key(self, hashes: list[str]) -> str:
        """One hash for all that the output depends on, for inputs with these content hashes."""
        facts = {
            "version": FORMAT_VERSION,
            "recipe": self.as_dict(),
            "inputs": hashes,
            "step_files": [
                content_hash(map(Path, step.files())) for step in self.steps if step.files()
            ],
            "packages": {package: extras.version(package) for package in self.packages},
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _known() -> str:
    return ", ".join(STEPS)


def load_procedure(recipe: str | Path | Procedure) -> Procedure:
    """The procedure in a recipe file; a procedure is returned as it is.

    Raises:
        UserError: a missing file, broken YAML, unknown steps or options.
    """
    if isinstance(recipe, Procedure):
        return recipe
    return Procedure.from_dict(read_recipe(recipe), str(recipe))
