"""The record of a stage directory, `stage.json`: stage, hash of the weights, parents, versions."""

import importlib.metadata
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.stage_directory.contents import adapter_base, is_adapter

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed")
LIBRARIES += ("gguf", "minimind-hf")
# The entries of `stage.json` that are read, and their types; other entries may be anything
FIELDS = {"stage": str, "steps": int | None}
FIELDS |= dict.fromkeys(("pipeline", "weights", "tokenizer"), str | None)
FIELDS |= dict.fromkeys(("parent", "data", "metrics", "options", "libraries"), dict | None)


def read_stage(path: str | Path) -> dict:
    """The record of a stage directory; empty for a checkpoint that other tools wrote.

    Raises:
        UserError: it cannot be read.
    """
    file = Path(path) / "stage.json"
    remedy = "The model can be used without this record: copy the file again, or delete it."
    return read_json(file, remedy, fields=FIELDS) if os.path.lexists(file) else {}


def weights_hash(path: str | Path) -> str:
    """A hash of the files of weights in a stage directory."""
    return content_hash(file for file in sorted(Path(path).glob("*.safetensors")) if file.is_file())


def check_unchanged(path: Path) -> None:
    """Raises UserError where a directory's weights do not have the hash in its stage.json: after a
    power loss, a file may have the right size and hold zeros."""
    expected = read_stage(path).get("weights")
    if expected and expected != weights_hash(path):
        raise UserError(
            f"{path}: the weights are not those of this stage (stage.json has another hash). Put"
            " the stage's own files back, or delete stage.json to use these all the same."
        )


def provenance(path: Path) -> dict:
    """A stage directory as records name it: path, stage and weights, and for an adapter its
    base."""
    stage = read_stage(path).get("stage")
    origin = {"directory": str(path), "stage": stage, "weights": weights_hash(path)}
    if is_adapter(path):
        origin["base"] = provenance(adapter_base(path))
    return origin


@cache
def library_versions() -> Mapping[str, str]:
    """Installed versions of the libraries that decide what a run computes."""
    versions = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
