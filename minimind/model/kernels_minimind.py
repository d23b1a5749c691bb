"""Faster routes to the same results: grouped experts, blocked attention, cross-entropy in pieces.

This file is copied into every checkpoint: it imports torch and transformers only.
"""

import torch
from torch import nn
from torch.nn.functional import embedding
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling

BLOCK = 128  # queries per block of `blocked_attention_forward`
# Logits per piece of `CrossEntropy`: a cache's worth on a CPU, memory elsewhere
PIECE = {True: 2**19, False: 2**26}
MAX_BLOCKED_LENGTH = 1024  # beyond it the probabilities take too much memory for the time they save


class GroupedLinear(torch.autograd.Function):
    """states (T, in) sorted by expert, weight (experts, out, in), how many tokens each expert has
    -> (T, out).

    Identical to `linear` on slices except: outputs and gradients are written where they belong.
    Slices of a stacked weight have gradients of their own, which autograd would join at the cost of
    another pass over all experts.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.sizes = sizes
        output = states.new_empty(len(states), weight.shape[1])
        for out, slice_, matrix in zip(
            output.split(sizes), states.split(sizes), weight, strict=True
        ):
            torch.mm(slice_, matrix.T, out=out)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        states, weight = ctx.saved_tensors
        grads = grad_output.contiguous().split(ctx.sizes)
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = torch.empty_like(states)
            for out, grad, matrix in zip(grad_states.split(ctx.sizes), grads, weight, strict=True):
                torch.mm(grad, matrix, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for out, grad, slice_ in zip(grad_weight, grads, states.split(ctx.sizes), strict=True):
                torch.mm(grad.T, slice_, out=out)
        return grad_states, grad_weight, None


def eager_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Sort the visits by expert, so that each expert is one matrix product over a slice; then sort
    back.

    hidden_states (T, E), indices and weights (T, experts per token) -> (T, E). The slices' sizes go
    to the host, which costs nothing on a CPU and a synchronisation elsewhere.
    """
    device = hidden_states.device.type
    dtype = (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device)
        else hidden_states.dtype
    )
    visits = top_k_index.flatten()
    order = visits.argsort(stable=True)
    sizes = visits.bincount(minlength=experts.num_experts).tolist()
    # embedding(i, x) is x[i], except: its backward is parallel on a CPU, where that of x[i] is
    # slow.
    states = embedding(order // top_k_index.shape[1], hidden_states.to(dtype))
    gate, up = GroupedLinear.apply(states, experts.gate_up_proj.to(dtype), sizes).chunk(2, dim=-1)
    outputs = GroupedLinear.apply(experts.act_fn(gate) * up, experts.down_proj.to(dtype), sizes)
    outputs = embedding(order.argsort(), outputs).unflatten(0, top_k_index.shape)
    return (outputs * top_k_weights[..., None]).sum(dim=1)


def fastest_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """The sorted slices on a CPU; elsewhere, and in compiled code, grouped_mm, which leaves the
    sizes on the device.

    The choice is that of `benchmarks/model_step.py`.
    """
    on_host = hidden_states.device.type == "cpu" and not is_torchdynamo_compiling()
    return (eager_experts_forward if on_host else grouped_mm_experts_forward)(
        experts, hidden_states, *routing
    )


ALL_EXPERTS_FUNCTIONS.register("fastest", fastest_experts_forward)


def blocked_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """Causal attention of a sequence to itself, a block of queries at a time, each up to the last
    key it may see.

    The same sums as SDPA's. For short sequences on a CPU, matrix products over whole blocks are
    faster than torch's fused kernel, the more so in bf16 (`benchmarks/model_step.py`); the
    probabilities stay in memory for the backward.
    """
    (B, H, S, D), K = query.shape, key.shape[1]
    # Under autocast, value is in its dtype
    query = (query * scaling).to(value.dtype).reshape(B * K, H // K, S, D)
    key, value = (
        key.to(value.dtype).reshape(B * K, S, D).transpose(1, 2),
        value.reshape(B * K, S, D),
    )
    seen = (
        attention_mask
        if attention_mask is not None
        else query.new_ones(S, S, dtype=torch.bool).tril()[None, None]
    )
    bias = torch.zeros_like(seen, dtype=value.dtype).masked_fill_(
        ~seen, torch.finfo(value.dtype).min
    )
    outputs = []
    for start in range(0, S, BLOCK):
        rows = slice(start, start + BLOCK)
        end = min(start + BLOCK, S)
        # A mask given by hand may let a token see what comes after it
        if seen[:, :, rows, end:].any():
            end = S
        weights = (query[:, :, rows].flatten(1, 2) @ key[..., :end]).view(B, H, -1, end) + bias[
            :, :, rows, :end
        ]
        weights = nn.functional.dropout(
            weights.softmax(dim=-1), p=dropout, training=module.training
        )
        outputs.append((weights.view(B * K, -1, end) @ value[:, :end]).view(B, H, -1, D))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def blocks_are_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether to take `blocked_attention_forward` for SDPA: on a CPU, not in compiled code, without
    earlier keys."""
    short = 1 < query.shape[2] == key.shape[2] <= MAX_BLOCKED_LENGTH
    return short and query.device.type == "cpu" and not is_torchdynamo_compiling()


class CrossEntropy(torch.autograd.Function):
    """logits (N, V), labels (N,) -> the sum of -log p(label) in fp32, labels of `ignore_index` left
    out.

    Identical to `nn.functional.cross_entropy(logits.float(), labels, reduction="sum")` except: the
    gradient is made from the logits, a cache-sized piece at a time, so that neither an fp32 copy of
    the logits nor their log-softmax is ever held; it is the logits' dtype.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        rows = max(1, PIECE[logits.device.type == "cpu"] // logits.shape[1])
        trained = labels != ignore_index
        labels = labels.where(trained, 0)[:, None]
        log_sum_exp = torch.cat(
            [piece.float().logsumexp(dim=-1, keepdim=True) for piece in logits.split(rows)]
        )
        ctx.save_for_backward(logits, labels, trained, log_sum_exp)
        ctx.rows = rows
        return ((log_sum_exp - logits.gather(1, labels).float()).squeeze(1) * trained).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, trained, log_sum_exp = ctx.saved_tensors
        scale = (grad_loss * trained)[:, None]
        grad = torch.empty_like(logits)
        for out, piece, total, factor in zip(
            *(t.split(ctx.rows) for t in (grad, logits, log_sum_exp, scale)), strict=True
        ):
            torch.mul((piece.float() - total).exp_(), factor, out=out)
        return grad.scatter_add_(1, labels, -scale.to(grad.dtype)), None, None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> torch.Tensor:
    """Identical to the library's ForCausalLMLoss except for `CrossEntropy`: less memory, less
    time."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    return (
        CrossEntropy.apply(logits.view(-1, vocab_size), shift_labels, ignore_index)
        / num_items_in_batch
    )
