"""Raw data files -> rows, each with the place it came from.

A row that cannot be used is a *bad row*: named as `file:line` with what was found and what was
expected, then refused or skipped as `--on_bad_rows` says. Only a file whose structure is lost (a
broken JSON list, an unclosed CSV quote, a damaged archive) is refused whatever the policy, because
nobody can say how many rows would be lost with it.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from minimind.common.errors import UserError
from minimind.common.files import sibling_path
from minimind.common.language import translated
from minimind.data.columns import Columns, Fields
from minimind.data.formats import KNOWN, TEXT_UNITS, Parsable, Progress, format_of, read_file
from minimind.data.hub import PREFIX, SPELLING, HubDataset
from minimind.data.markers import Boundaries
from minimind.data.rows import BadRowError, check_text, shown

__all__ = [
    "BadRowError",
    "BadRows",
    "Row",
    "check_text",
    "expand",
    "parsables",
    "read_documents",
    "read_rows",
    "shown",
    "to_document",
    "total_size",
]

logger = logging.getLogger(__name__)

BAD_ROW_SHARE = 0.001  # without a policy, more bad rows than this are an error
BAD_ROWS_NAMED = 5
REASONS = 100  # different ones told apart
PARTICULARS = re.compile(r"\d[\d,]*|'[^']*'|\"[^\"]*\"|[\[{].*?[\]}]")
# Names of parts to evaluate on, by the rule of `datasets`: a word of the path, between other signs
# than letters.
HELD_OUT = re.compile(
    r"(?<![^\W\d_])(test|testing|valid|validation|val|dev|eval|evaluation)(?![^\W\d_])",
    re.IGNORECASE,
)
# What `datasets` writes beside the data
DATASET_FACTS = {"dataset_info.json", "dataset_infos.json"}
# What `minimind clean` writes beside the data, both of them
CLEANING_REPORT = {"report.json", "report.html"}
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"  # marks of `save_to_disk`

File = Path | HubDataset


class Row(NamedTuple):
    """One row of a data file: `where` is "file:line" ("file:row N" for parquet, arrow and datasets
    of the Hub)."""

    where: str
    data: Any


class BadRows:
    """The bad rows of one reading and the policy for them, one of `"error"`, `"skip"` and None.

    "error" refuses the first; "skip" leaves out all; None leaves them out while they are at most
    0.1 % of the rows.
    """

    def __init__(self, policy: str | None = None):
        if policy not in (None, "error", "skip"):
            raise UserError(
                f"on_bad_rows: found {policy!r}, expected error, skip or nothing (skip at most"
                " 0.1 %)"
            )
        self.policy = policy
        self.count = self.total = 0  # `total` rows, the good ones included, once they are read
        # A problem without its particulars -> how often, the first time with particulars, and the
        # first places.
        self.reasons: dict[str, tuple[int, str, list[str]]] = {}
        self.first: list[tuple[str, str]] = []

    def add(self, where: str, problem: str) -> None:
        """Count one bad row; raises UserError at once if the policy is "error"."""
        self.count += 1
        if len(self.first) < BAD_ROWS_NAMED:
            self.first.append((where, problem))
        reason = PARTICULARS.sub("…", problem)
        count, first, places = self.reasons.get(reason, (0, problem, []))
        if count or len(self.reasons) < REASONS:
            self.reasons[reason] = (
                count + 1,
                first,
                [*places, where] if count < BAD_ROWS_NAMED else places,
            )
        if self.policy == "error":
            raise UserError(f"{self}\nMend the row, or leave out bad rows with --on_bad_rows skip.")

    def finish(self, total: int) -> None:
        """Judge the bad rows among `total`: one warning where they may be skipped, UserError where
        not."""
        self.total = total
        if self.count and self.count == total:
            raise UserError(
                f"{self}\nNo usable row is left of {total:,}. Check the format of the files."
            )
        if self.policy is None and self.count > BAD_ROW_SHARE * total:
            raise UserError(
                f"{self}\n{self.count:,} of {total:,} rows are bad, and without --on_bad_rows at"
                f" most {BAD_ROW_SHARE:.1%} are left out. Mend them, or leave them out with"
                " --on_bad_rows skip."
            )
        self.warn(total)

    def warn(self, total: int) -> None:
        """Say in one warning how many of `total` rows were skipped; nothing if none was."""
        if self.count:
            logger.warning("%s", translated(f"skipped {self.count:,} of {total:,} rows: {self}"))

    def __str__(self) -> str:
        (where, problem), *others = self.first
        if not others:
            return f"{where}: {problem}"
        ellipsis = ", ..." if self.count > len(self.first) else ""
        return (
            f"{where}: {problem} (and {self.count - 1:,} more:"
            f" {', '.join(w for w, _ in others)}{ellipsis})"
        )


def expand(paths: Sequence[str | File]) -> list[File]:
    """Files, directories, globs and datasets of the Hub -> what is to be read, each once, in a
    stable order.

    Directories are searched to the bottom, through links too, and give their files with known
    extensions, hidden ones left out; one that `datasets.save_to_disk` wrote gives its arrow files.
    A glob gives what it would in a shell, `**` included, as far as directories or files with known
    extensions.

    Raises:
        UserError: a path does not exist, gives no file or cannot be looked up; a file is empty, has
            an unknown extension or is no regular file; a dataset cannot be found.
    """
    if not paths:
        raise UserError(
            f"found no data files, expected at least one file, directory or glob ({KNOWN})."
        )
    files: dict[str, File] = {}
    for given in paths:
        try:
            found = _found(given)
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # no permission, a name no file can have, no such ~user
            raise UserError(f"{given}: cannot be looked up ({error}). Check the path.") from None
        for file in found:
            files.setdefault(
                str(file) if isinstance(file, HubDataset) else os.path.realpath(file), file
            )
    for file in files.values():
        if isinstance(file, Path) and file.stat().st_size == 0:
            raise UserError(
                f"{file}: found an empty file, expected rows. Remove it or create it again."
            )
    return list(files.values())


def _found(given: str | File) -> list[File]:
    if isinstance(given, HubDataset):
        return [given]
    if str(given).startswith(PREFIX):
        return [HubDataset(str(given))]
    path = Path(given).expanduser()
    if path.is_dir():
        found = _search(path)
    elif path.exists() or path.is_symlink():
        if format_of(path)[0] is None:
            raise UserError(
                f"{given}: found the extension {path.suffix!r}, expected {KNOWN}. Convert or"
                " rename it."
            )
        found = [_regular(path)]
    elif glob.has_magic(str(given)):
        found = [
            file
            for match in _matches(path)
            for file in (_search(match) if match.is_dir() else _known(match))
        ]
    else:
        raise UserError(
            f"{given}: does not exist, expected a file, directory or glob, or {SPELLING}. Looked in"
            f" {Path.cwd()}."
        )
    if not found:
        raise UserError(
            f"{given}: found no data file in it, expected files with {KNOWN}. Check the path."
        )
    return found


def _known(path: Path) -> list[Path]:
    return [_regular(path)] if format_of(path)[0] else []


def _regular(path: Path) -> Path:
    """The path, if it can be read more than once; a pipe would block or be used up by the first
    look at it."""
    if not path.is_file():
        kinds = {
            "a link to nothing": path.is_symlink() and not path.exists(),
            "nothing": not path.exists(),
            "a pipe": path.is_fifo(),
            "a socket": path.is_socket(),
        }
        kind = next((kind for kind, applies in kinds.items() if applies), "a device")
        raise UserError(
            f"{path}: found {kind}, expected a regular file. Remove it, or store the data in a"
            " file."
        )
    return path


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches, sorted; hidden names only where the pattern spells them out. Raises
    ValueError."""
    root = Path(pattern.anchor)
    # Unlike glob.glob it stays out of loops of links
    matches = root.glob(str(pattern.relative_to(root)))
    spelled = [part for part in pattern.parts if part.startswith(".")]

    def is_asked_for(part: str) -> bool:
        return not part.startswith(".") or any(fnmatchcase(part, each) for each in spelled)

    return sorted(match for match in matches if all(map(is_asked_for, match.parts)))


