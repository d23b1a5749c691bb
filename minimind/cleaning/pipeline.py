"""Files -> cleaned shards and a report: streamed, in order, the same whatever the number of
processes.

    input rows -> segment 0 -> dedup -> segment 1 -> ... -> shard

A segment runs in worker processes, a dedup step in this one. The input is cut every
`rows_per_shard` rows, and each part becomes one shard; see parts.py.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from minimind.cleaning.counts import Counts, add, excerpt
from minimind.cleaning.page import report_page
from minimind.cleaning.parts import BadRowsOfPart, Parts
from minimind.cleaning.procedure import Procedure, load_procedure
from minimind.cleaning.report import REPORT, make_report
from minimind.cleaning.row_texts import RowTexts, check_row, split_row
from minimind.cleaning.segments import Item, Result, group_of, segments_of
from minimind.cleaning.workers import Workers
from minimind.common.cache import Contents, check_file, content_hash
from minimind.common.errors import BadRowError, UserError
from minimind.common.files import (
    read_json,
)
from minimind.common.language import translated
from minimind.data.bad_rows import BAD_ROWS_NAMED, BadRows
from minimind.data.columns import Columns
from minimind.data.files import parsables
from minimind.data.formats import TEXT_UNITS
from minimind.data.markers import Boundaries
from minimind.data.sources import File, expand, total_size

logger = logging.getLogger(__name__)

# Sent to a worker process at a time; no influence on the result.
BATCH_ROWS, BATCH_CHARACTERS = 250, 500_000


def cache_key(
    files: Sequence[str | File],
    recipe: str | Path | Procedure,
    text_unit: str = "file",
    columns: Sequence[str] | None = None,
) -> str:
    """One hash over all that the output of `clean` depends on: the files' contents, the recipe,
    library versions."""
    hashes = [content_hash([file]) for file in expand(files)]
    return load_procedure(recipe).key([*hashes, text_unit, *(columns or ())])


def clean(
    files: Sequence[str | File],
    destination: str | Path,
    recipe: str | Path | Procedure,
    num_proc: int | None = None,
    on_bad_rows: str | None = None,
    text_unit: str = "file",
    columns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Clean rows of any kind into the new directory `destination`; returns the report.

    Args:
        files: files, directories and globs, as for training.
        destination: gets `data-*.jsonl`, `report.json` and `report.html`. If the same input was
            cleaned into it by the same recipe before, nothing is done.
        recipe: a YAML file, or a Procedure.
        num_proc: processes; default: all cores. The result does not depend on it.
        on_bad_rows: as in `files.BadRows`.
        text_unit: what one row of a txt file is, as in `files.read_rows`.
        columns: words of `--columns`; the cleaned rows have our names.

    Returns:
        What `report.json` holds, and under "run" what differs from run to run: seconds, rows per
        second, processes, rows that were finished before.

    Raises:
        UserError: what `files.expand` and `load_procedure` refuse; bad rows as the policy says; a
            destination that holds something else, or a damaged result; a missing library; no row
            left; a file that changed meanwhile.
    """
    procedure, inputs, started = load_procedure(recipe), expand(files), time.monotonic()
    if num_proc is not None and num_proc < 1:
        raise UserError(f"num_proc: found {num_proc}, expected at least 1.")
    if text_unit not in TEXT_UNITS:
        raise UserError(f"text_unit: found {text_unit!r}, expected {', '.join(TEXT_UNITS)}.")
    processes = num_proc or os.cpu_count() or 1
    procedure.prepare()
    bad, renaming = BadRows(on_bad_rows), Columns(columns)
    contents = [Contents([file]) for file in inputs]
    key = procedure.key([*(each.hash for each in contents), text_unit, *(columns or ())])
    place = Path.cwd() / Path(destination).expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with FileLock(lock):
        report = finished_report(place, key)
        cleaning = Cleaning(procedure, inputs, contents, key, place, bad, text_unit, renaming)
        if is_finished := report is not None:
            cleaning.resumed_rows = report["rows"]["in"]
        else:
            report = cleaning.run(processes)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the destination finished
    seconds = time.monotonic() - started
    rows = report["rows"]["in"]
    finished = rows if is_finished else min(cleaning.resumed_rows, rows)
    run = {
        "destination": str(destination),
        "processes": processes,
        "seconds": round(seconds, 3),
        "rows_found_finished": finished,
        "rows_per_second": round((rows - finished) / seconds, 1),
    }
    return {**report, "run": run}


