"""Paths, directories, globs and names of datasets -> the data files to read."""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from minimind.common.errors import UserError
from minimind.common.files import sibling_path
from minimind.common.language import translated
from minimind.data.bad_rows import BAD_ROWS_NAMED
from minimind.data.formats import KNOWN, format_of
from minimind.data.hub import PREFIX, SPELLING, HubDataset

logger = logging.getLogger(__name__)

# Names of files to evaluate on, by the rule of `datasets`: one of these words between characters
# that are not letters
HELD_OUT = re.compile(
    r"(?<![^\W\d_])(test|testing|valid|validation|val|dev|eval|evaluation)(?![^\W\d_])",
    re.IGNORECASE,
)
DATASET_FACTS = {"dataset_info.json", "dataset_infos.json"}  # `datasets` writes one beside the data
CLEANING_REPORT = {"report.json", "report.html"}  # `minimind clean` writes both beside the data
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"  # `save_to_disk` writes one

File = Path | HubDataset


def expand(paths: Sequence[str | File]) -> list[File]:
    """List what is to be read, each file and dataset once, in a stable order.

    A directory is searched recursively, through links too, for files with known extensions; hidden
    ones are left out. One that `datasets.save_to_disk` wrote stands for its arrow files. A glob
    matches as in a shell, `**` included: directories, and files with known extensions.

    Raises:
        UserError: a path does not exist, holds no data file or cannot be looked up; a file is
            empty, has an unknown extension or is not a regular file; a dataset cannot be found.
    """
    if not paths:
        raise UserError(
            f"found no data files, expected at least one file, directory or glob ({KNOWN})."
        )
    files: dict[str, File] = {}
    for path in paths:
        try:
            for file in _files_of(path):
                is_dataset = isinstance(file, HubDataset)
                files.setdefault(str(file) if is_dataset else os.path.realpath(file), file)
        # No permission, a name that no file can have, no such ~user
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: cannot be looked up ({error}). Check the path.") from None
    for file in files.values():
        if isinstance(file, Path) and file.stat().st_size == 0:
            raise UserError(
                f"{file}: found an empty file, expected rows. Remove it or create it again."
            )
    return list(files.values())


def _files_of(source: str | File) -> list[File]:
    """The files that one path, directory, glob or dataset name stands for."""
    if isinstance(source, HubDataset):
        return [source]
    if str(source).startswith(PREFIX):
        return [HubDataset(str(source))]
    path = Path(source).expanduser()
    if path.is_dir():
        files = _search(path)
    elif path.exists() or path.is_symlink():
        if format_of(path)[0] is None:
            raise UserError(
                f"{source}: found the extension {path.suffix!r}, expected {KNOWN}. Convert or"
                " rename it."
            )
        files = [_regular(path)]
    elif glob.has_magic(str(source)):
        matches = _matches(path)
        files = [f for m in matches for f in (_search(m) if m.is_dir() else _if_known(m))]
    else:
        raise UserError(
            f"{source}: does not exist, expected a file, directory or glob, or {SPELLING}. Looked"
            f" in {Path.cwd()}."
        )
    if not files:
        raise UserError(
            f"{source}: found no data file in it, expected files with {KNOWN}. Check the path."
        )
    return files


def _if_known(path: Path) -> list[Path]:
    """The path in a list if its extension is known, else an empty list."""
    return [_regular(path)] if format_of(path)[0] else []


def _regular(path: Path) -> Path:
    """The path of a regular file; a pipe would block, or be used up by the first look at it."""
    if path.is_file():
        return path
    if not path.exists():
        kind = "a link to nothing" if path.is_symlink() else "nothing"
    else:
        kind = "a pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"
    raise UserError(
        f"{path}: found {kind}, expected a regular file. Remove it, or store the data in a file."
    )


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches, sorted; hidden names only where the pattern names them."""
    root = Path(pattern.anchor)
    # Unlike glob.glob, this does not follow loops of links
    matches = root.glob(str(pattern.relative_to(root)))
    hidden = [part for part in pattern.parts if part.startswith(".")]

    def is_visible(part: str) -> bool:
        return not part.startswith(".") or any(fnmatchcase(part, name) for name in hidden)

    return sorted(match for match in matches if all(map(is_visible, match.parts)))


def _search(top: Path) -> list[Path]:
    """The data files below a directory, sorted; each directory once, whatever links lead to it."""

    def refuse(error: OSError) -> None:
        raise error

    visited: set[tuple[int, int]] = set()
    files: list[Path] = []
    for folder, subfolders, names in os.walk(top, onerror=refuse, followlinks=True):
        here = Path(folder)
        status = here.stat()
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if SAVED_SPLITS in names:
            splits = ", ".join(str(here / name) for name in subfolders)
            raise UserError(
                f"{here}: found a saved DatasetDict, expected one of its splits: {splits}."
            )
        if SAVED_DATASET in names and not DATASET_FACTS.isdisjoint(names):
            files += _saved_shards(here)
            continue
        reports = DATASET_FACTS | (CLEANING_REPORT if set(names) >= CLEANING_REPORT else set())
        for name in set(names) - reports:
            if not name.startswith("."):
                files += _if_known(here / name)
    return _without_held_out(top, sorted(files))


def _without_held_out(top: Path, files: list[Path]) -> list[Path]:
    """The files of a directory whose names do not reserve them for evaluation; all, if none is
    left.

    A clone of a dataset of the Hub has its splits as data/train-00000-of-00001.parquet,
    data/test-... or as folders.
    """
    names = [file.relative_to(top) for file in files]
    held_out = [name for name in names if HELD_OUT.search(str(name.with_suffix("")))]
    if not held_out or len(held_out) == len(files):
        return files
    _warn_once(
        f"{top}: left out {len(held_out):,} of {len(files):,} files, which are named as held-out"
        f" data: {', '.join(map(str, held_out[:BAD_ROWS_NAMED]))}"
        f"{', ...' * (len(held_out) > BAD_ROWS_NAMED)}."
        " Evaluate on them with --eval_files, or give them by name to train on them."
    )
    return [top / name for name in names if name not in held_out]


@cache
def _warn_once(text: str) -> None:
    """Log a warning, once, since a directory is searched several times."""
    logger.warning("%s", translated(text))


def _saved_shards(directory: Path) -> list[Path]:
    """The arrow files of a dataset saved by `save_to_disk`, without leftovers and caches."""
    state = directory / SAVED_DATASET
    try:
        shards = json.loads(state.read_bytes())["_data_files"]
        return [_regular(sibling_path(state, shard["filename"])) for shard in shards]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state}: not the state of a saved dataset ({error!r}). Save the dataset again, or"
            " give its files."
        ) from None


def total_size(files: Iterable[File]) -> int:
    """The bytes on the disk, the total of `progress` of `read_rows`; datasets of the Hub have 0."""
    return sum(file.stat().st_size for file in files if isinstance(file, Path))
