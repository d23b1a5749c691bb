"""The lineage of a model: its own stage and those before it, with the files each was trained on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minimind.common.cache import content_hash, join_hashes
from minimind.common.errors import UserError
from minimind.data.sources import File, expand
from minimind.stage_directory.contents import adapter_base, is_adapter
from minimind.stage_directory.record import read_stage, weights_hash


class Ancestor(NamedTuple):
    """One stage of a lineage.

    `files` are its training files, if they are still what they were: otherwise `problem` says what
    is missing.
    """

    directory: str
    stage: str | None
    files: list[File]
    problem: str | None = None


class StageRecord(NamedTuple):
    """One stage as its directory records it; `problem` where a later stage recorded a directory
    that is not there, or has other weights now: then `record` has no more than the later one
    says."""

    directory: Path
    record: dict
    problem: str | None = None


def stage_records(directory: str | Path) -> Iterator[StageRecord]:
    """The records of a model's stages, the last stage first.

    A parent is looked for from the working directory, then from each directory above that of its
    record, since a run is started in one of these; also beside that directory. It must have the
    weights recorded.

    Raises:
        UserError: a record cannot be read.
    """
    path = Path(directory)
    while True:
        record = read_stage(path)
        yield StageRecord(path, record)
        parent = record.get("parent") or {}
        if not record and is_adapter(path):
            parent = {"directory": str(adapter_base(path))}
        if not isinstance(parent.get("directory"), str):
            return
        origin = find_origin(path, parent)
        if origin is None:
            problem = "the directory is not there, or holds other weights now"
            known = {"stage": parent.get("stage"), "weights": parent.get("weights")}
            yield StageRecord(Path(parent["directory"]), known, problem)
            return
        path = origin


def find_origin(directory: Path, origin: dict) -> Path | None:
    """The directory that the record of another one names as its origin (see `provenance`), with the
    weights it had; None if it is not there."""
    places = _places(directory, origin["directory"])
    return next((each for each in places if _has_weights(each, origin.get("weights"))), None)


def lineage(directory: str | Path) -> list[Ancestor]:
    """The stages of a model with their training files, which must have the hashes recorded, the
    last stage first; see `stage_records`.

    Raises:
        UserError: a record cannot be read.
    """
    ancestors = []
    for path, record, problem in stage_records(directory):
        files, missing = ([], problem) if problem else _training_files(path, record)
        ancestors.append(Ancestor(str(path), record.get("stage"), files, missing))
    return ancestors


def _places(directory: Path, recorded: str) -> Iterator[Path]:
    """Where a path in the record of a directory may be."""
    yield Path(recorded)
    yield from (above / recorded for above in directory.resolve().parents)
    yield directory.resolve().parent / Path(recorded).name


def _has_weights(directory: Path, expected: Any) -> bool:
    if not directory.is_dir():
        return False
    return expected in (None, read_stage(directory).get("weights") or weights_hash(directory))


def _training_files(directory: Path, record: dict) -> tuple[list[File], str | None]:
    """The files that a stage was trained on, and what is missing."""
    if not record:
        return [], "it has no stage.json, which would name its training files"
    if record["stage"] == "merge":
        return [], None  # trains nothing
    train = (record.get("data") or {}).get("train")
    if not isinstance(train, dict) or not isinstance(train.get("files"), list):
        return [], "its stage.json names no training files"
    try:
        files = _expand(directory, train["files"])
        if train.get("hash") in _hashes(directory, files, train.get("sources")):
            return files, None
    except UserError as error:
        return [], str(error)
    except (KeyError, TypeError):  # not as a stage writes it
        return [], "its stage.json names no training files"
    return [], f"{', '.join(map(str, files))}: not as they were (stage.json has another hash)"


def _expand(directory: Path, names: list) -> list[File]:
    """The files that paths in the record of a directory stand for; raises UserError."""
    places = [next(filter(Path.exists, _places(directory, str(name))), name) for name in names]
    return expand([str(place) for place in places])


def _hashes(directory: Path, files: list[File], sources: Any) -> Iterator[str | None]:
    """The hashes that a stage may have recorded: of all files; where it mixes sources of documents,
    of each source, joined."""
    yield content_hash(files)
    if isinstance(sources, list):
        yield join_hashes([content_hash([file]) for file in files])  # such as cleaned copies
        words = [source["files"] for source in sources]
        yield join_hashes([content_hash(_expand(directory, each)) for each in words])
