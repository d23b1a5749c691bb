"""The files in an output directory: which of them a run of ours wrote, and so may overwrite and
delete.

A run is recognised by the content of `run.json`, `stage.json` and its checkpoints. Only what
`RUN_FILES` and `CHECKPOINT_FILES` name is deleted, and symbolic links are never followed.
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
from minimind.sharing import CARD, SCORE_CARD, is_generated

RUN, STAGE, LOCK, PARTIAL = "run.json", "stage.json", ".run.lock", ".partial"
MANIFEST, RECIPE = "manifest.json", "recipe.json"
# The library's own mark, see transformers.trainer_jit_checkpoint
INCOMPLETE = "checkpoint-is-incomplete.txt"
RUN_LOGS = ("train_log.jsonl", "samples.jsonl")  # a checkpoint keeps a copy of them

# Everything that a run writes, as patterns of names. The trackers' directories and bad batches
# (guards.py) are not among them: they are kept.
MODEL_FILES = (
    *("config.json", "generation_config.json", "configuration_minimind.py"),
    *("kernels_minimind.py", "modeling_minimind.py", "model.safetensors"),
    *("model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_config.json"),
    *("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "training_args.bin"),
)
RUN_FILES = (
    *(RUN, STAGE, LOCK, PARTIAL, *MODEL_FILES, *RUN_LOGS, "report.html", "loss.png"),
    *("mask_report.json", SCORE_CARD, ".universal-checkpoint-*", ".writable-*"),
)
CHECKPOINT_FILES = (
    *(MANIFEST, RECIPE, INCOMPLETE, *MODEL_FILES, *RUN_LOGS, "trainer_state.json", "README.md"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "run_state_*.pth"),
    *("latest", "global_step*", "zero_to_fp32.py"),  # DeepSpeed's
)
DIRECTORIES = (PARTIAL, ".universal-checkpoint-*", "global_step*")  # the others are files
# A shell or a batch system may write these before a run begins
SHELL_LOGS = (".log", ".out", ".err")
FIELDS = {RUN: {"run": str, "recipe": dict}, STAGE: {"stage": str, "weights": str}}


# Whose run it is


def read_record(output_dir: Path, name: str) -> dict[str, Any]:
    """The content of `run.json` or `stage.json`, empty if there is no such file.

    A damaged `run.json` is replaced by the newest checkpoint's "recipe", with the damage as
    "problem".

    Raises:
        UserError: the file is not one of ours, or cannot be read.
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
        definitions = filter(None, (_content(path / RECIPE) for path in checkpoints(output_dir)))
        definition = next(definitions, None)
        if name != RUN or not file.is_file() or definition is None:
            raise
        return {"recipe": definition, "problem": str(error)}
    if any(not isinstance(record.get(key), kind) for key, kind in FIELDS[name].items()):
        raise UserError(
            f"{file} is not of a run of ours: it has no {' and '.join(FIELDS[name])}. It would be"
            " overwritten. Give a directory that does not exist yet."
        )
    return record


