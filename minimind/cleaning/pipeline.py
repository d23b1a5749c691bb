"""Files -> cleaned shards and a report: streamed, in order, the same whatever the number of
processes.

    input rows -> segment 0 -> dedup -> segment 1 -> ... -> shard        (a segment: worker processes; dedup: this one)

The input is cut every `rows_per_shard` rows, and each part becomes one shard. Until all are there,
they lie in a hidden directory beside the destination, each with its counts and what the dedup steps
remembered of it, so that a run that was killed goes on behind the last finished part. The
destination appears whole, by one rename.
"""

import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock
from tqdm import tqdm

from minimind.cleaning.counts import Counts, StepCounts, excerpt
from minimind.cleaning.extras import version
from minimind.cleaning.recipe import FORMAT_VERSION, Recipe, load_recipe
from minimind.cleaning.report import report_page
from minimind.cleaning.segments import Done, Item, group_of, segments_of
from minimind.cleaning.texts import Texts, check_row, split_row
from minimind.cleaning.workers import Workers
from minimind.common.cache import Contents, check_file, content_hash
from minimind.common.errors import BadRowError, UserError
from minimind.common.files import (
    read_json,
    sync_directory,
    sync_file,
    sync_files,
    write_json,
    write_text,
)
from minimind.common.language import translated
from minimind.data.bad_rows import BAD_ROWS_NAMED, BadRows
from minimind.data.columns import Columns
from minimind.data.files import parsables
from minimind.data.formats import TEXT_UNITS
from minimind.data.markers import Boundaries
from minimind.data.sources import File, expand, total_size

logger = logging.getLogger(__name__)

REPORT = {"key": str, "rows": dict, "steps": list, "shards": list}  # what is read of a report.json
# Sent to a worker process at a time; no influence on the result
BATCH_ROWS, BATCH_CHARACTERS = 250, 500_000


@dataclass
class Batch:
    """Some rows of one part of the input, and what was counted of them so far."""

    part: int
    items: list[Item] = field(default_factory=list)
    characters: int = 0
    last: bool = False  # ends its part
    counts: Counts = field(default_factory=Counts)


def as_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A recipe, or the file of one -> the recipe; raises UserError."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def cache_key(
    files: Sequence[str | File],
    recipe: str | Path | Recipe,
    text_unit: str = "file",
    columns: Sequence[str] | None = None,
) -> str:
    """One hash over all that the output of `clean` depends on: the files' contents, the recipe,
    library versions."""
    return as_recipe(recipe).key(
        [*(content_hash([file]) for file in expand(files)), text_unit, *(columns or ())]
    )