def finished_report(
    destination: Path, key: str, remedy: str = "Remove it, or name another destination."
) -> dict[str, Any] | None:
    """The report of the same cleaning done before, or None for a free destination.

    Raises:
        UserError: it holds something else, or not the shards that were written; `remedy` says what
            to do then.
    """
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    content = "something"
    file = destination / "report.json"
    if os.path.lexists(file):
        report = read_json(file, f"{destination} was to be new. {remedy}", fields=REPORT)
        if report["key"] == key:
            _check_shards(destination, report, remedy)
            return report
        content = "the result of another recipe or input"
    raise UserError(f"{destination}: holds {content}, expected a new directory. {remedy}")


def _check_shards(destination: Path, report: dict[str, Any], remedy: str) -> None:
    """Raise UserError if the files of a cleaned directory are not those that were written."""
    try:
        for shard in report["shards"]:
            check_file(destination / shard["file"], shard["bytes"], shard["hash"])
        if sum(shard["rows"] for shard in report["shards"]) != report["rows"]["out"]:
            raise ValueError("not all shards are named")
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{destination / 'report.json'} is not what was written. {remedy}"
        ) from None
    except UserError as problem:
        raise UserError(f"{problem}, so {destination} is damaged. {remedy}") from None


@dataclass
class RowBatch:
    """Some rows of one part of the input, and what was counted of them so far."""

    part: int
    items: list[Item] = field(default_factory=list)
    characters: int = 0
    last: bool = False  # ends its part
    counts: Counts = field(default_factory=Counts)


