"""MiniMind configuration. This file is copied into every checkpoint: it imports only
transformers."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# The parameters of each kind of RoPE, besides rope_type and rope_theta
EXTENSION = {"factor", "original_max_position_embeddings"}
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": EXTENSION,
    "yarn": EXTENSION
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": EXTENSION | {"low_freq_factor", "high_freq_factor"},
}


@strict
class MiniMindConfig(PreTrainedConfig):
    """Shape of a MiniMind decoder, under the library's field names so that every tool finds them.

    For the same weights the model computes what Qwen3 computes (`qk_norm=True`), what Llama
    computes (`qk_norm=False`), or what Qwen3-MoE computes (`num_experts > 0`).

    Fields left at None are derived:

    - `head_dim` is `hidden_size / num_attention_heads`.
    - `intermediate_size` is 8/3 of `hidden_size`, rounded up to a multiple of 64, as in Llama.
    - `moe_intermediate_size` is `intermediate_size`.
    - `norm_topk_prob` is true for several experts per token and false for one: normalised, its
      weight would always be 1, and the language loss could not train the router.

    With `num_experts > 0` every layer is a mixture of experts: each token visits
    `num_experts_per_tok` of `num_experts` routed experts of `moe_intermediate_size`, and all
    `n_shared_experts`. `router_aux_loss_coef` is the weight of the load-balancing loss, which is
    computed over the batch or, with `seq_aux`, over each sequence.

    `rope_parameters` is the library's: `{"rope_type": "default" | "linear" | "dynamic" | "yarn" |
    "llama3", "rope_theta": ..., "factor": ..., ...}`; YaRN also needs
    `original_max_position_embeddings`.

    Raises:
        StrictDataclassError: from huggingface_hub, with the reason as its cause, for a wrong type
            or an impossible shape.
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
    attention_bias: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    initializer_range: float = 0.02
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool | None = None
    n_shared_experts: int = 0
    router_aux_loss_coef: float | int = 0.01
    seq_aux: bool = False
    output_router_logits: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        heads = self.num_attention_heads
        if self.head_dim is None and heads > 0 and self.hidden_size % heads == 0:
            self.head_dim = self.hidden_size // heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * -(-self.hidden_size * 8 // (3 * 64))
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1
        if not self.num_experts:
            self.router_aux_loss_coef = 0.0  # TRL would look for routers at any other value

        # `save_pretrained` of one class lists only that class. List them all, so that a checkpoint
        # saved from any of them opens through every Auto class.
        models = {
            "AutoModel": "MiniMindModel",
            "AutoModelForCausalLM": "MiniMindForCausalLM",
            "AutoModelForSequenceClassification": "MiniMindForSequenceClassification",
        }
        self.auto_map = {"AutoConfig": "configuration_minimind.MiniMindConfig"}
        self.auto_map |= {auto: f"modeling_minimind.{name}" for auto, name in models.items()}
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the layers: attention by heads, SwiGLU by its inner width.

        A property, because the plan must name only modules that this configuration has.
        """
        swiglu = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        plan = {f"self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
        plan["self_attn.o_proj"] = "rowwise"
        if self.qk_norm:
            # Each process normalises its own heads with the same weight, whose gradient is the sum
            # over all heads.
            norms = ("self_attn.q_norm", "self_attn.k_norm")
            plan |= dict.fromkeys(norms, "replicated_with_grad_allreduce")
        if self.num_experts:
            plan["mlp.experts.gate_up_proj"] = "packed_colwise"
            plan["mlp.experts.down_proj"] = "rowwise"
            plan["mlp.experts"] = "moe_tp_experts"
        if not self.num_experts or self.n_shared_experts:
            prefix = "mlp.shared_experts" if self.num_experts else "mlp"
            plan |= {f"{prefix}.{name}": style for name, style in swiglu.items()}
        return {f"layers.*.{name}": style for name, style in plan.items()}

    def validate_architecture(self):
        """Called by the validation of `@strict`: ranges, and the rules between fields."""
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        sizes += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
        sizes += ["num_experts_per_tok", "moe_intermediate_size"] if self.num_experts else []
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        for name in ("num_experts", "n_shared_experts", "router_aux_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0.")
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}); change one of them, or give head_dim."
            )
        if self.head_dim < 1:
            raise ValueError(f"head_dim is {self.head_dim}, expected at least 2.")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs of dimensions."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of"
                f" num_key_value_heads ({self.num_key_value_heads}): each key/value head serves a"
                " whole group of query heads."
            )
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= (rate := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {rate}, expected a probability below 1.")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) is above num_experts"
                f" ({self.num_experts}): a token visits each expert at most once."
            )
        if self.n_shared_experts and not self.num_experts:
            raise ValueError(
                f"n_shared_experts is {self.n_shared_experts} and num_experts is 0: shared experts"
                " are used beside routed ones. Give num_experts, or a larger intermediate_size for"
                " a dense model."
            )

    def validate_rope(self):
        """Refuse RoPE mistakes of which the library only warns, and then computes something
        else."""
        rope = self.rope_parameters
        kind, factor = rope["rope_type"], rope.get("factor")
        if kind not in ROPE_KEYS:
            raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(ROPE_KEYS)}.")
        unknown = sorted(set(rope) - ROPE_KEYS[kind] - {"rope_type", "rope_theta"})
        if unknown:
            raise ValueError(
                f"rope_parameters has {', '.join(unknown)}, which rope_type {kind!r} does not take;"
                f" it takes {', '.join(['rope_theta', *sorted(ROPE_KEYS[kind])])}."
            )
        if kind != "default" and not (isinstance(factor, int | float) and factor >= 1):
            raise ValueError(
                f"rope_type {kind!r} has factor {factor!r}, expected a number of at least 1: how"
                " many times longer than in training a sequence may be (max_position_embeddings is"
                f" {self.max_position_embeddings})."
            )
        super().validate_rope()


__all__ = ["MiniMindConfig"]
