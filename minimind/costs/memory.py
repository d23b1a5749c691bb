"""The memory that one training step takes, from shapes alone.

What autograd keeps is counted operation by operation from `modeling_minimind.py`, and every count
is compared with the real thing in `tests/test_costs.py`.

Symbols: E hidden_size, H heads, D head_dim, A = H * D, K = key/value heads * D, I inner width.
"""

from collections import Counter
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from minimind import MiniMindConfig
from minimind.costs.parameters import core, head_of, parameter_counts
from minimind.costs.step import Step
from minimind.model.kernels_minimind import BLOCK, PIECE

DPO_TILE = 4096  # positions that TRL's head projects at a time
# Bytes of optimizer state for a trained parameter in fp32: AdamW keeps two moments, Muon one.
ADAMW, MUON = 8, 4
MUON_BATCH = 2**23  # elements of matrices that Muon orthogonalises together, at 16 bytes each


def saved_per_token(model: nn.Module, step: Step) -> dict[str, float]:
    """Bytes that autograd keeps for one position: of a "layer", of its input alone ("checkpoint"),
    of the "head".

    Copies of the weights in half precision come on top of these, see `memory`.
    """
    config = model.config
    c, cuda = step.width, step.device != "cpu"
    half, stream = c == 2, c if step.pure_half else 4
    E, H, D = config.hidden_size, config.num_attention_heads, config.head_dim
    G = config.num_key_value_heads
    A, K = H * D, G * D
    prefix = "model.layers.0."
    modules = core(model).named_modules()
    layer = {name.removeprefix(prefix): m for name, m in modules if name.startswith(prefix)}
    norms_trained = layer["input_layernorm"].weight.requires_grad

    def norm(width: int, of_stream: bool = False) -> float:
        """The input and its scale; on a GPU the input in fp32, and the normed input if the weight
        is trained. See `kernels_minimind.rms_norm`."""
        if not cuda:
            return (stream if of_stream else c) * width + 4
        fused = (of_stream and not step.pure_half) or not half
        return 4 * width + 4 + c * width * (norms_trained and not fused)

    def linears(*names: str) -> float:
        """The input that some linear layers share; each adapter casts it to its own dtype."""
        modules = [layer[name] for name in names]
        adapters = [m for m in modules if isinstance(m, BaseTunerLayer)]
        plain = any(m.weight.requires_grad for m in modules if m not in adapters)
        copies = len(adapters) if step.autocast else bool(adapters)
        ranks = sum(rank for each in adapters for rank in getattr(each, "r", {}).values())
        return c * modules[0].in_features * (copies or plain) + c * ranks

    def swiglu(prefix: str, width: int) -> float:
        """gate and up; their product is the input of down_proj."""
        inputs = linears(f"{prefix}.gate_proj", f"{prefix}.up_proj")
        return inputs + linears(f"{prefix}.down_proj") + 2 * c * width

    # Attention
    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    total = 2 * norm(E, of_stream=True) + linears(*attention)
    if config.qk_norm:
        total += norm(A) + 4 * (H - 1) + norm(K) + 4 * (G - 1)
    output = linears("self_attn.o_proj")
    if step.blocked:
        total += c * (A + 2 * K) + c * H * step.attended / step.length + output
    elif step.attention == "eager" or (cuda and not half and G < H and not step.masked):
        # In fp32 a GPU has no fused kernel for grouped queries: SDPA computes as the eager
        # attention does.
        total += c * 3 * A + (4 + c * half) * H * step.length + output
    else:  # the fused kernels keep their output, which is o_proj's input
        repeats = step.masked and step.attention == "sdpa"
        mask = c * step.length if repeats else 0
        total += c * (A + 2 * (A if repeats else K)) + max(c * A, output) + 4 * H + mask

    # Feed-forward
    if config.num_experts:
        experts, k, I = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size  # noqa: E741
        shared = config.n_shared_experts
        total += c * k * (2 * E + 3 * I) + c * k + 16 * k
        total += c * E * (half or not shared) + 4 * experts + 8 * k + 4 * (k + 1)  # the router
        if shared:
            total += swiglu("mlp.shared_experts", shared * I)
        if config.router_aux_loss_coef and not step.pairs:
            total += 4 * experts + 8 * k
    else:
        total += swiglu("mlp", config.intermediate_size)

    # Head
    head = norm(E, of_stream=True) + c * E * step.predicting
    if not step.tiled_head:
        outputs = head_of(model).weight.shape[0]
        head += (c * outputs + 13) * step.predicting
        head += 4 * outputs * step.weighted  # log-probabilities in fp32
    return {"layer": total, "checkpoint": stream * E, "head": head}


