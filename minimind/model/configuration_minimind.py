"""MiniMind configuration. This file is copied into every checkpoint: it imports transformers only."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class MiniMindConfig(PreTrainedConfig):
    """Shape of a MiniMind decoder; field names are the library's, so every tool finds what it looks for.

    With `qk_norm=True` the model computes what Qwen3 computes for the same weights, with `qk_norm=False` what
    Llama computes. `intermediate_size=None` takes 8/3 of `hidden_size`, rounded up to a multiple of 64, as Llama
    does; `head_dim=None` takes `hidden_size / num_attention_heads`.

    Raises:
        StrictDataclassError: (of huggingface_hub, with the reason as its cause) for a wrong type or a shape that
            cannot be.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    default_theta = 1_000_000.0

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    qk_norm: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0 and not self.hidden_size % self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * -(-self.hidden_size * 8 // (3 * 64))
        # `save_pretrained` of one class lists only that class: name them all, so that a checkpoint saved from any
        # of them opens through every Auto class.
        self.auto_map = {
            "AutoConfig": "configuration_minimind.MiniMindConfig",
            "AutoModel": "modeling_minimind.MiniMindModel",
            "AutoModelForCausalLM": "modeling_minimind.MiniMindForCausalLM",
        }
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the rules between fields."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}); change one of them, or give head_dim."
            )
        if self.head_dim < 1:
            raise ValueError(f"head_dim is {self.head_dim}, expected at least 2.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs of dimensions.")
        if self.num_key_value_heads > self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each key/value head serves a whole group of query heads."
            )


__all__ = ["MiniMindConfig"]
