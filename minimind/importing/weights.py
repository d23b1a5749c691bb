"""Read the tensors of a checkpoint, and build our model with them."""

import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.importing.layouts import Tensors, listed, split_experts
from minimind.stage_directory import shards_of


def read_tensors(source: Path) -> Tensors:
    """All tensors of a file, or of the weights in a folder, shards included; raises UserError."""
    if source.is_file():
        return read_file(source)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.lexists(source / name):
            return read_file(source / name)
        if os.path.lexists(source / f"{name}.index.json"):
            tensors = {}
            for shard in shards_of(source, name):
                tensors |= read_file(source / shard)
            return tensors
    raise UserError(
        f"{source} has no weights: expected model.safetensors or pytorch_model.bin, or their"
        " shards."
    )


def read_file(path: Path) -> Tensors:
    """The state dict in one file, also under "model" or "state_dict" in a training checkpoint.

    Raises:
        UserError: the file is damaged, not a state dict, or a pickle with more than tensors in it.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, or not a regular one. Expected weights, or a shard named in the"
            " index."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # of the pickle's protocol
            value = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"(?:unsupported |Unsupported global: )GLOBAL (\S+)", str(error))
        problem = "it is damaged or of another kind"
        if code:
            problem = f"it needs the code {code[1]}, which is never run"
        raise UserError(
            f"{path} cannot be read as tensors: {problem}. Expected the file of"
            " torch.save(model.state_dict(), ...)."
        ) from error

    for key in ("model", "state_dict"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value:
        raise UserError(
            f"{path} holds a {type(value).__name__}, expected a state dict: names and tensors."
        )
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            entry = f"{name!r} is a {type(tensor).__name__}"
            raise UserError(f"{path} is no state dict: {entry}, expected names and tensors.")
    return value


def build_model(tensors: Tensors, config: MiniMindConfig, source: Path) -> MiniMindForCausalLM:
    """A model with these tensors, in their dtype.

    Raises:
        UserError: with each name and shape that does not fit.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None:
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError(
                f"{source}: tie_word_embeddings is true, and lm_head.weight is not"
                ' model.embed_tokens.weight. Give a --config with "tie_word_embeddings": false.'
            )
        del tensors["lm_head.weight"]

    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = expected_shapes(config)
    kinds = {
        "missing": expected.keys() - actual.keys(),
        "unexpected": actual.keys() - expected.keys(),
        "of another shape": [
            f"{name} {actual[name]} instead of {expected[name]}"
            for name in actual.keys() & expected.keys()
            if actual[name] != expected[name]
        ],
    }
    problems = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"{source}: the tensors do not fit the configuration. {'; '.join(problems)}."
        )

    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return MiniMindForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def expected_shapes(config: MiniMindConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a file of a model with this configuration."""
    with torch.device("meta"):
        tensors = MiniMindForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in split_experts(tensors).items()}
