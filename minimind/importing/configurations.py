"""The configuration of a checkpoint as a MiniMindConfig.

It comes, in this order, from options, from the file's fields, from the shapes of the tensors, and
from what the published models of a generation have.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.activations import ACT2FN

from minimind import MiniMindConfig
from minimind.common.errors import UserError, reason
from minimind.common.files import read_json
from minimind.importing.layouts import MINIMIND_3, Generation, Tensors, listed

# MiniMind's name of a field -> the library's
OLD_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "n_routed_experts": "num_experts",
    "aux_loss_alpha": "router_aux_loss_coef",
    "dropout": "hidden_dropout",
}
MOE_FIELDS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
MOE_FIELDS |= {"n_shared_experts", "router_aux_loss_coef", "seq_aux"}
# Fields of MiniMind's configurations that do not change what the model computes, or have their own
# code below
SILENT_FIELDS = {"auto_map", "flash_attn", "max_seq_len", "multiple_of", "tokenizer_class"}
SILENT_FIELDS |= {"use_cache", "use_moe", "inference_rope_scaling", "rope_parameters"}
SILENT_FIELDS |= {"rope_scaling", "rope_theta"}
# What MiniMind's code sets for inference_rope_scaling
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048}
YARN |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}
# field: the only value that our model can express, which is also that of an absent field, and why
ONLY = {
    "mlp_bias": (False, "the feed-forward layers have no biases"),
    "use_sliding_window": (False, "attention sees the whole sequence"),
    "sliding_window": (None, "attention sees the whole sequence"),
    "decoder_sparse_step": (1, "every layer is a mixture of experts, or none is"),
    "mlp_only_layers": ([], "every layer is a mixture of experts, or none is"),
    "scoring_func": ("softmax", "the router takes the softmax of its logits"),
    "routed_scaling_factor": (1.0, "the experts' weights are not scaled"),
    "n_group": (1, "the router chooses among all experts"),
    "topk_group": (1, "the router chooses among all experts"),
    "partial_rotary_factor": (1.0, "RoPE turns all dimensions of a head"),
    "quantization_config": (None, "weights are not quantised"),
}
LIBRARY = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
FAMILIES = ("minimind", "minimind-v", *LIBRARY)
CONFIG_FIELDS = set(MiniMindConfig.__dataclass_fields__) - {"use_cache"}
CONFIG_FIELDS -= set(PreTrainedConfig.__dataclass_fields__)


def read_config(source: Path, config: str | Path | None) -> tuple[dict, Path]:
    """The fields as they are in the file, and the file; no fields for a single file of weights.

    Raises:
        UserError: there is no checkpoint, or it is of an unknown model.
    """
    if not source.exists():
        raise UserError(
            f"{source} does not exist. Expected a folder with config.json and weights, or a .pth"
            " file."
        )
    if not config and source.is_file():
        return {}, source
    file = Path(config or source / "config.json")
    if not config and not os.path.lexists(file):
        raise UserError(
            f"{source} has no config.json. Expected a HuggingFace folder of a complete model"
            " (merge an adapter where it was trained); for a state dict give the .pth file itself,"
            " or --config with the fields of the model."
        )
    raw = read_json(file, "Expected the fields of a model.", fields={"model_type": str | None})
    family = raw.get("model_type") or "minimind"
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}.")
    return raw, file


def resolve(
    tensors: Tensors, generation: Generation, raw: dict, origin: Path, options: dict[str, Any]
) -> tuple[MiniMindConfig, dict[str, Any], dict[str, Any]]:
    """The configuration, and those of its fields that were inferred and that were assumed.

    Raises:
        UserError: a value that our model cannot express, or values that contradict each other.
    """
    library = raw.get("model_type") in LIBRARY
    try:
        # Options and the file's fields, then shapes, then the generation's values
        explicit = translate_library(raw, origin) if library else translate_minimind(raw, origin)
        explicit = {
            name: value
            for name, value in explicit.items()
            if value is not None or name.endswith("_token_id")
        }
        explicit |= {name: value for name, value in options.items() if value is not None}
        usual = {} if library else generation.assumed
        inferred = infer(tensors, usual | explicit)
        inferred = {name: value for name, value in inferred.items() if name not in explicit}
        fields = inferred | explicit
        unused = set() if fields.get("num_experts") else MOE_FIELDS
        assumed = {name: value for name, value in usual.items() if name not in {*fields, *unused}}
        fields |= assumed

        earlier = not library and generation is not MINIMIND_3 and "qk_norm" not in raw
        if earlier and fields.get("num_experts_per_tok") == 1:
            # Their code normalised the weights of several experts only
            fields["norm_topk_prob"] = False
        theta = float(fields.pop("rope_theta", MiniMindConfig.default_theta))
        rope = {"rope_type": "default", **fields.get("rope_parameters", {}), "rope_theta": theta}
        return MiniMindConfig(**fields | {"rope_parameters": rope}), inferred, assumed
    except UserError:
        raise
    except Exception as error:  # types and shapes may be anything
        raise UserError(f"{origin}: {reason(error)}") from error


def translate_library(raw: dict, origin: Path) -> dict[str, Any]:
    """Fields of Llama, Qwen3 and Qwen3-MoE; the library's class fills in what the file leaves
    out."""
    fields = {name: value for name, value in raw.items() if name != "auto_map"}
    config = LIBRARY[raw["model_type"]].from_dict(fields)
    values = {**config.to_dict(), "num_experts": getattr(config, "num_experts", 0)}
    require_expressible(values, origin)
    return {
        **{name: values[name] for name in CONFIG_FIELDS & set(values)},
        "head_dim": values.get("head_dim"),
        "qk_norm": raw["model_type"] != "llama",
        "rope_theta": config.rope_parameters.get("rope_theta"),
        "rope_parameters": scaling(config.rope_parameters),
    }


def translate_minimind(raw: dict, origin: Path) -> dict[str, Any]:
    """Fields of MiniMind's configurations of all generations, and of ours."""
    require_expressible(raw, origin)
    base = PreTrainedConfig()
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        ours = OLD_FIELDS.get(name, name)
        ignored = value is None or name in {*SILENT_FIELDS, *ONLY} or hasattr(base, name)
        if ours in CONFIG_FIELDS:
            fields[ours] = value
        elif not ignored and not name.startswith(("_", "image_")):
            raise UserError(
                f"{origin}: {name} is {value!r}, a field that no published MiniMind has. Remove it"
                " if it does not change what the model computes."
            )
    if "dropout" in raw:
        fields["attention_dropout"] = raw["dropout"]
    if "max_seq_len" in raw:
        fields.setdefault("max_position_embeddings", raw["max_seq_len"])

    # The first generations built one shared expert for every value but None
    if isinstance(fields.get("n_shared_experts"), bool):
        del fields["n_shared_experts"]
    layers, chosen = fields.get("num_hidden_layers"), fields.get("num_experts_per_tok")
    if "use_moe" in raw and not raw["use_moe"]:
        fields = {name: value for name, value in fields.items() if name not in MOE_FIELDS}
    elif "use_moe" in raw and layers and chosen and fields.get("router_aux_loss_coef"):
        # Their loss is the sum over layers, ours the mean; before MiniMind-3 theirs was also
        # divided by the number of chosen experts.
        fields["router_aux_loss_coef"] *= layers / (chosen if "n_routed_experts" in raw else 1)

    rope = raw.get("rope_parameters") or {}
    fields["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta")
    fields["rope_parameters"] = minimind_scaling(raw, rope, fields, origin)
    return fields


