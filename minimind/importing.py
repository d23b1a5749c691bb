"""Checkpoints of other code -> a directory of ours: MiniMind 1 to 3, Llama, Qwen3 and Qwen3-MoE.

What MiniMind's generations compute (github.com/jingyaogong/minimind, its history up to August
2026):

    generation            names                   RoPE pairs   theta  eps   q/k norm  experts
    MiniMind-1            layers.N.attention.wq   (2i, 2i+1)   1e4    1e-5  no        routed + 1 shared
    MiniMind-2, to 4/2025 layers.N.attention.wq   (2i, 2i+1)   1e6    1e-5  no        routed + 1 shared
    MiniMind-2            ...self_attn.q_proj     (i, i+D/2)   1e6    1e-5  no        routed + a list of shared
    MiniMind-3            ...self_attn.q_proj     (i, i+D/2)   1e6    1e-6  yes       routed

Code that comes with a checkpoint is never run: configurations are read as JSON, pickles with
`weights_only=True`.
"""

import os
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.directories import new_directory
from minimind.common.errors import UserError, reason
from minimind.common.files import read_json, write_json
from minimind.stage_directory import GENERATION_FIELDS, shards_of, weights_hash
from minimind.tokenizer import tokenizer_hash
from minimind.tokenizer.loading import COPY, check_side_files, unreadable

Tensors = dict[str, torch.Tensor]


class Generation(NamedTuple):
    """A layout of tensors, and what its published models have that no tensor shows."""

    name: str
    interleaved: bool  # RoPE turns the pairs (2i, 2i+1) of a head, ours (i, i + head_dim / 2)
    assumed: dict[str, Any]


# The published models of all generations; only the values that differ follow.
COMMON = {
    "num_attention_heads": 8,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}
COMMON |= {"num_experts_per_tok": 2, "norm_topk_prob": True}
MINIMIND_1 = Generation(
    "MiniMind-1",
    True,
    {**COMMON, "num_attention_heads": 16, "rope_theta": 1e4, "max_position_embeddings": 512},
)
MINIMIND_2_OLD = Generation(
    "MiniMind-2 with the names before April 2025", True, {**COMMON, "max_position_embeddings": 8192}
)
MINIMIND_2 = Generation("MiniMind-2 or Llama", False, COMMON)
# One expert per token, and normalised: its weight is 1.
MINIMIND_3 = Generation(
    "MiniMind-3 or Qwen3", False, {**COMMON, "rms_norm_eps": 1e-6, "num_experts_per_tok": 1}
)

OLD_NAMES = (  # applied one after the other
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
)
# DistributedDataParallel's and torch.compile's
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# buffers, not weights
COMPUTED = re.compile(r"(?:^|\.)(?:pos_cis|freqs_cos|freqs_sin|mask|rotary_emb\.inv_freq)$")
VISION = re.compile(r"^(?:model\.)?vision_(?:encoder|proj)\.")

# MiniMind's names of fields that we have under the library's name.
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
MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "n_shared_experts",
)
MOE_FIELDS += ("router_aux_loss_coef", "seq_aux")
# Fields of MiniMind's configurations that do not change what the model computes, or that are read
# on their own.
SILENT_FIELDS = {
    "auto_map",
    "flash_attn",
    "max_seq_len",
    "multiple_of",
    "tokenizer_class",
    "use_cache",
    "use_moe",
}
SILENT_FIELDS |= {"inference_rope_scaling", "rope_parameters", "rope_scaling", "rope_theta"}
YARN = {
    "rope_type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
}
YARN |= {"attention_factor": 1.0}  # what MiniMind's code sets for inference_rope_scaling
# field: what we compute, and why nothing else can be expressed. A field that is absent has that
# value.
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
CONFIG_FIELDS = (
    set(MiniMindConfig.__dataclass_fields__)
    - set(PreTrainedConfig.__dataclass_fields__)
    - {"use_cache"}
)


