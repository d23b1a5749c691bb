"""What lies in an output directory: which of it a run of ours wrote, and so may overwrite and
delete.

A run is recognised by what `run.json`, `stage.json` and its checkpoints hold, and nothing is
deleted that `RUN_FILES` and `CHECKPOINT_FILES` do not name. Symbolic links are never followed to be
deleted.
"""

import os
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from filelock import BaseFileLock
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.common.locks import lock, unlock

RUN, STAGE, LOCK, PARTIAL = "run.json", "stage.json", ".run.lock", ".partial"
MANIFEST, RECIPE = "manifest.json", "recipe.json"
# The library's own mark, see transformers.trainer_jit_checkpoint
INCOMPLETE = "checkpoint-is-incomplete.txt"
RUN_LOGS = ("train_log.jsonl", "samples.jsonl")  # a checkpoint keeps a copy of them

# Everything that a run writes, as patterns of names: the model's files, those of the stage directory and of its
# checkpoints. Trackers' directories and bad batches (guards.py) are not among them: they are kept.
# fmt: off
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
    "configuration_minimind.py", "kernels_minimind.py", "modeling_minimind.py",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_args.bin",
)
RUN_FILES = (
    RUN, STAGE, LOCK, PARTIAL, *MODEL_FILES, *RUN_LOGS, "report.html", "loss.png", "mask_report.json",
    ".universal-checkpoint-*", ".writable-*",
)
CHECKPOINT_FILES = (
    MANIFEST, RECIPE, INCOMPLETE, *MODEL_FILES, *RUN_LOGS, "trainer_state.json", "optimizer.pt", "scheduler.pt",
    "scaler.pt", "rng_state*.pth", "run_state_*.pth", "README.md",
    "latest", "global_step*", "zero_to_fp32.py",  # DeepSpeed's
)
# fmt: on
# Those of the names above that are one
DIRECTORIES = (PARTIAL, ".universal-checkpoint-*", "global_step*")
# The shell's and the batch system's: they may lie there before a run begins
SHELL_LOGS = (".log", ".out", ".err")
CONTENT = {RUN: {"run": str, "recipe": dict}, STAGE: {"stage": str, "weights": str}}


# Whose it is


def read_record(output_dir: Path, name: str) -> dict[str, Any]:
    """The `run.json` or `stage.json` of a directory; empty where there is none.

    A damaged `run.json` costs no checkpoint: the newest says as well what the run is ("recipe", and
    the damage as "problem").

    Raises:
        UserError: it is not one of ours, or does not read.
    """
    file = output_dir / name
    if not os.path.lexists(file):
        return {}
    remedy = "Another program's? Then give another --output_dir. Damaged? Then remove it."
    try:
        record = read_json(file, remedy)
        if not record:
            raise UserError(f"{file}: found an empty object. {remedy}")
    except UserError as error:
        recipes = [
            recipe for path in checkpoints(output_dir) if (recipe := _content(path / RECIPE))
        ]
        if name != RUN or not file.is_file() or not recipes:
            raise
        return {"recipe": recipes[0], "problem": str(error)}
    if any(not isinstance(record.get(key), kind) for key, kind in CONTENT[name].items()):
        raise UserError(
            f"{file} is not of a run of ours: it has no {' and '.join(CONTENT[name])}. It would be"
            " overwritten. Give a directory that does not exist yet."
        )
    return record


def check_output_directory(output_dir: Path) -> None:
    """Raises UserError for a directory with something in it that is not a run of ours, or of a name
    in no UTF-8."""
    try:
        str(output_dir).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--output_dir {output_dir}: the name is not UTF-8, as weights' files need. Give"
            " another one."
        ) from None
    try:
        _check(output_dir)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be read: {error.strerror}.") from error


