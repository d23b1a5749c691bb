"""Checkpoints: the manifest that declares one complete, their verification, rotation and choice.

The same command again continues an interrupted run from its last complete checkpoint, and ends with
the same bits as if it had not been interrupted.

    run.json               in the output directory: the run's id and definition; written first
    checkpoint-N/          the library's files, and
        recipe.json        the definition: all that decides the result, to notice what has changed
        run_state_R.pth    of process R: what the library keeps in memory alone
        train_log.jsonl    the log up to here, so that no line is lost or written twice
        manifest.json      sizes and hashes of all these; written last, so that a checkpoint
                           without one is known to be incomplete

All of it is on the disk, not only in the system's memory, before the manifest is: a power loss
leaves a checkpoint that is complete or known not to be.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from minimind.common.errors import UserError, decoration, reason
from minimind.common.files import (
    hash_file,
    read_json,
    require_fields,
    sync_directory,
    sync_files,
    write_bytes,
    write_json,
)
from minimind.training.output_directory import (
    INCOMPLETE,
    MANIFEST,
    RECIPE,
    RUN_LOGS,
    checkpoints,
    delete_checkpoint,
)

RUN_STATE = {"loss", "total_loss", "last_logged", "seconds", "wall_seconds"}  # of run_state_*.pth
RUN_STATE |= {"callbacks", "exported"}

# The library looks for the best checkpoint where it was before the run was moved, see `best_of`
logging.getLogger("transformers.trainer").addFilter(
    lambda record: not record.msg.startswith("The best checkpoint")
)


# Manifest and verification


def _facts_of(file: Path) -> dict:
    return {"size": file.stat().st_size, "xxh3_128": hash_file(file)}


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Declare a checkpoint complete: list its files with sizes and hashes, in a file that appears
    at once, after all that it lists is on the disk."""
    sync_files(checkpoint)
    files = {
        str(file.relative_to(checkpoint)): _facts_of(file)
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(checkpoint / MANIFEST, {**facts, "files": files})
    sync_directory(checkpoint.parent)


def read_manifest(checkpoint: Path) -> dict:
    """{"step", "processes", "files"} of a complete checkpoint; raises UserError."""
    file, fields = checkpoint / MANIFEST, {"step": int, "processes": int, "files": dict}
    manifest = read_json(file, "It lists the files of a checkpoint.", fields=fields)
    for name, entry in manifest["files"].items():
        entry = entry if isinstance(entry, dict) else {}
        require_fields(f"{file}: {name}", entry, {"size": int, "xxh3_128": str}, "")
    return manifest


def problem_of(checkpoint: Path, hashes: bool = True, weights_alone: bool = False) -> str | None:
    """Why a run cannot resume from this checkpoint, or None if it is complete.

    `hashes`: read all of it. With `weights_alone` one that holds nothing else is complete too.
    """
    if (checkpoint / INCOMPLETE).exists():
        return f"marked incomplete by the library ({INCOMPLETE})"
    if not os.path.lexists(checkpoint / MANIFEST):
        return f"it was never finished: there is no {MANIFEST}, which is written last"
    try:
        manifest = read_manifest(checkpoint)
        files = manifest["files"]
        for name, expected in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is gone"
            if (size := file.stat().st_size) != expected["size"]:
                return f"{name} has {size:,} bytes, was written with {expected['size']:,}"
        if not (weights_alone or any(name.startswith("rng_state") for name in files)):
            return "it holds weights alone (--save_only_model)"
        if not hashes:
            return None
        if missing := sorted({TRAINER_STATE_NAME, RECIPE, "run_state_0.pth"} - set(files)):
            return f"{MANIFEST} does not name {', '.join(missing)}"
        for name, expected in files.items():
            if hash_file(checkpoint / name) != expected["xxh3_128"]:
                return f"{name} is corrupted: its hash is not the one it was written with"
            if problem := _unreadable(checkpoint / name):
                return f"{name} cannot be read: {problem}"
        if not manifest.get("finite") and (name := _not_finite(checkpoint)):
            return f"{name} holds weights that are not finite"
    except (UserError, OSError) as error:
        return str(error).strip().removeprefix(f"{checkpoint}/")
    return None


def _unreadable(file: Path) -> str | None:
    """Why the libraries could not load a file whose hash fits: it was written wrongly. Tensors are
    not read."""
    try:
        if file.name == TRAINER_STATE_NAME:
            read_json(file, "", fields={"global_step": int, "max_steps": int, "log_history": list})
            TrainerState.load_from_json(file)
        elif file.suffix == ".json":
            read_json(file, "")
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        # In global_step* are DeepSpeed's own
        elif file.suffix in (".pt", ".pth") and not file.parent.name.startswith("global_step"):
            with safe_globals():
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            needed = RUN_STATE if file.name.startswith("run_state") else set()
            if not isinstance(state, dict) or not state.keys() >= needed:
                return "it holds something else"
    except Exception as error:  # of json, pickle, zip or safetensors
        return reason(error).splitlines()[0].removeprefix(f"{file}: ")
    return None


def _not_finite(checkpoint: Path) -> str | None:
    """The first weights that are not finite; for a checkpoint whose manifest does not say that all
    are."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not largest(tensor).isfinite():
                    return f"{file.name}, {name},"
    return None


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, NaN where there is one; takes no memory of the tensor's size."""
    if not tensor.numel():
        return tensor.new_zeros(())
    return torch.linalg.vector_norm(tensor.detach(), float("inf"))


# Choice and rotation


def record_bad_steps(checkpoint: Path, steps: int) -> None:
    """Note in a checkpoint, if it exists, that all of the `steps` after it were not finite."""
    if (checkpoint / MANIFEST).is_file():
        with decoration("a note in a checkpoint"):
            write_json(checkpoint / MANIFEST, {**read_manifest(checkpoint), "bad_steps": steps})


def doubt_about(checkpoint: Path) -> str | None:
    """Why a run should not resume from a complete checkpoint unless the command names it."""
    steps = read_manifest(checkpoint).get("bad_steps")
    return steps and f"the run stopped after it, the {steps} steps that followed were not finite"


def last_good(output_dir: Path) -> Path | None:
    """The checkpoint that the same command would resume from, by the sizes of its files alone."""
    for path in checkpoints(output_dir):
        if not (problem_of(path, hashes=False) or doubt_about(path)):
            return path
    return None


def last_complete_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run can resume from, and one line for each newer one about what
    is wrong with it.

    Raises:
        UserError: no step after any of those that are left was finite.
    """
    problems, suspect = [], None
    for checkpoint in checkpoints(output_dir):
        problem = problem_of(checkpoint)
        if problem is None:
            problem = doubt_about(checkpoint)
            if problem is None:
                return checkpoint, problems
            suspect = suspect or f"{checkpoint}: {problem}"
        problems.append(f"skipped {checkpoint}: {problem}")
    if suspect:
        raise UserError(
            f"{suspect}. There is no checkpoint before it. To resume from it anyway, with another"
            " --learning_rate say, give it to --resume_from_checkpoint; to start over, give"
            " --overwrite_output_dir true and --resume_from_checkpoint false."
        )
    return None, problems


def rotate(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Keep the newest `limit` complete checkpoints and those of `keep`; delete all others.

    The library counts broken ones too, and so may delete the last complete one.
    """
    if not limit or limit < 1:
        return
    kept = {path.resolve() for path in keep}
    for checkpoint in checkpoints(output_dir):
        if checkpoint.resolve() in kept:
            continue
        if len(kept) < limit and problem_of(checkpoint, hashes=False, weights_alone=True) is None:
            kept.add(checkpoint.resolve())
        else:
            delete_checkpoint(checkpoint)


def best_of(checkpoint: Path) -> str | None:
    """The best checkpoint at the time of this one; None where there was none, or it is gone.

    It is looked for beside this one, since a run may have been moved, and then where it was, since
    a run may have branched off another. It must have the same history.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME, "Resume from another checkpoint.")
    recorded = state.get("best_model_checkpoint")
    places = [checkpoint.parent / Path(recorded).name, Path(recorded)] if recorded else []
    return next((str(place) for place in places if _is_earlier(place, state)), None)


def _is_earlier(checkpoint: Path, state: dict) -> bool:
    try:
        earlier = read_json(checkpoint / TRAINER_STATE_NAME, "")["log_history"]
    except (UserError, KeyError):
        return False
    return json.dumps(earlier) == json.dumps(state["log_history"][: len(earlier)])


# The logs of a run, of which each checkpoint keeps a copy


def keep_logs(output_dir: Path, checkpoint: Path) -> None:
    """Copy the logs of a run into a checkpoint."""
    for name in RUN_LOGS:
        with decoration(f"keeping {name}"):
            if (output_dir / name).exists():
                write_bytes(checkpoint / name, (output_dir / name).read_bytes())


def restore_logs(checkpoint: Path, output_dir: Path) -> None:
    """Cut the logs of a stage directory back to what they were at a checkpoint."""
    for name in RUN_LOGS:
        with decoration(f"restoring {name}"):
            if (checkpoint / name).exists():
                write_bytes(output_dir / name, (checkpoint / name).read_bytes())
            else:
                (output_dir / name).unlink(missing_ok=True)
