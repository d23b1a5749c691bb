"""Paths, globs and names of datasets -> the data files they stand for."""

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
from minimind.common.files import beside
from minimind.common.language import translated
from minimind.data.bad_rows import BAD_ROWS_NAMED
from minimind.data.formats import KNOWN, format_of
from minimind.data.hub import PREFIX, SPELLING, HubDataset

logger = logging.getLogger(__name__)
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
            _regular(beside(state, shard["filename"]))
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