def _check(output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(
            f"--output_dir {output_dir} is a file. Give a directory, new or of the run to continue."
        )
    if not output_dir.is_dir():
        return
    run, stage = (read_record(output_dir, name) for name in (RUN, STAGE))
    if stage.get("stage") in ("import", "merge"):
        raise UserError(
            f"--output_dir {output_dir} holds a model that minimind {stage['stage']} wrote, not a"
            " run. Give a directory that does not exist yet."
        )
    if run or stage or checkpoints(output_dir):
        return
    names = sorted(path.name for path in output_dir.iterdir() if path.name != LOCK)
    strangers = [
        name
        for name in names
        if named(name, RUN_FILES) or not (name.startswith(".") or name.endswith(SHELL_LOGS))
    ]
    if strangers:
        found = ", ".join(strangers[:3])
        if len(strangers) > 3:
            found = f"{found} and {len(strangers) - 3:,} more"
        raise UserError(
            f"--output_dir {output_dir} is not empty and not a run of ours: found {found}, "
            f"but neither {RUN} nor stage.json. Give a directory that does not exist yet."
        )


def named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name of a file, or of its hidden `.NAME.partial` (records.py), is among the
    patterns."""
    inner = re.fullmatch(r"\.(.+)\.partial", name)
    return any(
        fnmatch(each, pattern)
        for each in (name, *(inner.groups() if inner else ()))
        for pattern in patterns
    )


# Checkpoints


def checkpoints(output_dir: Path, foreign: bool = False) -> list[Path]:
    """The checkpoints of our runs in a directory, complete or not, the newest first; or `foreign`
    things so named."""
    found = {
        path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        for path in output_dir.glob("*")
    }
    steps = {
        path: int(match[1])
        for path, match in found.items()
        if match and is_checkpoint(path) != foreign
    }
    return sorted(steps, key=steps.__getitem__, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint of ours, however broken: it holds our recipe, which is
    written first and deleted last, our manifest, or a file that only our runs write; or nothing
    yet."""
    try:
        names = {file.name for file in path.iterdir()}
    except OSError:  # a file, or not ours to read
        return False
    if names <= {f".{RECIPE}.partial", INCOMPLETE} or any(
        fnmatch(name, "run_state_*.pth") for name in names
    ):
        return True
    marks = {RECIPE: "stage", MANIFEST: "files"}
    return any(name in names and key in _content(path / name) for name, key in marks.items())


def _content(file: Path) -> dict:
    try:
        return read_json(file, "")
    except UserError:
        return {}


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete what a run wrote of a checkpoint: the manifest first, so that cut off half-way it is
    not taken for a complete one, and the recipe last, so that it is still known for ours."""
    if checkpoint.is_symlink() or not is_checkpoint(checkpoint):
        return
    listed = _content(checkpoint / MANIFEST).get("files")
    parts = [PurePath(name).parts for name in listed] if isinstance(listed, dict) else []
    ours = {names[0] for names in parts if names}  # compared with names found here: none leads out
    with suppress(OSError):  # it may be a directory
        (checkpoint / MANIFEST).unlink()
    for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == RECIPE):
        if path.name in ours or named(path.name, CHECKPOINT_FILES):
            _delete(path, directory=path.name in ours)
    if not any(checkpoint.iterdir()):  # a user's own files stay
        checkpoint.rmdir()


def _delete(path: Path, directory: bool = False) -> None:
    """Delete a file, a link, or a directory that is known to be one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif directory or named(path.name, DIRECTORIES):
        shutil.rmtree(path, ignore_errors=True)


def clear(output_dir: Path) -> None:
    """Delete what a former run wrote into its directory, but `run.json`, by which the directory is
    known for ours until the next run writes its own."""
    for checkpoint in checkpoints(output_dir):
        delete_checkpoint(checkpoint)
    (output_dir / STAGE).unlink(missing_ok=True)
    for path in sorted(output_dir.iterdir()):
        if named(path.name, RUN_FILES) and path.name not in (RUN, LOCK):
            _delete(path)


# One run at a time

_held: BaseFileLock | None = None  # the lock of this process's run; it trains one at a time


def lock_directory(output_dir: Path) -> None:
    """Keep other runs out of a directory until `unlock_directory` or the end of this process; the
    main process's part.

    Raises:
        UserError: another run is in it.
    """
    global _held
    unlock_directory()
    _held = lock(output_dir / LOCK, f"--output_dir {output_dir}")


def unlock_directory() -> None:
    """Let other runs in; nothing happens where none was kept out."""
    global _held
    unlock(_held)
    _held = None