@dataclass
class Report:
    """What an import found: `inferred` from shapes, `assumed` because nothing shows it, `notes` for
    the reader."""

    source: str
    layout: str
    inferred: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_checkpoint(
    source: str | Path,
    destination: str | Path,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    **options: Any,
) -> tuple[MiniMindForCausalLM, Report]:
    """Read a published checkpoint and write it to `destination` as a directory that every command
    reads.

    Args:
        source: a HuggingFace folder, or one file of weights (.pth, .pt, .bin, .safetensors).
        destination: the directory to write; it must not exist or be empty. It appears whole or not
        at all. config: a JSON with fields of the model, ours or theirs, instead of the source's
        config.json. tokenizer: a directory with tokenizer.json, instead of the source's. options:
        fields that win over all others (`num_attention_heads`, `rope_theta`); None is not given.

    The weights keep their dtype; MiniMind's interleaved RoPE is brought into ours by permuting the
    rows of q and k.

    Raises:
        UserError: something cannot be read, is not expressible, or tensors and configuration do not
        fit.
    """
    source, destination = Path(source), Path(destination)
    with new_directory(destination) as partial:
        model, loaded, report = read_checkpoint(source, config, tokenizer, options)
        write(model, loaded, report, partial, destination)
    return model, report


def read_checkpoint(
    source: Path, config: str | Path | None, tokenizer: str | Path | None, options: dict[str, Any]
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast | None, Report]:
    """Model and tokenizer of a published checkpoint; see `import_checkpoint`."""
    raw, origin = read_config(source, config)
    tensors, generation, notes = canonical(read_tensors(source), raw, source)
    report = Report(str(source), generation.name, notes=notes)
    model_config = resolve(tensors, generation, raw, origin, options, report)
    loaded = read_tokenizer(Path(tokenizer) if tokenizer else source, bool(tokenizer), notes)
    if loaded:
        take_special_ids(model_config, loaded, tokenizer or source)
    if generation.interleaved:
        halve_rotary_pairs(tensors, model_config.head_dim)
    model = load(tensors, model_config, source)
    read_generation_config(source, model, notes)
    return model, loaded, report


def resolve(
    tensors: Tensors,
    generation: Generation,
    raw: dict,
    origin: Path,
    options: dict[str, Any],
    report: Report,
) -> MiniMindConfig:
    """The configuration: options before the file's fields before shapes before what the
    generation's models have.

    Raises:
        UserError: a value that our model cannot express, or values that contradict each other.
    """
    library = raw.get("model_type") in LIBRARY
    try:
        given = translate_library(raw, origin) if library else translate_minimind(raw, origin)
        given = {
            name: value
            for name, value in given.items()
            if value is not None or name.endswith("_token_id")
        }
        given |= {name: value for name, value in options.items() if value is not None}
        assumed = {} if library else generation.assumed
        shown = infer(tensors, assumed | given)
        report.inferred = {name: value for name, value in shown.items() if name not in given}
        fields = report.inferred | given
        unused = set() if fields.get("num_experts") else set(MOE_FIELDS)
        report.assumed = {
            name: value for name, value in assumed.items() if name not in {*fields, *unused}
        }
        fields |= report.assumed
        theirs = not library and generation is not MINIMIND_3 and "qk_norm" not in raw
        if theirs and fields.get("num_experts_per_tok") == 1:
            # Their code normalised the weights of several experts only
            fields["norm_topk_prob"] = False
        theta = float(fields.pop("rope_theta", MiniMindConfig.default_theta))
        fields["rope_parameters"] = {
            "rope_type": "default",
            **fields.get("rope_parameters", {}),
            "rope_theta": theta,
        }
        return MiniMindConfig(**fields)
    except UserError:
        raise
    except Exception as error:  # types and shapes may be anything
        raise UserError(f"{origin}: {reason(error)}") from error


