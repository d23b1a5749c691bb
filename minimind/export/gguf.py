"""GGUF, the format of llama.cpp and ollama: weights, config, tokenizer and template in one file.

Matrices have the requested data type; norms, biases and routers are fp32, as in files of
llama.cpp's own converter.
"""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import UserError, install
from minimind.tokenizer.encoding import BEYOND_BYTES_AND_MERGES
from minimind.tokenizer.splitting import PRE_TOKENIZERS, splitting_name

ARCHITECTURES = {"qwen3": "qwen3", "qwen3-moe": "qwen3moe", "llama": "llama"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
Q8_BLOCK = 32  # weights that share a scale


def require_gguf(format: str) -> None:
    """Raises UserError if the `gguf` package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"--format {format} needs the package gguf, which is not installed: {install('gguf')}"
        )


def pre_tokenizer_name(tokenizer: PreTrainedTokenizerFast) -> str:
    """llama.cpp's name of a tokenizer's splitting rule.

    Raises:
        UserError: the rule has no name, or a GGUF file cannot express the tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = state["model"]
    adds_tokens = tokenizer.encode("a") != tokenizer.encode("a", add_special_tokens=False)
    features = {option: bpe.get(option) for option in BEYOND_BYTES_AND_MERGES} | {
        f"a model of type {bpe['type']}": bpe["type"] != "BPE",
        "no merges": not bpe.get("merges"),
        "a normalizer": state["normalizer"],
        "tokens added to every text": adds_tokens,
    }
    if beyond := [feature for feature, present in features.items() if present]:
        raise UserError(f"a GGUF file cannot express this tokenizer: it has {', '.join(beyond)}.")
    if name := splitting_name(tokenizer.backend_tokenizer):
        return name
    raise UserError(
        "a GGUF file cannot say how this tokenizer splits text: known are the splitting rules of"
        f" 'minimind tokenizer train' ({', '.join(PRE_TOKENIZERS)}). Use one of the other formats,"
        " or a tokenizer of that command."
    )


def to_ggml(name: str, tensor: torch.Tensor, dtype: str):
    """The ggml type of a tensor, and its values in that type; `name` is the library's."""
    from gguf import GGMLQuantizationType, quantize

    exact = tensor.ndim == 1 or name.endswith("mlp.gate.weight")
    kind = GGMLQuantizationType["F32" if exact else TYPES[dtype]]
    if kind.name == "Q8_0" and tensor.shape[-1] % Q8_BLOCK:
        raise UserError(
            f"q8_0 needs rows of a multiple of {Q8_BLOCK} weights, and those of {name} have"
            f" {tensor.shape[-1]}. Use --dtype float16 or bfloat16."
        )
    return kind, quantize(numpy.ascontiguousarray(tensor.float().numpy()), kind)


def rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor as it is read back from a file, in fp32."""
    from gguf import dequantize

    kind, values = to_ggml(name, tensor, dtype)
    return torch.from_numpy(dequantize(values, kind)).reshape(tensor.shape)


def named_tensors(model: PreTrainedModel, layout: str) -> dict[str, tuple[str, torch.Tensor]]:
    """A stock model's tensors under their GGUF names, each with the library's name.

    For Llama, llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... and the library rotates the
    halves of a head, so the rows of q and k are interleaved.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    table = get_tensor_name_map(MODEL_ARCH[ARCHITECTURES[layout].upper()], config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        parts = {name: tensor}
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            prefix = name.removesuffix("gate_up_proj")
            parts = {f"{prefix}gate_proj": gate, f"{prefix}up_proj": up}
        elif layout == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            parts = {name: tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)}
        for part, values in parts.items():
            module, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", part).groups()
            tensors[table.get_name(module) + (suffix or ".weight")] = (name, values)
    return tensors


def write_gguf(
    model: PreTrainedModel,
    attention_scaling: float,
    layout: str,
    tokenizer: PreTrainedTokenizerFast,
    dtype: str,
    path: Path,
) -> None:
    """Write a stock model in fp32 and its tokenizer as a GGUF file.

    Args:
        attention_scaling: YaRN's factor of cosines and sines; 1 in plain RoPE.
    """
    from gguf import GGUFWriter, LlamaFileType, RopeScalingType

    config, rope = model.config, model.config.rope_parameters
    writer = GGUFWriter(path, ARCHITECTURES[layout])
    writer.add_name("MiniMind")
    share = "ALL" if dtype == "float32" else "MOSTLY"
    writer.add_file_type(LlamaFileType[f"{share}_{TYPES[dtype]}"])
    if dtype == "q8_0":
        writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if layout == "qwen3-moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # llama.cpp multiplies by YaRN's own attention factor; this key is an additional one.
        factor = attention_scaling / (1 + 0.1 * math.log(rope["factor"]))
        writer.add_rope_scaling_attn_factors(factor)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, (library_name, tensor) in named_tensors(model, layout).items():
        kind, values = to_ggml(library_name, tensor, dtype)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """Write vocabulary, merges, special tokens and chat template; ids without a token become
    unused ones."""
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
        types[index] = TokenType.NORMAL
        if index in added:
            types[index] = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    writer.add_tokenizer_model("gpt2")  # any byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(False)  # the chat template writes the special tokens itself
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