def memory(model: nn.Module, step: Step) -> dict[str, float]:
    """Bytes per device at the moment of a step that needs most, by part, and "peak", their sum;
    "host" is outside the device.

    The moments considered are the end of the forward pass, where accelerate holds the logits in
    fp32 as well, the gradient of the logits, the backward pass of each layer, and the optimizer's
    step.
    """
    config, counts = model.config, parameter_counts(model)
    layers, tokens, c, cpu = config.num_hidden_layers, step.tokens, step.width, step.device == "cpu"
    saved = {name: value * tokens for name, value in saved_per_token(model, step).items()}
    states = model_states(model, step)

    # Gradients, and the casts of the weights
    in_layer = [p for name, p in model.named_parameters() if ".layers.0." in name]
    head = head_of(model).weight
    outside = 4 * head.numel() * head.requires_grad  # the head's gradient comes first
    of_layer = sum(4 * p.numel() for p in in_layer if p.requires_grad)
    if step.zero_stage is not None:
        of_layer = outside = 0  # buffers that exist all the time
    standing = step.accumulation > 1 or step.zero_stage is not None
    before = states["gradients"] if standing else 0
    layer_casts = 2 * sum(p.numel() for p in in_layer if p.ndim > 1) * step.autocast
    head_casts = 2 * head.numel() * step.autocast * (not step.tiled_head)
    kept = saved["checkpoint"] if step.checkpointing else saved["layer"]

    # The logits: `CrossEntropy` works on pieces of them in fp32, widened, and the exponentials
    outputs = head.shape[0]
    logits = 0 if step.tiled_head else outputs * tokens * step.predicting
    piece = logits if step.weighted else min(logits, max(PIECE[cpu], outputs))
    pieces = piece * (8 if c == 2 or step.weighted else 4)
    tile = min(DPO_TILE, tokens) * min(outputs, 2**15) if step.tiled_head else 0
    working = max(tile * (c + 24 * cpu), pieces)  # on a GPU one kernel folds the tile in place
    # By scatter_add_, which a CPU computes in fp32
    widened = 4 * logits * (cpu and c == 2 and not step.weighted)
    transient = _transient(config, step) * tokens

    def moment(gradients: float, layers_left: int, casts: float, **parts: float) -> dict:
        parts |= {"gradients": gradients, "activations": kept * layers_left, "casts": casts}
        return states | parts

    # The forward pass and the loss
    casts = head_casts + layer_casts * layers
    # The casts of outputs are accelerate's, of which TRL's call has no logits
    end = saved["head"] + max(working, 4 * logits * step.autocast * (not step.pairs))
    moments = [moment(before, layers, casts, logits=end)]
    casts = head_casts + layer_casts * layers * (not step.checkpointing)
    loss = saved["head"] + c * logits + max(working, widened)
    moments.append(moment(before, layers, casts, logits=loss))

    # The backward pass, layer by layer
    temporary = transient + saved["layer"] * step.checkpointing
    for left in range(layers, 0, -1):
        gradients = before or outside + of_layer * (layers - left)
        casts = layer_casts * (1 if step.checkpointing else left)
        moments.append(moment(gradients, left, casts, temporary=temporary))

    # The embedding's own gradient is as large as the head's, to which it is added; Muon works on
    # half of the matrices of a shape, in batches.
    muon = 16 * (step.optimizer == "muon") * _largest_batch(in_layer, layers)
    embedding = 4 * counts["embedding"] * (counts["trained"] == counts["total"])
    moments.append(moment(states["gradients"], 0, 0, temporary=max(muon, embedding)))

    worst = max(moments, key=lambda parts: sum(parts.values()) - parts["host"])
    host = worst.pop("host")
    return {"logits": 0.0, "temporary": 0.0, **worst, "peak": sum(worst.values()), "host": host}