def _search(top: Path) -> list[Path]:
    """The data files of a directory and all below it, sorted; each directory once, however many
    links lead to it."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    for folder, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        here = Path(folder)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if SAVED_SPLITS in names:
            splits = ", ".join(str(here / name) for name in folders)
            raise UserError(
                f"{here}: found a saved DatasetDict, expected one of its splits: {splits}."
            )
        if SAVED_DATASET in names and not DATASET_FACTS.isdisjoint(names):
            found += _saved_shards(here)
            continue
        beside = DATASET_FACTS | (CLEANING_REPORT if set(names) >= CLEANING_REPORT else set())
        for name in set(names) - beside:
            if not name.startswith("."):
                found += _known(here / name)
    return _without_held_out(top, sorted(found))


def _without_held_out(top: Path, files: list[Path]) -> list[Path]:
    """The files of a directory without those that its own names keep for evaluation; all, if there
    are only such.

    A clone of a dataset of the Hub has its parts as data/train-00000-of-00001.parquet,
    data/test-... or as folders.
    """
    kept = [
        file for file in files if not HELD_OUT.search(str(file.relative_to(top).with_suffix("")))
    ]
    if not kept or len(kept) == len(files):
        return files
    left_out = [str(file.relative_to(top)) for file in files if file not in kept]
    _tell(
        f"{top}: left out {len(left_out):,} of {len(files):,} files, which are named as held-out"
        " data:"
        f" {', '.join(left_out[:BAD_ROWS_NAMED])}{', ...' * (len(left_out) > BAD_ROWS_NAMED)}."
        " Evaluate on them with --eval_files, or give them by name to train on them."
    )
    return kept


@cache
def _tell(text: str) -> None:
    """Log a warning, once, since a directory is searched several times."""
    logger.warning("%s", translated(text))


def _saved_shards(directory: Path) -> list[Path]:
    """The arrow files of a dataset saved by `save_to_disk`; others beside them are left over or
    caches."""
    state = directory / SAVED_DATASET
    try:
        return [
            _regular(sibling_path(state, shard["filename"]))
            for shard in json.loads(state.read_bytes())["_data_files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state}: not the state of a saved dataset ({error!r}). Save the dataset again, or"
            " give its files."
        ) from None


def total_size(files: Iterable[File]) -> int:
    """The bytes of some files as they lie on the disk, what `progress` of `read_rows` adds up to; 0
    for the Hub's."""
    return sum(file.stat().st_size for file in files if isinstance(file, Path))


