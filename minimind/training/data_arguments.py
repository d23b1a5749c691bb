"""Which data a stage reads, and where its cleaned copy or the embedded corpus is kept."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers.hf_argparser import HfArg

from minimind.cleaning import cache_key, clean, finished_report
from minimind.common.cache import (
    cache_directory,
    cache_locations,
    remove_invalid,
    report_cache_errors,
)
from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.common.locks import wait_for_lock
from minimind.data.columns import NAMES, Columns
from minimind.data.formats import TEXT_UNITS
from minimind.data.markers import POLICIES
from minimind.data.mixing import STOPPING
from minimind.data.sources import File, expand
from minimind.data.world import write_world


@dataclass
class DataArguments:
    """Which data a stage reads."""

    train_files: list[str] | None = HfArg(
        default=None,
        help="Files, directories or globs (jsonl, json, parquet, csv, txt ...), each optionally "
        "with its share of an epoch (a.jsonl:0.7) or its number of repetitions (b.jsonl:3x). "
        "Default: the embedded corpus.",
    )
    eval_files: list[str] | None = HfArg(
        default=None, help="Held-out files. Default: --eval_ratio of the rows, chosen by content."
    )
    eval_ratio: float = HfArg(
        default=0.02, help="Share of the rows held out when there are no --eval_files."
    )
    max_eval_rows: int = HfArg(default=100, help="Rows to hold out or evaluate on at most.")
    mixing_temperature: float | None = HfArg(
        default=None,
        help="Weigh the sources by size ** (1 / temperature): 1 by their size, high values all "
        "alike.",
    )
    mixing_stop: str = HfArg(
        default="first_exhausted",
        help="Weighted sources: first_exhausted takes no row twice, all_exhausted takes every row.",
        metadata={"choices": STOPPING},
    )
    clean_recipe: str | None = HfArg(
        default=None, help="Clean the training files first, with this recipe of `minimind clean`."
    )
    text_unit: str = HfArg(
        default="file",
        help="What one document of a txt file is: the file, a paragraph or a line.",
        metadata={"choices": TEXT_UNITS},
    )
    boundary_markers: str = HfArg(
        default="split",
        help="Boundaries spelled out in documents, such as <|im_end|>. split: cut there; keep: "
        "train them as text; error: refuse the row.",
        metadata={"choices": POLICIES},
    )
    on_bad_rows: str | None = HfArg(
        default=None,
        help="error: stop at the first; skip: leave out all. Default: leave out at most 0.1 % of "
        "the rows.",
        metadata={"choices": ("error", "skip")},
    )
    columns: list[str] | None = HfArg(
        default=None,
        help="What columns with names of their own mean, as MEANING=COLUMN: prompt=问题 "
        f"response=回答. Meanings: {', '.join(NAMES)}.",
    )
    unread_columns: list[str] | None = HfArg(
        default=None,
        help="Columns to leave out, or ignore: all unread ones. Default: an unread column with "
        "text is an error.",
    )

    def __post_init__(self):
        self.reading()

    def reading(self) -> Columns:
        """How the columns of the rows are read; each object counts those of one reading. Raises
        UserError."""
        return Columns(self.columns, self.unread_columns, cleaned=self.clean_recipe is not None)

    def expand(self, paths: Sequence[str]) -> list[File]:
        """The files to train on: `paths`, or with a cleaning recipe their cleaned copy, which is
        made once and kept."""
        if self.clean_recipe is None:
            return expand(paths)
        directory, report = self._cleaned(paths)
        if is_main_process():
            kept, read = report["rows"]["out"], report["rows"]["in"]
            say(f"cleaned: {kept:,} of {read:,} rows kept; see {directory / 'report.html'}")
        return expand([str(directory / shard["file"]) for shard in report["shards"]])

    def _cleaned(self, paths: Sequence[str]) -> tuple[Path, dict]:
        """The directory of the cleaned copy of some files, and its report; a damaged copy is made
        again."""
        reading = {"text_unit": self.text_unit, "columns": self.columns}
        key = cache_key(paths, self.clean_recipe, **reading)
        for place in cache_locations("clean"):
            with suppress(UserError, OSError):
                if report := finished_report(place / key, key):
                    return place / key, report

        directory = cache_directory("clean") / key
        with report_cache_errors(directory), wait_for_lock(f"{directory}.lock"):
            remove_invalid(directory, partial(finished_report, key=key, remedy=""))
            report = clean(
                paths, directory, self.clean_recipe, on_bad_rows=self.on_bad_rows, **reading
            )
        return directory, report

    def or_embedded(self, name: str) -> "DataArguments":
        """These arguments, with the rows of the embedded corpus for stage `name` if no files are
        given."""
        if self.train_files:
            return self
        directory = cache_directory("world")
        with report_cache_errors(directory), wait_for_lock(directory / ".lock"):
            paths = write_world(directory)
        train_files = [str(paths[name])]
        eval_files = self.eval_files or [str(paths[f"{name}_eval"])]
        return replace(self, train_files=train_files, eval_files=eval_files)