@dataclass
class Cleaning:
    """One cleaning, from reading to the rename."""

    procedure: Procedure
    files: list[File]
    contents: list[Contents]
    key: str
    destination: Path
    bad: BadRows
    text_unit: str
    columns: Columns

    def __post_init__(self):
        self.settings = self.procedure.settings
        self.segments = segments_of(self.procedure)
        self.indexes = [segment.dedup[1].index() for segment in self.segments if segment.dedup]
        self.parts = Parts(self.destination)
        self.counts = Counts()
        self.rows = 0  # read so far, bad ones included
        self.resumed_rows = 0  # of finished parts
        self.remembered: dict[tuple[int, int], dict[str, Any]] = {}  # by part and index
        self.bad_of_part: dict[int, BadRowsOfPart] = {}

    def run(self, num_proc: int) -> dict[str, Any]:
        """Clean, publish, and return the report."""
        self._resume()
        bar = {"total": total_size(self.files) or None, "unit": "B", "unit_scale": True}
        with (
            Workers(self.procedure, num_proc) as workers,
            tqdm(**bar, desc=translated("cleaning"), disable=None) as progress,
        ):
            for batch, result in self._stream(workers, self._read(progress.update)):
                batch.counts.merge(result.counts, self.settings.examples)
                self.counts.merge(batch.counts, self.settings.examples)
                self.parts.write(result.lines)
                if batch.last:
                    self._finish_part(batch.part)
        try:
            for each in self.contents:
                each.check()
        except UserError:  # a file changed meanwhile
            self.parts.remove()
            raise
        self.columns.finish()
        self.bad.finish(self.rows)
        return self._publish()

    # Reading and streaming

    def _read(self, progress: Callable[[int], Any]) -> Iterator[RowBatch]:
        """The rows after those of finished parts, in batches that lie within one part."""
        size, batch = self.settings.rows_per_shard, RowBatch(len(self.parts.shards))
        for file in self.files:
            before = self.rows
            for place, parse in parsables(file, self.text_unit, progress):
                self.rows += 1
                if self.rows <= self.resumed_rows:
                    continue
                self._add_row(batch, f"{file}:{place}", parse)
                batch.last = self.rows % size == 0
                is_full = len(batch.items) == BATCH_ROWS or batch.characters > BATCH_CHARACTERS
                if batch.last or is_full:
                    yield batch
                    batch = RowBatch(batch.part + batch.last)
            if self.rows == before:
                raise UserError(
                    f"{file}: found no rows, expected at least one. Remove the file or create it"
                    " again."
                )
        # The last part is shorter than the others.
        if self.rows > max(self.resumed_rows, batch.part * size):
            batch.last = True
            yield batch

    def _add_row(self, batch: RowBatch, where: str, parse: Callable[[], dict]) -> None:
        try:
            boundaries = Boundaries(self.settings.boundary_markers)
            rows = split_row(check_row(dict(self.columns.rename(parse()))), boundaries)
        except BadRowError as problem:
            count, first = self.bad_of_part.get(batch.part, BadRowsOfPart())
            first = [*first, (where, str(problem))][:BAD_ROWS_NAMED]
            self.bad_of_part[batch.part] = BadRowsOfPart(count + 1, first)
            self.bad.add(where, str(problem))
        else:
            batch.items += [Item(self.rows, where, row) for row in rows]
            batch.characters += sum(len(RowTexts(row).all_text) for row in rows)
            batch.counts.rows_added += len(rows) - 1
            add(batch.counts.markers, dict.fromkeys(boundaries.rows, 1))

    def _stream(
        self, workers: Workers, batches: Iterator[RowBatch]
    ) -> Iterator[tuple[RowBatch, Result]]:
        """Batches through all segments and dedup steps, in order."""
        for number, segment in enumerate(self.segments):
            results = workers.map(number, batches)
            if segment.dedup is None:  # the last one
                yield from results
            else:
                batches = self._deduplicated(number, results)

    def _deduplicated(
        self, number: int, results: Iterator[tuple[RowBatch, Result]]
    ) -> Iterator[RowBatch]:
        """The batches without the rows that repeat earlier ones; the index remembers the others."""
        label, _ = self.segments[number].dedup
        index, limit = self.indexes[number], self.settings.examples
        for batch, result in results:
            counts = result.counts.step(label)
            batch.items = []
            for item, key in zip(result.items, result.keys, strict=True):
                text = RowTexts(item.row).all_text
                counts.rows_in += 1
                counts.characters_in += len(text)
                earlier = index.find_or_add(key, item.number)
                if earlier is None:
                    counts.characters_out += len(text)
                    batch.items.append(item)
                else:
                    group = group_of(self.procedure, item.row)
                    example = {"number": item.number, "where": item.where, "before": text}
                    example["repeats"] = earlier
                    result.counts.remove(label, "repeats a row", group, limit, **example)
            batch.counts.merge(result.counts, limit)
            if batch.last:
                self.remembered[batch.part, number] = index.take_new()
            yield batch

    # Parts on disk

    def _resume(self) -> None:
        """Continue after the finished parts of the same cleaning."""
        self.parts.open(self.key)
        while restored := self.parts.restore(self.indexes):
            self.counts, bad = restored
            for where, problem in bad.first:
                self.bad.add(where, problem)
            self.bad.count += bad.count - len(bad.first)
            self.resumed_rows += self.settings.rows_per_shard
        if self.resumed_rows:
            text = f"resuming after {self.resumed_rows:,} rows that are finished"
            logger.warning(translated(text))

    def _finish_part(self, part: int) -> None:
        remembered = [self.remembered.pop((part, number)) for number in range(len(self.indexes))]
        self.parts.finish(remembered, self.bad_of_part.pop(part, BadRowsOfPart()), self.counts)

    # The end

    def _publish(self) -> dict[str, Any]:
        shards = [
            {"file": self.parts.shard(part).name, **shard}
            for part, shard in enumerate(self.parts.shards)
            if shard["rows"]
        ]
        inputs = [
            {"path": str(file), "bytes": total_size([file]), "hash": each.hash}
            for file, each in zip(self.files, self.contents, strict=True)
        ]
        repeated = self._repeated_rows()
        report = make_report(
            self.key, self.procedure, self.counts, self.rows, self.bad, inputs, shards, repeated
        )
        if not report["rows"]["out"]:
            steps = [f"{step['step']} {step['rows_removed']:,}" for step in report["steps"]]
            self.parts.remove()
            raise UserError(
                f"no row is left of {self.rows:,}: bad {self.bad.count:,}, {', '.join(steps)}."
                " Change the recipe."
            )
        self.parts.publish(report, report_page(report))
        return report

    def _repeated_rows(self) -> dict[int, dict[str, str]]:
        """The rows that examples repeat, by number; read again, since the indexes keep no texts."""
        numbers = {
            example["repeats"]
            for step in self.counts.steps.values()
            for examples in step.examples.values()
            for example in examples
            if "repeats" in example
        }
        rows: dict[int, dict[str, str]] = {}
        places = (
            (file, *row) for file in self.files for row in parsables(file, self.text_unit, None)
        )
        for number, (file, place, parse) in enumerate(places, 1):
            if len(rows) == len(numbers):
                break
            if number in numbers:
                text = RowTexts(dict(self.columns.rename(parse()))).all_text
                rows[number] = {"where": f"{file}:{place}", "text": excerpt(text)}
        return rows
