"""Whether a stage directory is complete, its files of weights, and the base of an adapter."""

import os
from pathlib import Path

from safetensors import safe_open

from minimind.common.errors import UserError
from minimind.common.files import read_json, sibling_path
from minimind.tokenizer.loading import COPY

# Types of weights in a safetensors file; others would be read as numbers that they are not
FLOATS = ("F64", "F32", "F16", "BF16")


def require_stage(path: str | Path) -> Path:
    """Return `path` if it is a stage directory with all files that loading needs.

    Raises:
        UserError: with the name of the file that is missing or cannot be read, in the directory or,
            for an adapter, in its base.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory. Expected a stage directory, the output of an earlier"
            " stage."
        )
    try:
        names = {file.name for file in path.iterdir()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error

    prefix = "adapter_" if "adapter_config.json" in names else ""
    weights = "adapter_model.safetensors" if prefix else "model.safetensors"
    needed = [f"{prefix}config.json", "tokenizer.json"]
    missing = [name for name in needed if name not in names]
    if weights not in names and f"{weights}.index.json" not in names:
        missing.append(weights)
    if missing:
        raise UserError(
            f"{path} is not a complete stage directory: {', '.join(missing)} not found. "
            "Expected the output of pretrain.py or of another stage."
        )

    count_tensors(path, weights)
    if prefix:
        base_of(path)  # refuses a circle
        base = adapter_base(path)
        if not base.is_dir():
            raise UserError(
                f"{path} is an adapter, and its base {base} is gone. Move the base back, or put its"
                f" new path into base_model_name_or_path in {path / 'adapter_config.json'}."
            )
        require_stage(base)
    return path


def count_tensors(path: Path, name: str) -> int:
    """The number of tensors in the safetensors file `name` of a directory, or in the shards that
    its index lists.

    Raises:
        UserError: one of these files cannot be read, or holds something else than weights.
    """
    files, count = [path / name], 0
    if not os.path.lexists(path / name):
        files = [path / shard for shard in shards_of(path, name)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, or not a regular one. {COPY}")
        try:
            with safe_open(file, "pt") as tensors:
                keys = tensors.keys()
                types = {key: tensors.get_slice(key).get_dtype() for key in keys}
        except Exception as error:  # of safetensors or the system
            raise UserError(
                f"{file}: not a safetensors file, or cut off ({error}). {COPY}"
            ) from error
        for key, kind in types.items():
            if kind not in FLOATS:
                raise UserError(
                    f"{file}: {key} is of type {kind}, expected weights as {', '.join(FLOATS)}."
                    f" {COPY}"
                )
        count += len(types)
    return count


def shards_of(path: Path, name: str) -> list[str]:
    """The names of the files that the index of `name` lists.

    Raises:
        UserError: the index cannot be read, lists nothing, or a file in another directory.
    """
    index = path / f"{name}.index.json"
    shards = read_json(index, COPY, fields={"weight_map": dict})["weight_map"].values()
    if not shards:
        raise UserError(f"{index}: found no shard, expected the names of files beside it. {COPY}")
    return sorted({sibling_path(index, shard).name for shard in shards})


# Adapters


def is_adapter(path: Path) -> bool:
    """Whether a directory claims to be an adapter."""
    return os.path.lexists(path / "adapter_config.json")


def adapter_base(path: Path) -> Path:
    """The stage directory that an adapter was trained on; a relative path is relative to the
    adapter."""
    fields = {"base_model_name_or_path": str | None, "peft_type": str}
    config = read_json(path / "adapter_config.json", COPY, fields=fields)
    return path / (config.get("base_model_name_or_path") or "?")


def base_of(path: Path) -> Path:
    """The directory of the full model under an adapter, whose base may be another adapter; any
    other directory itself.

    Raises:
        UserError: an adapter is its own base, directly or through others.
    """
    seen: set[Path] = set()
    while is_adapter(path):
        if path.resolve() in seen:
            raise UserError(
                f"{path} is an adapter whose base leads back to itself. Put the path of the model"
                " it was trained on into base_model_name_or_path in"
                f" {path / 'adapter_config.json'}."
            )
        seen.add(path.resolve())
        path = adapter_base(path)
    return path
