"""MiniMind: a pre-norm decoder with RMSNorm, RoPE, grouped-query attention and SwiGLU.

- With `num_experts > 0` each SwiGLU is a mixture of experts.
- Tensor names are Qwen3's and Qwen3-MoE's.
- For the same weights the logits are Qwen3's (Qwen3-MoE's) with `qk_norm=True` and Llama's with
  `qk_norm=False`.

This file is copied into every checkpoint: it imports torch, transformers and its siblings only.

Shapes: B batch, S sequence, T = B * S tokens, H query heads, K key/value heads, D head_dim,
E hidden_size, I moe_intermediate_size, V vocabulary.
"""

import torch
from torch import nn
from torch.nn.functional import dropout, linear, softmax
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_minimind import MiniMindConfig
from .kernels_minimind import (
    Rotation,
    blocked_attention_forward,
    blocks_are_faster,
    causal_lm_loss,
    eager_experts_forward,
    find_targets,
    gated,
    own_backward_is_better,
    rms_norm,
)


class MiniMindRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (Zhang & Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MiniMindMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: MiniMindConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(gated(self.act_fn, gate, up))


class MiniMindTopKRouter(nn.Module):
    """The experts that each token visits, and the weight of each. Identical to Qwen3-MoE's."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(T, E) -> logits (T, experts), weights and indices of the chosen experts (T, top k)."""
        router_logits = linear(hidden_states, self.weight)
        routing_weights = router_logits.softmax(dim=-1, dtype=torch.float)
        top_k_weights, top_k_index = routing_weights.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(router_logits.dtype), top_k_index


@use_experts_implementation
class MiniMindExperts(nn.Module):
    """SwiGLU experts stacked: gate_up_proj (experts, 2I, E) and down_proj (experts, E, I)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.intermediate_size = config.moe_intermediate_size
        experts, inner, hidden = self.num_experts, self.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return eager_experts_forward(self, hidden_states, *routing)


class MiniMindSparseMoeBlock(nn.Module):
    """Routed experts (Shazeer et al., 2017) and shared ones for every token (DeepSeekMoE, 2024)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate = MiniMindTopKRouter(config)
        self.experts = MiniMindExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            intermediate_size = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MiniMindMLP(config, intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output


class MiniMindRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (Su et al., 2021). Identical to Llama's.

    The buffers are not saved. `from_pretrained` builds on the meta device and fills them again
    through the library's `_init_weights`, which recognises this class by its name and attributes:
    keep both.
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        """theta ** (-2i / D) for i < D/2, and the scaling of cos and sin, 1 in plain RoPE."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """position_ids (B, S) -> cos, sin (B, S, D) in the dtype of `x`; the first half of sin is
        negated, see `apply_rotary_pos_emb`."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        cos, sin = freqs.cos() * self.attention_scaling, freqs.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((-sin, sin), dim=-1).to(x.dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """Rotate (B, S, heads, D) by cos and sin (B, S, D): with x1, x2 the halves of D, the result is
    (x1 cos - x2 sin, x2 cos + x1 sin). The minus is in sin, so that one roll swaps the halves."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if own_backward_is_better(states):
        return Rotation.apply(states, cos, sin)
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v: query (B, H, S, D) -> output (B, S, H, D), weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MiniMindAttention(nn.Module):
    r"""Grouped-query attention (Ainslie et al., 2023) through the library's attention interface.

    Identical to Qwen3's except: no sliding window; without `qk_norm`, identical to Llama's.

        query heads      q0 q1 q2 q3      H = 4
                          \ /   \ /
        key/value heads   k0    k1        K = 2, num_key_value_groups = 2
    """

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        E, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(E, query_size, bias=bias)
        self.k_proj = nn.Linear(E, key_value_size, bias=bias)
        self.v_proj = nn.Linear(E, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, E, bias=bias)
        # Over D, before the rotation: bounds the attention logits whatever the scale of q and k
        norm = MiniMindRMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape))
        key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape))
        query_states = apply_rotary_pos_emb(query_states, *position_embeddings).transpose(1, 2)
        key_states = apply_rotary_pos_emb(key_states, *position_embeddings).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(
                key_states, value_states, self.layer_idx
            )

        name = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        if name == "sdpa" and blocks_are_faster(query_states, key_states):
            attention = blocked_attention_forward
        attn_output, attn_weights = attention(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class MiniMindDecoderLayer(GradientCheckpointingLayer):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MiniMindAttention(config, layer_idx)
        if config.num_experts:
            self.mlp = MiniMindSparseMoeBlock(config)
        else:
            self.mlp = MiniMindMLP(config, config.intermediate_size)
        self.input_layernorm = MiniMindRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniMindRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]):
        output, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + dropout(output, self.hidden_dropout, self.training)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + dropout(output, self.hidden_dropout, self.training)


