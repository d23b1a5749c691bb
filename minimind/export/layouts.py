"""The stock layouts: what each can express, and MiniMind's weights and config in it.

MiniMind computes what Qwen3, Qwen3-MoE or Llama compute and names its tensors as they do, so that
another config is all it takes for vLLM, llama.cpp or `transformers serve` to run it.
"""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind.common.errors import UserError
from minimind.common.files import read_json, write_json
from minimind.tokenizer.loading import COPY

STOCK = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
FORMATS = (*STOCK, "minimind", "gguf")

# Both sides call these the same. Dropout of hidden states and the balancing over sequences act in
# training alone.
DENSE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *(
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "hidden_act",
        "max_position_embeddings",
        "rope_parameters",
    ),
    *("rms_norm_eps", "attention_dropout", "initializer_range", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
MOE_FIELDS = (
    *(
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "router_aux_loss_coef",
    ),
)
# YaRN as llama.cpp computes it for these architectures, whatever a file says.
YARN_IN_LLAMA_CPP = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def natural_layout(config: PreTrainedConfig) -> str:
    """The stock layout of a model like this, if any; also the architecture of its GGUF file."""
    return "qwen3-moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"


def obstacles(config: PreTrainedConfig, format: str) -> list[str]:
    """Why `format` cannot express a MiniMind of this config; empty where it can."""
    if format == "minimind":
        return []
    layout = natural_layout(config) if format == "gguf" else format
    found = []
    if config.n_shared_experts:
        found.append(
            f"n_shared_experts is {config.n_shared_experts}, and Qwen3-MoE has no shared experts"
        )
    if layout == "qwen3-moe" and not config.num_experts:
        found.append("num_experts is 0, and Qwen3-MoE is a mixture of experts")
    if layout != "qwen3-moe" and config.num_experts:
        found.append(f"num_experts is {config.num_experts}, and this layout is dense")
    if layout == "llama" and config.qk_norm:
        found.append("qk_norm is true, and Llama does not normalise queries and keys")
    if layout != "llama" and not config.qk_norm:
        found.append("qk_norm is false, and Qwen3 normalises queries and keys")
    if layout == "llama" and config.hidden_size % config.num_attention_heads:
        found.append(
            f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads "
            f"({config.num_attention_heads}), which Llama demands"
        )
    return found + (gguf_obstacles(config, layout) if format == "gguf" else [])


def gguf_obstacles(config: PreTrainedConfig, layout: str) -> list[str]:
    """What llama.cpp computes in one way only, for the architecture of `layout`."""
    found = []
    if config.attention_bias and layout != "llama":
        found.append("attention_bias is true, and llama.cpp's Qwen3 has no bias after attention")
    if config.hidden_act != "silu":
        found.append(f"hidden_act is {config.hidden_act!r}, and llama.cpp computes SiLU")
    if layout == "qwen3-moe" and not config.norm_topk_prob:
        found.append(
            "norm_topk_prob is false, and llama.cpp always normalises the weights of the chosen"
            " experts"
        )
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "yarn"):
        found.append(
            f"rope_type is {rope['rope_type']!r}, and these GGUF files have default, linear and"
            " yarn"
        )
    for key, value in YARN_IN_LLAMA_CPP.items():
        if (given := rope.get(key)) is not None and given != value:
            found.append(
                f"{key} of YaRN is {given}, and llama.cpp takes {value} for this architecture"
            )
    return found


def stock_model(source: PreTrainedModel, layout: str) -> PreTrainedModel:
    """The library's model of `layout` with the weights of a MiniMind, in fp32."""
    config_class, model_class = STOCK[layout]
    names = DENSE_FIELDS + (MOE_FIELDS if layout == "qwen3-moe" else ())
    try:
        config = config_class(
            **{name: getattr(source.config, name) for name in names}, use_cache=True
        )
    except StrictDataclassError as error:
        raise UserError(
            f"the layout {layout} cannot express this model: {error.__cause__ or error}"
        ) from error
    model = model_class(config).eval()
    model.load_state_dict(source.state_dict(), strict=True)
    model.generation_config = source.generation_config
    return model


def save_for_all_versions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """Save a stock model so that tools on transformers 4 read what those on 5 do.

    Version 4 knows neither `rope_parameters`, for which it takes its own theta in silence, nor
    `dtype`, the experts' number only by the name `num_experts`, and no `TokenizersBackend`; other
    tools look for the chat template in `tokenizer_config.json`.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = read_json(directory / "config.json", COPY)
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config["dtype"]
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    write_json(directory / "config.json", config)
    write_json(
        directory / "tokenizer_config.json",
        read_json(directory / "tokenizer_config.json", COPY)
        | {"tokenizer_class": "PreTrainedTokenizerFast"}
        | ({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    )