def check_output_directory(output_dir: Path) -> None:
    """Raise UserError for a directory that holds something else than a run of ours, or whose name
    is not UTF-8."""
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

    # What holds a run of ours is accepted, what another command of ours wrote is not
    run, stage = (read_record(output_dir, name) for name in (RUN, STAGE))
    if stage.get("stage") in ("import", "merge"):
        raise UserError(
            f"--output_dir {output_dir} holds a model that minimind {stage['stage']} wrote, not a"
            " run. Give a directory that does not exist yet."
        )
    if run or stage or checkpoints(output_dir):
        return

    # Hidden files and logs of the shell may be there, unless a run would overwrite them
    names = sorted(path.name for path in output_dir.iterdir() if path.name != LOCK)
    harmless = [name for name in names if name.startswith(".") or name.endswith(SHELL_LOGS)]
    strangers = [name for name in names if name not in harmless or matches(name, RUN_FILES)]
    if strangers:
        listed = ", ".join(strangers[:3])
        if len(strangers) > 3:
            listed = f"{listed} and {len(strangers) - 3:,} more"
        raise UserError(
            f"--output_dir {output_dir} is not empty and not a run of ours: found {listed}, "
            f"but neither {RUN} nor stage.json. Give a directory that does not exist yet."
        )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name of a file, or of its hidden `.NAME.partial` (common/files.py), matches a
    pattern."""
    partial = re.fullmatch(r"\.(.+)\.partial", name)
    names = (name, partial[1]) if partial else (name,)
    return any(fnmatch(each, pattern) for each in names for pattern in patterns)


# Checkpoints


def checkpoints(output_dir: Path, foreign: bool = False) -> list[Path]:
    """The checkpoints of our runs in a directory, complete or not, the newest first; with `foreign`
    what has such a name and is not ours."""
    steps = {}
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if number and is_checkpoint(path) != foreign:
            steps[path] = int(number[1])
    return sorted(steps, key=steps.__getitem__, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint of ours, however broken.

    It is if it holds our recipe.json, which is written first and deleted last, our manifest, or a
    file that only our runs write; or nothing yet.
    """
    try:
        names = {file.name for file in path.iterdir()}
    except OSError:  # a file, or unreadable
        return False
    if names <= {f".{RECIPE}.partial", INCOMPLETE}:
        return True
    if any(fnmatch(name, "run_state_*.pth") for name in names):
        return True
    marks = {RECIPE: "stage", MANIFEST: "files"}
    return any(name in names and key in _content(path / name) for name, key in marks.items())


def _content(file: Path) -> dict:
    try:
        return read_json(file, "")
    except UserError:
        return {}


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete what a run wrote of a checkpoint.

    The manifest goes first, so that a half-deleted checkpoint does not count as complete, and
    recipe.json last, so that it is still recognised as ours.
    """
    if checkpoint.is_symlink() or not is_checkpoint(checkpoint):
        return
    files = _content(checkpoint / MANIFEST).get("files")
    parts = [PurePath(name).parts for name in files] if isinstance(files, dict) else []
    ours = {names[0] for names in parts if names}  # compared with names here: none leads outside
    with suppress(OSError):  # it may be a directory
        (checkpoint / MANIFEST).unlink()
    for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == RECIPE):
        if path.name in ours or matches(path.name, CHECKPOINT_FILES):
            _delete(path, directory=path.name in ours)
    if not any(checkpoint.iterdir()):  # a user's own files stay
        checkpoint.rmdir()


def _delete(path: Path, directory: bool = False) -> None:
    """Delete a file, a link, or a directory that is known to be one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    elif directory or matches(path.name, DIRECTORIES):
        shutil.rmtree(path, ignore_errors=True)


def clear(output_dir: Path) -> None:
    """Delete what an earlier run wrote into its directory, except `run.json`: it marks the
    directory as ours until the next run writes its own."""
    for checkpoint in checkpoints(output_dir):
        delete_checkpoint(checkpoint)
    (output_dir / STAGE).unlink(missing_ok=True)
    for path in sorted(output_dir.iterdir()):
        if matches(path.name, RUN_FILES) and path.name not in (RUN, LOCK):
            _delete(path)
    if is_generated(output_dir / CARD):  # what a person wrote stays
        _delete(output_dir / CARD)


# One run at a time

_run_lock: BaseFileLock | None = None  # of this process's run; it trains one at a time


def lock_directory(output_dir: Path) -> None:
    """Keep other runs out of a directory until `unlock_directory` or the end of this process; for
    the main process.

    Raises:
        UserError: another run is in it.
    """
    global _run_lock
    unlock_directory()
    _run_lock = lock(output_dir / LOCK, f"--output_dir {output_dir}")


def unlock_directory() -> None:
    """Let other runs in again, if this process kept them out."""
    global _run_lock
    unlock(_run_lock)
    _run_lock = None
