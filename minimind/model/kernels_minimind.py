"""Faster routes to the library's results: norms, gates, grouped experts, blocked attention,
cross-entropy.

`benchmarks/model_step.py` times them. This file is copied into every checkpoint: it imports torch
and transformers only.
"""

import torch
from torch import nn
from torch.nn.functional import embedding, pad, silu
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling

BLOCK = 64  # queries per block of `blocked_attention_forward`
MAX_BLOCKED_LENGTH = 1024  # beyond it the probabilities take too much memory for the time they save
# Logits per piece of `CrossEntropy`: on a CPU (True) what fits into a cache, elsewhere (False) more
PIECE = {True: 2**19, False: 2**26}


# Norms and gates


class RMSNorm(torch.autograd.Function):
    """states (..., E), weight (E,) -> states / rms(states) * weight in `dtype`, statistics in fp32.

    Identical to the library's except: it keeps only its input and one number per row for the
    backward, where autograd keeps three tensors as large as the states in fp32; and the gradients
    are not rounded to half precision on their way.
    """

    @staticmethod
    def forward(
        ctx, states: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        values = states.float()
        square_sum = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
        scale = square_sum.div_(states.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, scale)
        # The library rounds to half precision before the weight
        return ((values * scale).to(states.dtype) * weight).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        states, weight, scale = ctx.saved_tensors
        grad, values, factors = grad_output.float(), states.float(), weight.float()
        products = (grad * values).flatten(0, -2)
        mean = (products @ factors).view(scale.shape) / len(factors)
        grad_states = (grad * factors).addcmul_(values, mean * scale.square(), value=-1).mul_(scale)
        grad_weight = products.T @ scale.flatten()
        return grad_states.to(states.dtype), grad_weight.to(weight.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up.

    Identical to autograd's except: silu(gate) is computed again in the backward instead of kept.
    """

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad_output * up, gate)
        return grad_gate, silu(gate) * grad_output


def own_backward_is_better(states: torch.Tensor) -> bool:
    """Whether `RMSNorm` and `Rotation` should replace torch's operations: on a CPU, where gradients
    are recorded. Without them they only take time, a tenth of a decoding step."""
    return (
        states.device.type == "cpu" and torch.is_grad_enabled() and not is_torchdynamo_compiling()
    )


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """states / rms(states) * weight over the last dimension, statistics in fp32.

    Under autocast, fp32 states give a result in autocast's dtype: all that reads it would cast it,
    each projection into a copy of its own.
    """
    device = states.device.type
    dtype = torch.promote_types(states.dtype, weight.dtype)
    if states.dtype == torch.float and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

    if own_backward_is_better(states):
        return RMSNorm.apply(states, weight, eps, dtype)
    if states.dtype == torch.float:
        return nn.functional.rms_norm(states, weight.shape, weight, eps).to(dtype)
    return weight * nn.functional.rms_norm(states, weight.shape, None, eps).to(states.dtype)


def gated(act_fn: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act_fn(gate) * up."""
    silu_trained = isinstance(act_fn, nn.SiLU | SiLUActivation) and torch.is_grad_enabled()
    if silu_trained and not is_torchdynamo_compiling():
        return SwiGLU.apply(gate, up)
    return act_fn(gate) * up


# Positions


class Rotation(torch.autograd.Function):
    """See `apply_rotary_pos_emb`. Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = states.dtype
        return rotate(states, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad_output, cos, -sin).to(ctx.dtype), None, None


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rotary_pos_emb` in two passes over the states."""
    outputs = states * cos
    halves = outputs.chunk(2, dim=-1), states.chunk(2, dim=-1)[::-1], sin.chunk(2, dim=-1)
    for output, other, factor in zip(*halves, strict=True):
        output.addcmul_(other, factor)
    return outputs


# Mixture of experts


class GroupedLinear(torch.autograd.Function):
    """Multiply each expert's slice of the tokens by that expert's matrix.

    states (T, in) sorted by expert, weight (experts, out, in), tokens per expert -> (T, out).

    Identical to `linear` on slices except: outputs and gradients are written in place. Slices of a
    stacked weight have separate gradients, which autograd would join in one more pass over all
    experts.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.sizes = sizes
        output = states.new_empty(len(states), weight.shape[1])
        for out, group, matrix in zip(
            output.split(sizes), states.split(sizes), weight, strict=True
        ):
            torch.mm(group, matrix.T, out=out)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        states, weight = ctx.saved_tensors
        grads = grad_output.contiguous().split(ctx.sizes)
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = torch.empty_like(states)
            for out, grad, matrix in zip(grad_states.split(ctx.sizes), grads, weight, strict=True):
                torch.mm(grad, matrix, out=out)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for out, grad, group in zip(grad_weight, grads, states.split(ctx.sizes), strict=True):
                torch.mm(grad.T, group, out=out)
        return grad_states, grad_weight, None


def eager_experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Run each expert as one matrix product over its slice of the sorted visits.

    hidden_states (T, E), indices and weights (T, experts per token) -> (T, E). The sizes of the
    slices go to the host, which is free on a CPU and a synchronisation elsewhere.
    """
    device, dtype = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

    # Sort the visits by expert. embedding(i, x) is x[i], except: its backward is parallel on a CPU,
    # where that of x[i] is slow.
    visits = top_k_index.flatten()
    order = visits.argsort(stable=True)
    sizes = visits.bincount(minlength=experts.num_experts).tolist()
    states = embedding(order // top_k_index.shape[1], hidden_states.to(dtype))

    # SwiGLU of every slice
    gate, up = GroupedLinear.apply(states, experts.gate_up_proj.to(dtype), sizes).chunk(2, dim=-1)
    outputs = GroupedLinear.apply(
        gated(experts.act_fn, gate, up), experts.down_proj.to(dtype), sizes
    )

    # Sort back, and add up each token's experts
    outputs = embedding(order.argsort(), outputs).unflatten(0, top_k_index.shape)
    return (outputs * top_k_weights[..., None]).sum(dim=1)


def fastest_experts_forward(
    experts: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """Sorted slices on a CPU; elsewhere, and in compiled code, grouped_mm, which keeps the sizes on
    the device."""
    eager = hidden_states.device.type == "cpu" and not is_torchdynamo_compiling()
    forward = eager_experts_forward if eager else grouped_mm_experts_forward
    return forward(experts, hidden_states, *routing)


ALL_EXPERTS_FUNCTIONS.register("fastest", fastest_experts_forward)


# Attention


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
    """Causal self-attention of a sequence, one block of queries at a time, each with the keys from
    the first to the last that it may see.

    The same sums as SDPA's. For short sequences on a CPU, matrix products over entire blocks are
    faster than torch's fused kernel, especially in bf16; the probabilities stay in memory for the
    backward. Packed documents that cannot see each other cost little more than unpacked ones.
    """
    (B, H, S, D), K = query.shape, key.shape[1]
    # Under autocast, only `value` has its dtype already. Keys are scaled, since queries are more.
    query = query.to(value.dtype)
    key = (key * scaling).to(value.dtype).reshape(B * K, S, D).transpose(1, 2)
    value = value.reshape(B * K, S, D)
    visible = attention_mask
    if visible is None:
        visible = query.new_ones(S, S, dtype=torch.bool).tril()[None, None]
    bias = torch.zeros_like(visible, dtype=value.dtype)
    bias.masked_fill_(~visible, torch.finfo(value.dtype).min)

    # All rows at once, or each alone
    ranges = key_ranges(visible)
    rows = B // len(ranges)
    pieces = [query.split(rows), key.split(rows * K), value.split(rows * K)]
    pieces.append(bias.split(rows) if len(bias) > 1 else [bias] * len(ranges))
    outputs = []
    for q, k, v, b, own_ranges in zip(*pieces, ranges, strict=True):
        blocks = zip(q.split(BLOCK, dim=2), b.split(BLOCK, dim=2), own_ranges, strict=True)
        parts = []
        for block, block_bias, (first, end) in blocks:
            logits = block.reshape(rows * K, -1, D) @ k[..., first:end]
            logits = logits.view(rows, H, -1, end - first) + block_bias[..., first:end]
            weights = nn.functional.dropout(logits.softmax(dim=-1), dropout, module.training)
            part = weights.view(rows * K, -1, end - first) @ v[:, first:end]
            parts.append(part.view(rows, H, -1, D).transpose(1, 2))
        outputs.append(torch.cat(parts, dim=1))
    return torch.cat(outputs), None


def key_ranges(visible: torch.Tensor) -> list[list[list[int]]]:
    """The keys from the first to the last that each block of queries may see, for all rows at once,
    or for each row alone where that spares a fifth of the products.

    visible: (B, 1, S, S), True where a query may see a key.
    """
    seen = [block.any(dim=(1, 2)) for block in visible.split(BLOCK, dim=2)]
    seen = torch.stack(seen, dim=1).byte()  # (B, blocks, S)
    first = seen.argmax(dim=-1) // 16 * 16
    end = seen.shape[-1] - seen.flip(-1).argmax(dim=-1)
    # The first and the last that any row may see
    all_first, all_end = first.amin(dim=0, keepdim=True), end.amax(dim=0, keepdim=True)
    if (end - first).sum() > 0.8 * len(seen) * (all_end - all_first).sum():
        first, end = all_first, all_end
    return torch.stack((first, end), dim=-1).tolist()


def blocks_are_faster(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `blocked_attention_forward` should replace SDPA: for short sequences on a CPU,
    without earlier keys, not in compiled code."""
    short = 1 < query.shape[2] == key.shape[2] <= MAX_BLOCKED_LENGTH
    return short and query.device.type == "cpu" and not is_torchdynamo_compiling()


# Loss


class CrossEntropy(torch.autograd.Function):
    """logits (N, V), labels (N,) -> -log p(label) in fp32 (N,), 0 where the label is
    `ignore_index`.

    Identical to `nn.functional.cross_entropy(logits.float(), labels, reduction="none")` except: the
    gradient is computed from the logits one cache-sized piece at a time, so that neither an fp32
    copy of the logits nor their log-softmax is ever held, and it has the dtype of the logits.
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
        return (log_sum_exp - logits.gather(1, labels).float()).squeeze(1) * trained

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, trained, log_sum_exp = ctx.saved_tensors
        scale = (grad_losses * trained)[:, None]
        grad = torch.empty_like(logits)
        pieces = (tensor.split(ctx.rows) for tensor in (grad, logits, log_sum_exp, scale))
        for out, piece, total, factor in zip(*pieces, strict=True):
            torch.mul((piece.float() - total).exp_(), factor, out=out)
        return grad.scatter_add_(1, labels, -scale.to(grad.dtype)), None, None


def find_targets(labels: torch.Tensor, max_targets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, S) -> the positions in 0 .. B * S that predict a label other than -100, and these
    labels, both (max_targets,); what is left over has the label -100.

    Without waiting for a device, as `nonzero` does to learn how many there are.
    """
    targets = pad(labels[:, 1:], (0, 1), value=-100).flatten()
    last = len(targets) - 1  # the end of a row, which predicts nothing
    positions = (targets != -100).nonzero_static(size=max_targets, fill_value=last).squeeze(1)
    return positions, targets[positions]


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> torch.Tensor:
    """Identical to the library's ForCausalLMLoss except: `CrossEntropy`, for less memory and
    time."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    losses = CrossEntropy.apply(logits.view(-1, vocab_size), shift_labels, ignore_index)
    return losses.sum() / num_items_in_batch
