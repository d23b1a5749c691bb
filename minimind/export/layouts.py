"""The stock layouts: what each can express, and a MiniMind in it.

MiniMind computes what Qwen3, Qwen3-MoE or Llama compute, and has the same names of tensors. With
another config, vLLM, llama.cpp or `transformers serve` can run it.
"""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
)

from minimind.common.errors import UserError
from minimind.common.files import read_json, write_json
from minimind.stage_directory import is_reward_config
from minimind.tokenizer.loading import COPY

# Configuration, language model and reward model
STOCK = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification),
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
}
FORMATS = (*STOCK, "minimind", "gguf")

# Fields with the same name in both. `hidden_dropout` and `seq_aux` matter only in training.
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
FIELDS += ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias")
FIELDS += ("max_position_embeddings", "rope_parameters", "rms_norm_eps", "attention_dropout")
FIELDS += ("initializer_range", "tie_word_embeddings")
FIELDS += ("pad_token_id", "bos_token_id", "eos_token_id")
MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
MOE_FIELDS += ("router_aux_loss_coef",)
# YaRN as llama.cpp computes it for these architectures, whatever a file says
YARN_IN_LLAMA_CPP = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def natural_layout(config: PreTrainedConfig) -> str:
    """The stock layout closest to a model; also the architecture of its GGUF file."""
    return "qwen3-moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"


def obstacles(config: PreTrainedConfig, format: str) -> list[str]:
    """The reasons why `format` cannot express a MiniMind of this config; empty if it can."""
    if format == "minimind":
        return []
    layout = natural_layout(config) if format == "gguf" else format
    experts, shared = config.num_experts, config.n_shared_experts
    hidden, heads = config.hidden_size, config.num_attention_heads
    moe, llama = layout == "qwen3-moe", layout == "llama"
    reasons = {
        f"n_shared_experts is {shared}, and Qwen3-MoE has no shared experts": shared,
        "num_experts is 0, and Qwen3-MoE is a mixture of experts": moe and not experts,
        f"num_experts is {experts}, and this layout is dense": experts and not moe,
        "qk_norm is true, and Llama does not normalise queries and keys": llama and config.qk_norm,
        "qk_norm is false, and Qwen3 normalises queries and keys": not (llama or config.qk_norm),
        f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}), which Llama"
        " demands": llama and hidden % heads,
    }
    if format == "gguf":
        reasons |= gguf_obstacles(config, layout)
    return [reason for reason, applies in reasons.items() if applies]


def gguf_obstacles(config: PreTrainedConfig, layout: str) -> dict[str, bool]:
    """Reasons why llama.cpp cannot compute a model with the architecture of `layout`, and whether
    each applies."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    reasons = {
        "it is a reward model, and these GGUF files hold language models": (
            is_reward_config(config)
        ),
        "attention_bias is true, and llama.cpp's Qwen3 has no bias after attention": (
            config.attention_bias and layout != "llama"
        ),
        f"hidden_act is {config.hidden_act!r}, and llama.cpp computes SiLU": (
            config.hidden_act != "silu"
        ),
        "norm_topk_prob is false, and llama.cpp always normalises the weights of the chosen"
        " experts": layout == "qwen3-moe" and not config.norm_topk_prob,
        f"rope_type is {kind!r}, and these GGUF files have default, linear and yarn": (
            kind not in ("default", "linear", "yarn")
        ),
    }
    for key, only in YARN_IN_LLAMA_CPP.items():
        value = rope.get(key, only)
        reason = f"{key} of YaRN is {value}, and llama.cpp takes {only} for this architecture"
        reasons[reason] = value not in (None, only)
    return reasons


def stock_model(source: PreTrainedModel, layout: str) -> PreTrainedModel:
    """The library's model of `layout` with the weights of a MiniMind, in fp32."""
    config_class, *classes = STOCK[layout]
    scores = is_reward_config(source.config)
    names = FIELDS + (MOE_FIELDS if layout == "qwen3-moe" else ())
    fields = {name: getattr(source.config, name) for name in names}
    try:
        config = config_class(**fields, use_cache=True)
        if scores:
            config.num_labels = source.config.num_labels
    except StrictDataclassError as error:
        raise UserError(
            f"the layout {layout} cannot express this model: {error.__cause__ or error}"
        ) from error
    model = classes[scores](config).eval()
    model.load_state_dict(source.state_dict(), strict=True)
    if not scores:
        model.generation_config = source.generation_config
    return model


def save_for_all_versions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path
) -> None:
    """Save a stock model so that tools on transformers 4 and 5 read the same.

    Version 4 does not know `rope_parameters` (it silently uses its own theta), `dtype` and
    `TokenizersBackend`, and reads the number of experts as `num_experts`. Other tools look for the
    chat template in `tokenizer_config.json`.
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

    settings = read_json(directory / "tokenizer_config.json", COPY)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    write_json(directory / "tokenizer_config.json", settings)
