"""The library's models that compute what MiniMind computes, shape for shape."""

from pathlib import Path

from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind import MiniMindConfig
from minimind.training.model_arguments import load_model_config_file

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
SHAPE += (
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
SHAPE += ("pad_token_id", "bos_token_id", "eos_token_id")
MOE_SHAPE = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)


def read_size(name: str) -> MiniMindConfig:
    """The configuration in configs/model/NAME.json."""
    return MiniMindConfig(**load_model_config_file(str(CONFIGS / f"{name}.json")))


def library_twin(config: MiniMindConfig) -> PreTrainedModel:
    """The library's model that computes the same."""
    fields = {name: getattr(config, name) for name in SHAPE}
    if config.num_experts:
        fields |= {name: getattr(config, name) for name in MOE_SHAPE}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields, output_router_logits=True))
    return Qwen3ForCausalLM(Qwen3Config(**fields))