def _largest_batch(in_layer: list[nn.Parameter], layers: int) -> int:
    """Elements of the matrices that Muon orthogonalises together; see `optimizers.batches`."""
    sizes: Counter[tuple] = Counter()
    largest = 0
    for p in in_layer:
        if p.ndim > 1:
            sizes[tuple(sorted(p.shape[-2:]))] += layers * p.numel()
            largest = max(largest, p.numel())
    return max(largest, min(MUON_BATCH, max(sizes.values(), default=0)) // 2)


def evaluation_memory(model: nn.Module, step: Step, batch_size: int) -> float:
    """Bytes at the peak of an evaluation in batches of `batch_size` rows, between two steps.

    Nothing is kept for a backward pass, but all logits are, under autocast once more in fp32.
    """
    config, states = model.config, model_states(model, step)
    each = replace(step, batch_size=batch_size)
    standing = sum(value for part, value in states.items() if part not in ("host", "gradients"))
    standing += states["gradients"] * (step.zero_stage is not None)
    casts = 2 * sum(p.numel() for p in core(model).parameters() if p.ndim > 1) * step.autocast
    outputs = head_of(model).weight.shape[0]
    logits = 0 if step.tiled_head else outputs * each.tokens * step.predicting
    hidden = 2 * saved_per_token(model, each)["checkpoint"] * each.tokens
    inside = casts + hidden + max(step.width * logits, _transient(config, each) * each.tokens)
    return standing + max(inside, (step.width + 4 * step.autocast * (not step.pairs)) * logits)


def _transient(config: MiniMindConfig, step: Step) -> float:
    """Bytes per position of gradients that live only while the backward pass is in one layer."""
    c = step.width
    inner = config.intermediate_size
    if config.num_experts:
        inner = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    scores = 3 * c * config.num_attention_heads * BLOCK * step.blocked
    if step.attention == "eager":
        scores = 2 * (4 + c) * config.num_attention_heads * step.length
    return max(2 * c * inner, scores) + 12 * config.hidden_size


def model_states(model: nn.Module, step: Step) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and DPO's reference on each device, and of what is on
    the "host".

    DeepSpeed divides them among the processes as in Rajbhandari et al., 2020 (section 5): the
    optimizer's states from stage 1, gradients from 2, weights from 3.
    """
    named = list(model.named_parameters())
    total = sum(p.numel() for _, p in named)
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    muon = 0
    if step.optimizer == "muon":  # the matrices that `build_optimizer` gives to Muon
        outside = ("embed_tokens", "lm_head")
        muon = sum(
            p.numel()
            for name, p in named
            if p.ndim > 1 and p.requires_grad and not any(part in name for part in outside)
        )
    weights, gradients, optimizer = 4 * total, 4 * trained, ADAMW * (trained - muon) + MUON * muon
    buckets = 4 * trained * (step.processes > 1)  # DistributedDataParallel's, beside the gradients
    if step.zero_stage is not None:
        divided = [1 / step.processes if step.zero_stage >= stage else 1 for stage in (1, 2, 3)]
        # A master copy in fp32 beside the moments; DeepSpeed makes one also where the model itself
        # is in fp32.
        optimizer = (optimizer + 4 * trained) * divided[0]
        gradients = step.width * trained * divided[1]
        weights = step.width * total * divided[2]
        buckets = 0
    reference = weights * (step.reference == "copy")
    host = 4.0 * total * (step.reference == "host")  # in fp32, for each process
    if step.offload_optimizer:
        host, optimizer = host + optimizer + gradients, 0.0
    if step.offload_parameters and step.zero_stage == 3:
        host, weights, reference = host + weights, 0.0, 0.0
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    return parts | {"reference": reference, "buckets": buckets, "host": host}