def clean(
    files: Sequence[str | File],
    destination: str | Path,
    recipe: str | Path | Recipe,
    num_proc: int | None = None,
    on_bad_rows: str | None = None,
    text_unit: str = "file",
    columns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Clean rows of any kind into the new directory `destination`; returns the report.

    Args:
        files: files, directories and globs, as for training.
        destination: gets `data-*.jsonl`, `report.json` and `report.html`. If the same input was cleaned into it by the
            same recipe before, nothing is done.
        recipe: a YAML file, or a Recipe.
        num_proc: processes; default: all cores. The result does not depend on it.
        on_bad_rows: as in `files.BadRows`.
        text_unit: what one row of a txt file is, as in `files.read_rows`.
        columns: words of `--columns`; the cleaned rows have our names.

    Returns:
        What `report.json` holds, and under "run" what is not the same each time: seconds, rows per
        second, processes, rows found finished.

    Raises:
        UserError: what `files.expand` and `load_recipe` refuse; bad rows as the policy says; a
            destination that holds something else, or a damaged result; a missing library; no row
            left; a file that changed meanwhile.
    """
    recipe, found, started = as_recipe(recipe), expand(files), time.monotonic()
    if num_proc is not None and num_proc < 1:
        raise UserError(f"num_proc: found {num_proc}, expected at least 1.")
    if text_unit not in TEXT_UNITS:
        raise UserError(f"text_unit: found {text_unit!r}, expected {', '.join(TEXT_UNITS)}.")
    given, destination = str(destination), Path.cwd() / Path(destination).expanduser()
    recipe.prepare()
    contents = [Contents([file]) for file in found]
    renaming = Columns(columns)
    key = recipe.key([*(each.hash for each in contents), text_unit, *(columns or ())])
    destination.parent.mkdir(parents=True, exist_ok=True)
    lock = destination.with_name(f".{destination.name}.lock")
    with FileLock(lock):
        report = finished_report(destination, key)
        job = Cleaning(
            recipe, found, contents, key, destination, BadRows(on_bad_rows), text_unit, renaming
        )
        if not (already := report is not None):
            report = job.run(num_proc or os.cpu_count() or 1)
        lock.unlink(missing_ok=True)  # whoever waits for it finds the destination finished
    seconds = time.monotonic() - started
    rows = report["rows"]["in"]
    run = {
        "destination": given,
        "processes": num_proc or os.cpu_count() or 1,
        "seconds": round(seconds, 3),
        "rows_found_finished": (finished := rows if already else min(job.resumed_rows, rows)),
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
    found = "something"
    if os.path.lexists(destination / "report.json"):
        report = read_json(
            destination / "report.json", f"{destination} was to be new. {remedy}", fields=REPORT
        )
        if report["key"] == key:
            _check_shards(destination, report, remedy)
            return report
        found = "the result of another recipe or input"
    raise UserError(f"{destination}: holds {found}, expected a new directory. {remedy}")


def _check_shards(destination: Path, report: dict[str, Any], remedy: str) -> None:
    """Raises UserError where the files of a cleaned directory are not those that were written."""
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


class Cleaning:
    """One cleaning, from reading to the rename."""

    def __init__(
        self,
        recipe: Recipe,
        files: list[File],
        contents: list[Contents],
        key: str,
        destination: Path,
        bad: BadRows,
        text_unit: str,
        columns: Columns,
    ):
        self.recipe, self.files, self.contents, self.key, self.destination = (
            recipe,
            files,
            contents,
            key,
            destination,
        )
        self.bad, self.text_unit, self.columns = bad, text_unit, columns
        self.rows = 0  # read so far, bad ones included
        self.partial = destination.with_name(f".{destination.name}.partial")
        self.state = self.partial / ".state"
        self.segments = segments_of(recipe)
        self.indexes = [segment.dedup[1].index() for segment in self.segments if segment.dedup]
        self.counts = Counts()
        self.shards: list[dict[str, Any]] = []
        # The part that is being written
        self.writing, self.hasher = {"rows": 0, "bytes": 0}, xxhash.xxh3_128()
        self.resumed_rows = 0
        self.remembered: dict[tuple[int, int], dict[str, np.ndarray]] = {}  # by part and index
        self.bad_of_part: dict[int, tuple[int, list]] = {}  # how many, and the first of them

    def run(self, num_proc: int) -> dict[str, Any]:
        """Clean, publish, and return the report."""
        self._open_state()
        size = total_size(self.files)
        with (
            Workers(self.recipe, num_proc) as workers,
            tqdm(
                total=size or None,
                unit="B",
                unit_scale=True,
                desc=translated("cleaning"),
                disable=None,
            ) as progress,
        ):
            for batch, done in self._stream(workers, self._read(progress.update)):
                batch.counts.merge(done.counts, self.recipe.settings.examples)
                self.counts.merge(batch.counts, self.recipe.settings.examples)
                self._write(batch.part, done.lines)
                if batch.last:
                    self._finish_part(batch.part)
        self._check_unchanged()
        self.columns.finish()
        self.bad.finish(self.rows)
        return self._publish(self.rows)

    def _check_unchanged(self) -> None:
        try:
            for each in self.contents:
                each.check()
        except UserError:
            shutil.rmtree(self.partial)
            raise

    # --- streaming
    # -------------------------------------------------------------------------------------------------

    def _read(self, progress: Callable[[int], Any]) -> Iterator[Batch]:
        """The rows behind those found finished, in batches that do not reach over the end of a
        part."""
        size, batch = self.recipe.settings.rows_per_shard, Batch(len(self.shards))
        for file in self.files:
            before = self.rows
            for place, parse in parsables(file, self.text_unit, progress):
                self.rows += 1
                if self.rows <= self.resumed_rows:
                    continue
                self._add_row(batch, f"{file}:{place}", parse)
                batch.last = self.rows % size == 0
                if (
                    batch.last
                    or len(batch.items) == BATCH_ROWS
                    or batch.characters > BATCH_CHARACTERS
                ):
                    yield batch
                    batch = Batch(batch.part + batch.last)
            if self.rows == before:
                raise UserError(
                    f"{file}: found no rows, expected at least one. Remove the file or create it"
                    " again."
                )
        # The last part is shorter than the others
        if self.rows > max(self.resumed_rows, batch.part * size):
            batch.last = True
            yield batch

    def _add_row(self, batch: Batch, where: str, parse: Callable[[], dict]) -> None:
        try:
            boundaries = Boundaries(self.recipe.settings.boundary_markers)
            rows = split_row(check_row(dict(self.columns.rename(parse()))), boundaries)
        except BadRowError as problem:
            count, first = self.bad_of_part.get(batch.part, (0, []))
            self.bad_of_part[batch.part] = (
                count + 1,
                [*first, (where, str(problem))][:BAD_ROWS_NAMED],
            )
            self.bad.add(where, str(problem))
        else:
            batch.items += [Item(self.rows, where, row) for row in rows]
            batch.characters += sum(len(Texts(row).whole) for row in rows)
            batch.counts.rows_added += len(rows) - 1
            for marker in boundaries.rows:
                batch.counts.markers[marker] = batch.counts.markers.get(marker, 0) + 1

    def _stream(self, workers: Workers, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Done]]:
        """Batches through all segments and dedup steps, in order."""
        for number in range(len(self.segments) - 1):
            batches = self._deduplicated(
                number, workers.map(number, batches, lambda batch: batch.items)
            )
        yield from workers.map(len(self.segments) - 1, batches, lambda batch: batch.items)

    def _deduplicated(self, number: int, results: Iterator[tuple[Batch, Done]]) -> Iterator[Batch]:
        """The batches without the rows that repeat earlier ones; the index remembers the others."""
        (label, _), index, limit = (
            self.segments[number].dedup,
            self.indexes[number],
            self.recipe.settings.examples,
        )
        for batch, done in results:
            counts = done.counts.step(label)
            kept = []
            for item, key in zip(done.items, done.keys, strict=True):
                whole = Texts(item.row).whole
                counts.rows_in += 1
                counts.characters_in += len(whole)
                earlier = index.find_or_add(key, item.number)
                if earlier is None:
                    counts.characters_out += len(whole)
                    kept.append(item)
                else:
                    example = {
                        "number": item.number,
                        "where": item.where,
                        "before": whole,
                        "repeats": earlier,
                    }
                    done.counts.remove(
                        label, "repeats a row", group_of(self.recipe, item.row), limit, **example
                    )
            batch.counts.merge(done.counts, limit)
            if batch.last:
                self.remembered[batch.part, number] = index.take_new()
            batch.items = kept
            yield batch

    # --- parts on disk
    # ---------------------------------------------------------------------------------------------

    def _shard(self, part: int) -> Path:
        return self.partial / f"data-{part:05d}.jsonl"

    def _open_state(self) -> None:
        """Take up the finished parts of the same cleaning; anything else in the hidden directory is
        thrown away."""
        manifest = self.state / "key"
        same = manifest.is_file() and manifest.read_bytes() == self.key.encode()
        if not same:
            if self.partial.exists():
                if self.partial.is_symlink() or (
                    not self.state.exists() and any(self.partial.iterdir())
                ):
                    raise UserError(
                        f"{self.partial} is in the way, and not of ours. Move it away, or give"
                        " another directory."
                    )
                logger.warning(
                    translated("another recipe or input was begun before: starting anew")
                )
            shutil.rmtree(self.partial, ignore_errors=True)
            self.state.mkdir(parents=True)
            write_text(manifest, self.key)
        while self._restore_part(len(self.shards)):
            pass
        if self.resumed_rows:
            logger.warning(
                translated(f"going on behind {self.resumed_rows:,} rows that are finished")
            )

    def _write(self, part: int, lines: list[bytes]) -> None:
        content = b"".join(lines)
        with building(self._shard(part)).open("ab" if self.writing["rows"] else "wb") as file:
            file.write(content)
        self.writing["rows"] += len(lines)
        self.writing["bytes"] += len(content)
        self.hasher.update(content)

    def _finish_part(self, part: int) -> None:
        shard = {**self.writing, "hash": self.hasher.hexdigest()}
        self.writing, self.hasher = {"rows": 0, "bytes": 0}, xxhash.xxh3_128()
        self.shards.append(shard)
        sync_file(building(self._shard(part)))
        building(self._shard(part)).replace(self._shard(part))
        for number in range(len(self.indexes)):
            path = self.state / f"{part:05d}-{number}.npz"
            with building(path).open("wb") as file:
                np.savez(file, **self.remembered.pop((part, number)))
            sync_file(building(path))
            building(path).replace(path)
        # Written last: it says that all the rest of the part is there.
        count, first = self.bad_of_part.pop(part, (0, []))
        facts = {"shard": shard, "bad": count, "first_bad": first, "counts": self.counts.as_dict()}
        write_json(self.state / f"{part:05d}.json", facts)

    def _restore_part(self, part: int) -> bool:
        try:
            facts = json.loads((self.state / f"{part:05d}.json").read_bytes())
            counts, bad = Counts.from_dict(facts["counts"]), int(facts["bad"])
            first_bad = [(str(where), str(problem)) for where, problem in facts["first_bad"]]
            if xxhash.xxh3_128_hexdigest(self._shard(part).read_bytes()) != facts["shard"]["hash"]:
                return False
            saved = [
                (self.state / f"{part:05d}-{number}.npz").read_bytes()
                for number in range(len(self.indexes))
            ]
            arrays = [dict(np.load(io.BytesIO(content))) for content in saved]
        except Exception:  # whatever it holds: the part is cleaned again
            return False
        for index, values in zip(self.indexes, arrays, strict=True):
            index.restore(values)
        self.shards.append(facts["shard"])
        for where, problem in first_bad:
            self.bad.add(where, problem)
        self.bad.count += bad - len(first_bad)
        self.counts = counts
        self.resumed_rows += self.recipe.settings.rows_per_shard
        return True

    # --- the end
    # ---------------------------------------------------------------------------------------------------

    def _publish(self, total: int) -> dict[str, Any]:
        report = self._report(total)
        if not report["rows"]["out"]:
            removed = ", ".join(
                f"{step['step']} {step['rows_removed']:,}" for step in report["steps"]
            )
            shutil.rmtree(self.partial)
            raise UserError(
                f"no row is left of {total:,}: bad {report['rows']['bad']:,}, {removed}. Change the"
                " recipe."
            )
        write_json(self.partial / "report.json", report)
        write_text(self.partial / "report.html", report_page(report))
        for part, shard in enumerate(self.shards):
            if not shard["rows"]:  # an empty file would be refused as data
                self._shard(part).unlink()
        state = self.destination.with_name(f".{self.destination.name}.state")
        shutil.rmtree(state, ignore_errors=True)
        self.state.replace(state)
        sync_files(self.partial)
        self.partial.replace(self.destination)
        sync_directory(self.destination.parent)
        shutil.rmtree(state)
        return report

    def _report(self, total: int) -> dict[str, Any]:
        labels = self.recipe.labels
        steps = [self.counts.step(label) for label in labels]
        shards = [
            {"file": self._shard(part).name, **shard}
            for part, shard in enumerate(self.shards)
            if shard["rows"]
        ]
        rows = {
            "in": total,
            "added": self.counts.rows_added,
            "out": sum(shard["rows"] for shard in shards),
            "removed": sum(step.rows_removed for step in steps),
            "bad": self.bad.count,
        }
        if rows["in"] + rows["added"] != rows["out"] + rows["removed"] + rows["bad"]:
            raise RuntimeError(f"rows were lost or doubled: {rows}")
        packages = sorted({package for step in self.recipe.steps for package in step.packages})
        earlier = self._earlier_rows(steps)
        return {
            "format_version": FORMAT_VERSION,
            "key": self.key,
            "recipe": self.recipe.as_dict(),
            "packages": {package: version(package) for package in packages},
            "inputs": [
                {"path": str(file), "bytes": total_size([file]), "hash": each.hash}
                for file, each in zip(self.files, self.contents, strict=True)
            ],
            "rows": rows,
            "characters": {"in": steps[0].characters_in, "out": steps[-1].characters_out},
            "boundary_markers": self.counts.markers,
            "steps": [
                _step_report(label, step, earlier)
                for label, step in zip(labels, steps, strict=True)
            ],
            "groups": {name: self.counts.groups[name] for name in sorted(self.counts.groups)},
            "bad_rows": [{"where": where, "problem": problem} for where, problem in self.bad.first],
            "shards": shards,
        }

    def _earlier_rows(self, steps: list[StepCounts]) -> dict[int, dict[str, str]]:
        """The rows that examples repeat, by number; read again, since the indexes keep no texts."""
        examples = (
            example for step in steps for kept in step.examples.values() for example in kept
        )
        wanted = {example["repeats"] for example in examples if "repeats" in example}
        found: dict[int, dict[str, str]] = {}
        places = (
            (file, *row) for file in self.files for row in parsables(file, self.text_unit, None)
        )
        for number, (file, place, parse) in enumerate(places, 1):
            if len(found) == len(wanted):
                break
            if number in wanted:
                found[number] = {
                    "where": f"{file}:{place}",
                    "text": excerpt(Texts(dict(self.columns.rename(parse()))).whole),
                }
        return found


def _step_report(
    label: str, step: StepCounts, earlier: dict[int, dict[str, str]]
) -> dict[str, Any]:
    examples = {
        reason: [
            {
                name: earlier[value] if name == "repeats" else value
                for name, value in example.items()
                if name != "order"
            }
            for example in kept
        ]
        for reason, kept in sorted(step.examples.items())
    }
    return {
        "step": label,
        "rows_in": step.rows_in,
        "rows_out": step.rows_in - step.rows_removed,
        "rows_changed": step.rows_changed,
        "rows_removed": step.rows_removed,
        "characters_in": step.characters_in,
        "characters_out": step.characters_out,
        "reasons": dict(sorted(step.reasons.items(), key=lambda entry: (-entry[1], entry[0]))),
        "examples": examples,
    }


def building(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return Path(f"{path}.building")