def read_config(source: Path, given: str | Path | None) -> tuple[dict, Path]:
    """The fields as they are in the file, and the file; nothing for a lone file of weights.

    Raises:
        UserError: nothing there, or a model we do not know.
    """
    if not source.exists():
        raise UserError(
            f"{source} does not exist. Expected a folder with config.json and weights, or a .pth"
            " file."
        )
    if not given and source.is_file():
        return {}, source
    file = Path(given) if given else source / "config.json"
    if not given and not os.path.lexists(file):
        raise UserError(
            f"{source} has no config.json. Expected a HuggingFace folder of a whole model (an"
            " adapter is merged where it was trained); for a state dict give the .pth file itself,"
            " or --config with the fields of the model."
        )
    raw = read_json(file, "Expected the fields of a model.", fields={"model_type": str | None})
    family = raw.get("model_type") or "minimind"
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type is {family!r}, expected one of {', '.join(FAMILIES)}.")
    return raw, file


def read_tensors(source: Path) -> Tensors:
    """All tensors of a file or of a folder's weights, shards included; raises UserError."""
    if source.is_file():
        return read_file(source)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if os.path.lexists(source / name):
            return read_file(source / name)
        if os.path.lexists(source / f"{name}.index.json"):
            shards = shards_of(source, name)
            return {
                name: tensor
                for shard in shards
                for name, tensor in read_file(source / shard).items()
            }
    raise UserError(
        f"{source} has no weights: expected model.safetensors or pytorch_model.bin, or their"
        " shards."
    )


def read_file(path: Path) -> Tensors:
    """The state dict in one file.

    A training checkpoint that holds it under "model" or "state_dict" is understood.

    Raises:
        UserError: the file is damaged, is no state dict, or a pickle with more than tensors in it.
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
        blocked = re.search(r"(?:unsupported |Unsupported global: )GLOBAL (\S+)", str(error))
        reason = (
            f"it needs the code {blocked[1]}, which is never run"
            if blocked
            else "it is damaged or of another kind"
        )
        raise UserError(
            f"{path} cannot be read as tensors: {reason}. Expected the file of"
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
            found = f"{name!r} is a {type(tensor).__name__}"
            raise UserError(f"{path} is no state dict: {found}, expected names and tensors.")
    return value


def canonical(tensors: Tensors, raw: dict, source: Path) -> tuple[Tensors, Generation, list[str]]:
    """Tensors by the names of our files, the generation they come from, and what was left out.

    The names are those that `save_pretrained` writes: one tensor per expert and projection, one
    shared expert.
    """
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    vision = [name for name in tensors if VISION.search(name)]
    notes = (
        [f"left out {len(vision)} tensors of the vision encoder and its projector"]
        if vision
        else []
    )
    tensors = {
        name: t
        for name, t in tensors.items()
        if not COMPUTED.search(name) and not VISION.search(name)
    }
    wrong = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    if wrong:
        raise UserError(
            f"{source}: {listed(wrong)} hold no floating-point numbers. Expected weights, not"
            " quantised."
        )
    if any(re.match(r"layers\.\d+\.attention\.wq\.", name) for name in tensors):
        key, hidden = tensors.get("layers.0.attention.wk.weight"), tensors.get("norm.weight")
        # MiniMind-1 knew no rope_theta; of the published ones it has 8 key/value heads for 16,
        # MiniMind-2 has 2 for 8.
        halved = key is not None and hidden is not None and 2 * len(key) == len(hidden)
        first = "rope_theta" not in raw if "dim" in raw else halved
        return (
            {renamed(name): tensor for name, tensor in tensors.items()},
            MINIMIND_1 if first else MINIMIND_2_OLD,
            notes,
        )
    if not any(re.match(r"model\.layers\.\d+\.self_attn\.q_proj\.", name) for name in tensors):
        raise UserError(
            f"{source}: no layout that is known. Expected model.layers.N.self_attn.q_proj"
            " (MiniMind-2, MiniMind-3, Llama, Qwen3) or layers.N.attention.wq (earlier MiniMinds)"
            f" among the tensors, found {listed(sorted(tensors))}."
        )
    normed = any(name.endswith("q_norm.weight") for name in tensors)
    return split_experts(join_shared_experts(tensors)), MINIMIND_3 if normed else MINIMIND_2, notes


def renamed(name: str) -> str:
    """Our name of a tensor of an early MiniMind; what is not known comes out as it may, and is
    unexpected later."""
    for pattern, replacement in OLD_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def join_shared_experts(tensors: Tensors) -> Tensors:
    """A list of n shared experts, each of width I, is one SwiGLU of width n * I: its output is
    their sum."""
    joined, lists = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(
            r"(.*\.mlp\.shared_experts)\.(\d+)\.((?:gate|up|down)_proj\.weight)", name
        )
        if found:
            lists.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        else:
            joined[name] = tensor
    for name, parts in lists.items():
        joined[name] = torch.cat([parts[i] for i in sorted(parts)], dim=int("down_proj" in name))
    return joined


def split_experts(tensors: Tensors) -> Tensors:
    """The library's stacked experts, gate_up_proj (experts, 2I, E) and down_proj (experts, E, I),
    one by one."""
    split = {}
    for name, tensor in tensors.items():
        if name.endswith(".mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for index, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                split |= {
                    f"{prefix}{index}.gate_proj.weight": gate,
                    f"{prefix}{index}.up_proj.weight": up,
                }
        elif name.endswith(".mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            split |= {
                f"{prefix}{index}.down_proj.weight": expert for index, expert in enumerate(tensor)
            }
        else:
            split[name] = tensor
    return split


def translate_library(raw: dict, origin: Path) -> dict[str, Any]:
    """Llama, Qwen3 and Qwen3-MoE: the library's class fills in what the file leaves out."""
    config = LIBRARY[raw["model_type"]].from_dict(
        {name: raw[name] for name in raw if name != "auto_map"}
    )
    values = {**config.to_dict(), "num_experts": getattr(config, "num_experts", 0)}
    require_expressible(values, origin)
    rope = {
        name: value
        for name, value in config.rope_parameters.items()
        if name != "type" and value is not None
    }
    return {
        **{name: values[name] for name in CONFIG_FIELDS & set(values)},
        "head_dim": values.get("head_dim"),
        "qk_norm": raw["model_type"] != "llama",
        "rope_theta": rope.pop("rope_theta", None),
        "rope_parameters": rope,
    }