def read_rows(
    paths: Sequence[str | File],
    on_bad_rows: str | BadRows | None = None,
    convert: Callable[[Mapping], Any] | None = None,
    text_unit: str = "file",
    progress: Progress | None = None,
    columns: Columns | None = None,
) -> Iterator[Row]:
    """Files, directories, globs and datasets of the Hub -> their rows, streamed.

    Args:
        paths: what `expand` takes.
        on_bad_rows: the policy of `BadRows`, or one of these, which then counts them.
        convert: makes `Row.data` of a row's columns, which remember what it read of them. A row that it refuses with
            BadRowError is a bad row like one that cannot be parsed. Without it `Row.data` is the row's dict.
        text_unit: what one row of a txt file is: the whole "file", a "paragraph" (blank lines around it), or a "line".
        progress: called with the bytes read since its last call, as they lie on the disk (compressed, if the file is);
            in all the size of the files.
        columns: renames and leaves out columns, and counts those that `convert` did not read.

    Raises:
        UserError: at once for what `expand` refuses; while reading for a broken file, one without
            rows, and bad rows, as `BadRows` says. Without a policy bad rows are judged at the end,
            so do not act on the rows before the iteration is over.
    """
    if text_unit not in TEXT_UNITS:
        raise UserError(f"text_unit: found {text_unit!r}, expected {', '.join(TEXT_UNITS)}")
    bad = on_bad_rows if isinstance(on_bad_rows, BadRows) else BadRows(on_bad_rows)
    return _rows(expand(paths), bad, convert, text_unit, progress, columns or Columns())


def _rows(
    files: list[File], bad, convert, text_unit: str, progress, columns: Columns
) -> Iterator[Row]:
    total = 0
    try:
        for file in files:
            before = total
            for place, parse in parsables(file, text_unit, progress):
                total += 1
                where = f"{file}:{place}"
                try:
                    fields = columns.fields(parse())
                    row = Row(where, convert(fields) if convert else fields.given)
                except BadRowError as problem:
                    bad.add(where, str(problem))
                else:
                    if convert:
                        columns.count(where, fields)
                    yield row
            if total == before:
                raise UserError(
                    f"{file}: found no rows, expected at least one. Remove the file or create it"
                    " again."
                )
    except GeneratorExit:  # the caller had enough; what was skipped is still said
        bad.warn(total)
        raise
    columns.finish()
    bad.finish(total)


def parsables(file: File, text_unit: str, progress: Progress | None) -> Iterator[Parsable]:
    """The rows of one of `expand`'s files, each as its place and a function that parses it or
    raises BadRowError."""
    return file.rows() if isinstance(file, HubDataset) else read_file(file, text_unit, progress)


def to_document(data: Mapping) -> str:
    """A row -> the text of its field "text", or "content" if it has no "text"; raises BadRowError.

    Rows of other kinds may have such a field too: one message of a conversation, or a reply beside
    its reasoning.
    """
    row = Fields.of(data)
    name = "text" if row.get("text") is not None or row.get("content") is None else "content"
    if name not in row:
        found = f"{name!r}: null" if name in row.given else f"keys {row.names}"
        raise BadRowError(f"found {found}, expected 'text': a string")
    if "role" in row or "from" in row:
        raise BadRowError(
            f"found keys {row.names}, one message of a conversation, expected a document's 'text'"
        )
    if name == "content" and row.find("reasoning_content"):
        raise BadRowError(
            f"found keys {row.names}, a reply and its reasoning, expected a document's 'text'"
        )
    (text,) = row.take(name)
    if not isinstance(text, str):
        raise BadRowError(f"found {name!r}: {shown(text)}, expected a string")
    if not text.strip():
        raise BadRowError(f"found {name!r} without text, expected a string that is not empty")
    check_text(text, name)
    return text


def read_documents(
    paths: Sequence[str | File],
    on_bad_rows: str | None = None,
    text_unit: str = "file",
    progress: Progress | None = None,
    columns: Columns | None = None,
    boundaries: Boundaries | None = None,
    check: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Files, directories, globs and datasets of the Hub -> the documents in them, as `read_rows`.

    `boundaries` splits rows at the boundary markers spelled out in them, and counts; by default it
    splits. `check` raises BadRowError for a document that cannot be used.
    """
    split = (boundaries or Boundaries()).split

    def convert(data: Mapping) -> list[str]:
        documents = split(to_document(data))
        for document in documents if check else ():
            check(document)
        return documents

    rows = read_rows(paths, on_bad_rows, convert, text_unit, progress, columns)
    return (document for row in rows for document in row.data)