def minimind_scaling(raw: dict, rope: dict, fields: dict, origin: Path) -> dict:
    """The scaling of RoPE without its theta. MiniMind's code scales only if
    `inference_rope_scaling` is true, and only beyond the original length."""
    if raw.get("inference_rope_scaling"):
        rope = raw.get("rope_scaling") or rope or YARN
        if "attention_factor" not in rope:
            raise UserError(
                f"{origin}: rope_scaling is {rope}, the scaling that MiniMind had in autumn 2025."
                " It is not YaRN and cannot be expressed. Weights are trained without it: set"
                " inference_rope_scaling to false."
            )
        original = rope.get("original_max_position_embeddings", 2048)
        if fields.get("max_position_embeddings", 32768) <= original:
            rope = {}
    return scaling({"rope_type": rope["type"], **rope} if "type" in rope else rope)


def scaling(rope: dict) -> dict:
    """The parameters of RoPE without its theta, older names and missing values."""
    dropped = ("type", "rope_theta")
    return {
        name: value for name, value in rope.items() if name not in dropped and value is not None
    }


def require_expressible(values: dict, origin: Path) -> None:
    """Raises UserError for the first field whose value our model cannot express."""
    if layers := set(values.get("layer_types") or []) - {"full_attention"}:
        raise UserError(
            f"{origin}: layer_types has {listed(layers)}; attention sees the whole sequence here."
        )
    if (activation := values.get("hidden_act", "silu")) not in ACT2FN:
        raise UserError(
            f"{origin}: hidden_act is {activation!r}, an activation that transformers does not"
            " have."
        )
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    for name, (only, why) in ONLY.items():
        value = values.get(name, rope.get(name))
        if value is not None and value != only:
            raise UserError(
                f"{origin}: {name} is {value!r}, which cannot be imported: {why} (expected"
                f" {only!r})."
            )


def infer(tensors: Tensors, known: dict[str, Any]) -> dict[str, Any]:
    """The fields that follow from the shapes.

    Where no norm shows the width of a head, it follows from `known`: the fields that the file gives
    or that are usual.
    """

    def shape(name: str) -> torch.Size | None:
        tensor = tensors.get(f"model.layers.0.{name}")
        return None if tensor is None else tensor.shape

    fields: dict[str, Any] = {}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if embedding is not None and embedding.ndim:
        fields |= {"vocab_size": embedding.shape[0], "hidden_size": embedding.shape[-1]}
    matches = (re.match(r"model\.layers\.(\d+)\.", name) for name in tensors)
    fields["num_hidden_layers"] = 1 + max((int(match[1]) for match in matches if match), default=-1)

    query, key = shape("self_attn.q_proj.weight"), shape("self_attn.k_proj.weight")
    norm = shape("self_attn.q_norm.weight")
    fields["qk_norm"] = norm is not None
    fields["attention_bias"] = shape("self_attn.q_proj.bias") is not None
    if query:
        heads = known.get("num_attention_heads")
        width = norm[0] if norm else known.get("head_dim") or (query[0] // heads if heads else None)
        if width and not query[0] % width:
            fields["head_dim"] = width
            if norm or known.get("head_dim"):
                fields["num_attention_heads"] = query[0] // width
            if key and not key[0] % width:
                fields["num_key_value_heads"] = key[0] // width

    if dense := shape("mlp.gate_proj.weight"):
        fields["intermediate_size"] = dense[0]
    if router := shape("mlp.gate.weight"):
        fields["num_experts"] = router[0]
    if expert := shape("mlp.experts.0.gate_proj.weight"):
        fields |= {"intermediate_size": expert[0], "moe_intermediate_size": expert[0]}
        shared = shape("mlp.shared_experts.gate_proj.weight")
        fields["n_shared_experts"] = -(-shared[0] // expert[0]) if shared else 0
    tied = head is None or (embedding is not None and torch.equal(head, embedding))
    fields["tie_word_embeddings"] = tied
    return fields