def translate_minimind(raw: dict, origin: Path) -> dict[str, Any]:
    """MiniMind's configurations of all generations, and ours."""
    require_expressible(raw, origin)
    base = PreTrainedConfig()
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if OLD_FIELDS.get(name, name) in CONFIG_FIELDS:
            fields[OLD_FIELDS.get(name, name)] = value
        elif not (
            value is None
            or name in {*SILENT_FIELDS, *ONLY}
            or name.startswith(("_", "image_"))
            or hasattr(base, name)
        ):
            raise UserError(
                f"{origin}: {name} is {value!r}, a field that no published MiniMind has. Remove it"
                " if it does not change what the model computes."
            )
    if "dropout" in raw:
        fields["attention_dropout"] = raw["dropout"]
    if "max_seq_len" in raw:
        fields.setdefault("max_position_embeddings", raw["max_seq_len"])
    # The first generations built one for every value but None
    if isinstance(fields.get("n_shared_experts"), bool):
        del fields["n_shared_experts"]
    layers, chosen = fields.get("num_hidden_layers"), fields.get("num_experts_per_tok")
    if "use_moe" in raw and not raw["use_moe"]:
        fields = {name: value for name, value in fields.items() if name not in MOE_FIELDS}
    elif "use_moe" in raw and layers and chosen and fields.get("router_aux_loss_coef"):
        # Theirs is the sum over layers, ours the mean; before MiniMind-3 it was also divided by the
        # experts chosen.
        fields["router_aux_loss_coef"] *= layers / (chosen if "n_routed_experts" in raw else 1)
    rope = raw.get("rope_parameters") or {}
    fields["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta")
    fields["rope_parameters"] = minimind_rope(raw, rope, fields, origin)
    return fields


