"""The published layouts of tensors, and their translation into the names of our files.

What MiniMind's generations compute (github.com/jingyaogong/minimind, its history up to August
2026):

    generation      names                   RoPE pairs   theta  eps   q/k norm  experts
    MiniMind-1      layers.N.attention.wq   (2i, 2i+1)   1e4    1e-5  no        routed + 1 shared
    MiniMind-2 old  layers.N.attention.wq   (2i, 2i+1)   1e6    1e-5  no        routed + 1 shared
    MiniMind-2      ...self_attn.q_proj     (i, i+D/2)   1e6    1e-5  no        routed + n shared
    MiniMind-3      ...self_attn.q_proj     (i, i+D/2)   1e6    1e-6  yes       routed
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minimind.common.errors import UserError

Tensors = dict[str, torch.Tensor]


class Generation(NamedTuple):
    """A layout of tensors, and the values of its published models that no tensor shows."""

    name: str
    interleaved: bool  # RoPE rotates the pairs (2i, 2i+1) of a head, ours (i, i + head_dim / 2)
    assumed: dict[str, Any]


# What most published models have; the generations list the differences
COMMON = {"num_attention_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
COMMON |= {"max_position_embeddings": 32768, "num_experts_per_tok": 2, "norm_topk_prob": True}
SMALL = {"num_attention_heads": 16, "rope_theta": 1e4, "max_position_embeddings": 512}
MINIMIND_1 = Generation("MiniMind-1", True, COMMON | SMALL)
MINIMIND_2_OLD = Generation(
    "MiniMind-2 with the names before April 2025", True, COMMON | {"max_position_embeddings": 8192}
)
MINIMIND_2 = Generation("MiniMind-2 or Llama", False, COMMON)
# One expert per token, and normalised: its weight is 1.
MINIMIND_3 = Generation(
    "MiniMind-3 or Qwen3", False, COMMON | {"rms_norm_eps": 1e-6, "num_experts_per_tok": 1}
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
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel, torch.compile
BUFFERS = re.compile(r"(?:^|\.)(?:pos_cis|freqs_cos|freqs_sin|mask|rotary_emb\.inv_freq)$")
VISION = re.compile(r"^(?:model\.)?vision_(?:encoder|proj)\.")
SHARED_EXPERT = re.compile(r"(.*\.mlp\.shared_experts)\.(\d+)\.((?:gate|up|down)_proj\.weight)")


def canonical(tensors: Tensors, raw: dict, source: Path) -> tuple[Tensors, Generation, list[str]]:
    """Tensors under the names of our files, their generation, and notes on what was left out.

    Our names are those that `save_pretrained` writes: one tensor per expert and projection, one
    shared expert. `raw` is the checkpoint's configuration.

    Raises:
        UserError: the layout is unknown, or the tensors are not floating-point numbers.
    """
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    notes = []
    if vision := sum(bool(VISION.search(name)) for name in tensors):
        notes.append(f"left out {vision} tensors of the vision encoder and its projector")
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not BUFFERS.search(name) and not VISION.search(name)
    }
    if wrong := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise UserError(
            f"{source}: {listed(wrong)} hold no floating-point numbers. Expected weights, not"
            " quantised."
        )

    if any(re.match(r"layers\.\d+\.attention\.wq\.", name) for name in tensors):
        generation = MINIMIND_1 if is_minimind_1(tensors, raw) else MINIMIND_2_OLD
        return {renamed(name): tensor for name, tensor in tensors.items()}, generation, notes
    if not any(re.match(r"model\.layers\.\d+\.self_attn\.q_proj\.", name) for name in tensors):
        raise UserError(
            f"{source}: unknown layout. Expected model.layers.N.self_attn.q_proj"
            " (MiniMind-2, MiniMind-3, Llama, Qwen3) or layers.N.attention.wq (earlier MiniMinds)"
            f" among the tensors, found {listed(tensors)}."
        )
    qk_norm = any(name.endswith("q_norm.weight") for name in tensors)
    generation = MINIMIND_3 if qk_norm else MINIMIND_2
    return split_experts(join_shared_experts(tensors)), generation, notes


def is_minimind_1(tensors: Tensors, raw: dict) -> bool:
    """Whether a model with the old names is a MiniMind-1: its configuration had no rope_theta yet;
    without one, its published models have 8 key/value heads for 16, MiniMind-2's have 2 for 8."""
    if "dim" in raw:
        return "rope_theta" not in raw
    key, hidden = tensors.get("layers.0.attention.wk.weight"), tensors.get("norm.weight")
    return key is not None and hidden is not None and 2 * len(key) == len(hidden)


def renamed(name: str) -> str:
    """Our name of a tensor of an early MiniMind; an unknown one is reported as unexpected later."""
    for pattern, replacement in OLD_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def join_shared_experts(tensors: Tensors) -> Tensors:
    """Join n shared experts of width I into one SwiGLU of width n * I, whose output is their
    sum."""
    joined, lists = {}, defaultdict(dict)
    for name, tensor in tensors.items():
        if match := SHARED_EXPERT.fullmatch(name):
            lists[f"{match[1]}.{match[3]}"][int(match[2])] = tensor
        else:
            joined[name] = tensor
    for name, parts in lists.items():
        joined[name] = torch.cat([parts[i] for i in sorted(parts)], dim=int("down_proj" in name))
    return joined


def split_experts(tensors: Tensors) -> Tensors:
    """Split the library's stacked experts, gate_up_proj (experts, 2I, E) and down_proj (experts, E,
    I), into one tensor per expert and projection."""
    split = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".mlp.experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            split[name] = tensor
            continue
        for index, expert in enumerate(tensor):
            parts = {"down": expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate", "up"), expert.chunk(2), strict=True))
            for part, weight in parts.items():
                split[f"{prefix}.mlp.experts.{index}.{part}_proj.weight"] = weight
    return split


def halve_rotary_pairs(tensors: Tensors, head_dim: int) -> None:
    """Reorder the rows of q and k within each head: (0, 1, 2, 3, ...) -> (0, 2, ..., 1, 3, ...).

    RoPE over the pairs (2i, 2i+1) then is RoPE over (i, i + head_dim / 2), and no product of q and
    k changes.
    """
    for name, tensor in tensors.items():
        if re.search(r"\.self_attn\.[qk]_proj\.weight$", name) and not len(tensor) % head_dim:
            heads = tensor.view(-1, head_dim // 2, 2, tensor.shape[-1])
            tensors[name] = heads.transpose(1, 2).reshape(tensor.shape)


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Names in order, or the first of them and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