class MiniMindPreTrainedModel(PreTrainedModel):
    """Declares to the library what MiniMind supports."""

    config: MiniMindConfig
    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMindDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MiniMindDecoderLayer,
        "attentions": MiniMindAttention,
        "router_logits": OutputRecorder(MiniMindTopKRouter, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniMindExperts | MiniMindTopKRouter):
            for parameter in module.parameters(recurse=False):
                initialization.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Identical to the library's except for the default, which depends on the device."""
        return super().get_correct_experts_implementation(requested_experts or "fastest")


class MiniMindModel(MiniMindPreTrainedModel):
    """Token ids (B, S) -> hidden states (B, S, E)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        pad, ends = config.pad_token_id, config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        untrained_id = None if pad in ends else pad
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, untrained_id)
        self.layers = nn.ModuleList(
            [MiniMindDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)]
        )
        self.norm = MiniMindRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiniMindRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Without mask and cache, `position_ids` (B, S) that restart in a row separate its
        documents."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # Before positions have a default: in given ones it looks for documents, for which the host
        # waits for the device
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            length, device = inputs_embeds.shape[1], inputs_embeds.device
            position_ids = past_length + torch.arange(length, device=device)[None]

        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    top_k: int,
    batch_size: int,
    mask: torch.Tensor | None,
    seq_aux: bool,
) -> torch.Tensor:
    """experts * sum_i f_i P_i (Switch Transformers, 2021, eq. 4), averaged over the layers; `top_k`
    if perfectly balanced.

    f_i is the number of visits to expert i per token, P_i its mean probability, both over the
    batch. With `seq_aux`, both are over one sequence, and the losses are averaged (DeepSeekMoE,
    2024, eq. 12). For one layer and without `seq_aux`, this is Qwen3-MoE's.

    Args:
        router_logits: (T, experts) of each layer.
        mask: (B, S), 0 where a token is padding and does not count.
    """
    logits = torch.stack(router_logits).float().unflatten(1, (batch_size, -1))
    num_experts = logits.shape[-1]
    visits = torch.zeros_like(logits).scatter_(-1, logits.topk(top_k, dim=-1).indices, 1.0)

    # The share of each token in the mean
    counts = logits.new_ones(logits.shape[1:3]) if mask is None else mask.to(logits)
    total = counts.sum(dim=1, keepdim=True) if seq_aux else counts.sum()
    shares = counts / total.clamp(min=1)

    # l layers, b sequences, s positions, e experts
    mean = "lbse,bs->lbe" if seq_aux else "lbse,bs->le"
    visits_per_token = torch.einsum(mean, visits, shares)
    mean_probability = torch.einsum(mean, logits.softmax(dim=-1), shares)
    return num_experts * (visits_per_token * mean_probability).sum(dim=-1).mean()


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """Token ids (B, S) -> logits (B, S, V), and with `labels` (B, S) the shifted cross-entropy.

    In training, a mixture of experts adds `router_aux_loss_coef` times the load-balancing loss. In
    evaluation the loss is the cross-entropy alone, so that it measures the language;
    `output_router_logits` returns the load-balancing loss beside it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        max_targets: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """The caller does not shift the labels; -100 is ignored. With `num_items_in_batch` in
        `kwargs` the loss is the sum over trained tokens divided by that number, so that gradient
        accumulation averages over tokens.

        Args:
            max_targets: the number of labels in `labels[:, 1:]` that are not -100, or a larger one.
                Then only the positions that predict them go through the head, and no logits are
                returned. The number is the caller's, since to count on a GPU is to wait for it.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        train_router = self.training and labels is not None and self.config.router_aux_loss_coef > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or train_router,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        only_targets = labels is not None and max_targets is not None
        if only_targets:
            positions, targets = find_targets(labels, max_targets)
            hidden_states = hidden_states.flatten(0, 1).index_select(0, positions)
            kwargs |= {"shift_labels": targets, "positions": positions}
        else:
            hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if outputs.router_logits:
            mask = None if input_ids is None else input_ids != self.config.pad_token_id
            if attention_mask is not None and attention_mask.ndim == 2:
                # It also covers the tokens in the cache
                mask = attention_mask[:, -outputs.last_hidden_state.shape[1] :]
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                self.config.num_experts_per_tok,
                len(outputs.last_hidden_state),
                mask,
                self.config.seq_aux,
            )
        if train_router:
            # A trainer sums the losses of its micro-batches and ranks. The cross-entropy is
            # therefore divided by num_items_in_batch; this term is weighted by the micro-batch's
            # share of the tokens, or it would count once per micro-batch
            # (https://github.com/huggingface/transformers/issues/48690).
            share = 1.0
            if kwargs.get("num_items_in_batch") is not None:
                share = (labels[..., 1:] != -100).sum() / kwargs["num_items_in_batch"]
            loss = loss + self.config.router_aux_loss_coef * share * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=None if only_targets else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


class MiniMindForSequenceClassification(GenericForSequenceClassification, MiniMindPreTrainedModel):
    """Token ids (B, S) -> scores (B, num_labels), read from the last token that is not padding.

    With one label it is a reward model. For the same weights the scores are Qwen3's (Qwen3-MoE's).
    In training, a mixture of experts returns its load-balancing loss as `aux_loss`, and with
    `labels` adds `router_aux_loss_coef` times it to the loss.
    """

    def __init__(self, config: MiniMindConfig):
        # Identical to the library's except: it names the base class. The library's looks it up in
        # the Auto classes, which do not know it in a process that loads this file as remote code.
        MiniMindPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        last_tokens: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """The scores are `logits`; without a mask (B, S), padding is `pad_token_id`.

        Args:
            last_tokens: (N,) places in 0 .. B * S from which the scores (N, num_labels) are read
                instead, where a row holds several sequences.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        train_router = self.training and self.config.router_aux_loss_coef > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or train_router,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        batch_size, length = hidden_states.shape[:2]
        mask = None if input_ids is None else input_ids != self.config.pad_token_id
        if attention_mask is not None and attention_mask.ndim == 2:
            mask = attention_mask[:, -length:]  # it also covers the tokens in the cache

        places = torch.arange(batch_size * length, device=hidden_states.device)
        if last_tokens is None:
            places = places.view(batch_size, length)
            last_tokens = places[:, -1] if mask is None else (places * mask).amax(dim=1)
            # A row of nothing but padding has no last token
            last_tokens = torch.maximum(last_tokens, places[:, 0])
        hidden_states = hidden_states.flatten(0, 1)[last_tokens]
        # Two replies may differ by less than half precision has digits for
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = self.score(hidden_states.to(self.score.weight.dtype))

        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs
            )
        if outputs.router_logits:
            aux_loss = load_balancing_loss(
                outputs.router_logits,
                self.config.num_experts_per_tok,
                batch_size,
                mask,
                self.config.seq_aux,
            )
        if train_router and loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


# In files, each expert and projection is a tensor of its own, as in Qwen2-MoE's and Qwen3-MoE's
register_checkpoint_conversion_mapping(
    "minimind", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)

__all__ = [
    "MiniMindForCausalLM",
    "MiniMindForSequenceClassification",
    "MiniMindModel",
    "MiniMindPreTrainedModel",
]