def minimind_rope(raw: dict, rope: dict, fields: dict, origin: Path) -> dict:
    """The scaling of RoPE without its theta. MiniMind's code scales only where
    `inference_rope_scaling` is true."""
    if raw.get("inference_rope_scaling"):
        rope = raw.get("rope_scaling") or rope or YARN
        if "attention_factor" not in rope:
            raise UserError(
                f"{origin}: rope_scaling is {rope}, the scaling that MiniMind had in autumn 2025."
                " It is not YaRN and cannot be expressed. Weights are trained without it: set"
                " inference_rope_scaling to false."
            )
        if fields.get("max_position_embeddings", 32768) <= rope.get(
            "original_max_position_embeddings", 2048
        ):
            rope = {}
    rope = {"rope_type": rope["type"], **rope} if "type" in rope else rope
    return {
        key: value
        for key, value in rope.items()
        if key not in ("type", "rope_theta") and value is not None
    }


def require_expressible(values: dict, origin: Path) -> None:
    """Raises UserError for the first field whose value our model cannot express."""
    layers = set(values.get("layer_types") or []) - {"full_attention"}
    if layers:
        raise UserError(
            f"{origin}: layer_types has {listed(sorted(layers))}; attention sees the whole sequence"
            " here."
        )
    if values.get("hidden_act", "silu") not in ACT2FN:
        raise UserError(
            f"{origin}: hidden_act is {values['hidden_act']!r}, an activation that transformers has"
            " not."
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
    """What the shapes tell about a model; `known` is asked for the number of heads where no norm
    tells the width."""

    def shape(name: str, layer: int | None = 0) -> torch.Size | None:
        name = name if layer is None else f"model.layers.{layer}.{name}"
        return tensors[name].shape if name in tensors else None

    shown: dict[str, Any] = {}
    if embedding := shape("model.embed_tokens.weight", None):
        shown |= {"vocab_size": embedding[0], "hidden_size": embedding[-1]}
    indices = [
        int(found[1]) for name in tensors if (found := re.match(r"model\.layers\.(\d+)\.", name))
    ]
    shown["num_hidden_layers"] = max(indices, default=-1) + 1
    query, key = shape("self_attn.q_proj.weight"), shape("self_attn.k_proj.weight")
    norm = shape("self_attn.q_norm.weight")
    shown["qk_norm"] = norm is not None
    shown["attention_bias"] = shape("self_attn.q_proj.bias") is not None
    if query:
        heads = known.get("num_attention_heads")
        width = norm[0] if norm else known.get("head_dim") or (query[0] // heads if heads else None)
        if width and not query[0] % width:
            shown["head_dim"] = width
            if norm or known.get("head_dim"):
                shown["num_attention_heads"] = query[0] // width
            if key and not key[0] % width:
                shown["num_key_value_heads"] = key[0] // width
    if dense := shape("mlp.gate_proj.weight"):
        shown["intermediate_size"] = dense[0]
    if router := shape("mlp.gate.weight"):
        shown["num_experts"] = router[0]
    if expert := shape("mlp.experts.0.gate_proj.weight"):
        shown |= {"intermediate_size": expert[0], "moe_intermediate_size": expert[0]}
        shared = shape("mlp.shared_experts.gate_proj.weight")
        shown["n_shared_experts"] = -(-shared[0] // expert[0]) if shared else 0
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    shown["tie_word_embeddings"] = head is None or (
        embedding is not None and torch.equal(head, embedding)
    )
    return shown


def halve_rotary_pairs(tensors: Tensors, head_dim: int) -> None:
    """Reorder the rows of q and k within each head: (0, 1, 2, 3, ...) -> (0, 2, ..., 1, 3, ...).

    RoPE over the pairs (2i, 2i+1) then is RoPE over (i, i + head_dim / 2), and no product of q and
    k changes.
    """
    for name, tensor in tensors.items():
        if re.search(r"\.self_attn\.[qk]_proj\.weight$", name) and not len(tensor) % head_dim:
            heads = tensor.view(-1, head_dim // 2, 2, tensor.shape[-1])
            tensors[name] = heads.transpose(1, 2).reshape(tensor.shape)


def load(tensors: Tensors, config: MiniMindConfig, source: Path) -> MiniMindForCausalLM:
    """A model with these tensors, in their dtype; raises UserError with every name and shape that
    does not fit."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None:
        if embedding is not None and not torch.equal(head, embedding):
            raise UserError(
                f"{source}: tie_word_embeddings is true, and lm_head.weight is not"
                ' model.embed_tokens.weight. Give a --config with "tie_word_embeddings": false.'
            )
        del tensors["lm_head.weight"]
    expected = expected_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    differing = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in sorted(set(found) & set(expected))
        if found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    problems = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"{source}: the tensors do not fit the configuration. {'; '.join(problems)}."
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return MiniMindForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def expected_shapes(config: MiniMindConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a file of a model with this configuration holds, by name."""
    with torch.device("meta"):
        tensors = MiniMindForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in split_experts(tensors).items()}


def listed(names: list[str], limit: int = 6) -> str:
    """Names, or the first of them and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_tokenizer(path: Path, required: bool, notes: list[str]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a directory; notes what it lacks.

    Raises:
        UserError: it cannot be read, or is `required` and not there.
    """
    if not os.path.lexists(path / "tokenizer.json"):
        if required:
            raise UserError(f"--tokenizer {path} holds no tokenizer: tokenizer.json was not found.")
        notes.append(
            "no tokenizer: tokenizer.json was not found. Give the model's own with --tokenizer DIR"
        )
        return None
    check_side_files(path)
    try:
        # The class is named: no code of the folder is asked
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:
        raise unreadable(path, error) from error
    if tokenizer.pad_token is None and tokenizer.unk_token not in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token  # MiniMind-1 padded with it, and named no padding
        notes.append(f"the tokenizer named no padding token: it is {tokenizer.pad_token!r} now")
    return tokenizer


def take_special_ids(
    config: MiniMindConfig, tokenizer: PreTrainedTokenizerFast, origin: str | Path
) -> None:
    """Padding, beginning and end are the tokenizer's; raises UserError where it has more tokens
    than the model."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has {len(tokenizer):,} tokens, the model"
            f" {config.vocab_size:,}. They do not belong together; give the model's own with"
            " --tokenizer."
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        before, now = getattr(config, name), getattr(tokenizer, name)
        # Qwen3 names several ends
        if now is not None and not (isinstance(before, list) and now in before):
            setattr(config, name, now)


def read_generation_config(source: Path, model: MiniMindForCausalLM, notes: list[str]) -> None:
    """Give the model the folder's generation settings; those that the library refuses to save are
    left out."""
    if not os.path.lexists(source / "generation_config.json"):
        return
    raw = read_json(
        source / "generation_config.json", f"{COPY} Or delete it.", fields=GENERATION_FIELDS
    )
    try:
        settings = GenerationConfig.from_dict(raw)
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        notes.append(
            "left out generation_config.json, which contradicts itself:"
            f" {str(error).splitlines()[0]}"
        )
    else:
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(settings, name) is None:
                setattr(settings, name, getattr(model.config, name))
        model.generation_config = settings


def write(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast | None,
    report: Report,
    partial: Path,
    destination: Path,
) -> None:
    """Write the files of a stage directory, which will be `destination`, `stage.json` included."""
    model.save_pretrained(partial)
    if tokenizer:
        tokenizer.save_pretrained(partial)
    record = {
        "stage": "import",
        "parent": None,
        "pipeline": destination.absolute().name,
        "weights": weights_hash(partial),
        **({"tokenizer": tokenizer_hash(tokenizer)} if tokenizer else {}),
        **asdict(report),
        "command": " ".join(sys.argv),
    }
    write_json(partial / "stage.json", record)
