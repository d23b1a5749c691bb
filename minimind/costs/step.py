"""What one training step of a MiniMind computes and holds, from shapes alone.

The model is built on the meta device, which allocates nothing, so that parameters, adapters and
tied weights are the real model's. What autograd keeps is counted operation by operation from
`modeling_minimind.py`, and every count is held against the real thing in `tests/test_planning.py`.

Symbols: B rows, S length, E hidden_size, A = heads * head_dim, K = key/value heads * head_dim, I
inner width, V vocabulary.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from minimind import MiniMindConfig
from minimind.common.errors import UserError
from minimind.model.kernels_minimind import BLOCK, MAX_BLOCKED_LENGTH, PIECE
from minimind.model.modeling_minimind import MiniMindExperts, MiniMindTopKRouter
from minimind.stage_directory import loading_errors

# Tokens per parameter at which a training budget is best spent (Hoffmann et al., 2022, table 3)
CHINCHILLA = 20
DPO_TILE = 4096  # positions that TRL's head projects at a time


@dataclass(frozen=True)
class Step:
    """How a training step is run on each device.

    `length` is that of the longest row. `pairs`: each row is a preference pair, so two sequences.
    `reference`: "copy" is DPO's frozen second model, "adapter" the same model without its adapter.
    `masked`: rows come with an attention mask of their own, because they are padded or hold several
    documents. `zero_stage` None is a run without DeepSpeed.
    """

    batch_size: int
    length: int
    precision: str = "fp32"
    device: str = "cpu"
    accumulation: int = 1
    processes: int = 1
    optimizer: str = "adamw"
    checkpointing: bool = False
    attention: str = "sdpa"
    masked: bool = False
    pairs: bool = False
    reference: str | None = None
    weighted: bool = False
    zero_stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def sequences(self) -> int:
        """Sequences in one micro-batch."""
        return self.batch_size * (2 if self.pairs else 1)

    @property
    def tokens(self) -> int:
        """Positions in one micro-batch, padding included."""
        return self.sequences * self.length

    @property
    def width(self) -> int:
        """Bytes of one number in a matrix product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def pure_half(self) -> bool:
        """DeepSpeed casts the whole model; without it autocast leaves weights and residual stream
        in fp32."""
        return self.zero_stage is not None and self.precision != "fp32"

    @property
    def blocked(self) -> bool:
        """Whether the model attends in blocks, see `blocked_attention_forward`."""
        return (
            self.attention == "sdpa"
            and self.device == "cpu"
            and 1 < self.length <= MAX_BLOCKED_LENGTH
        )


def empty_model(
    config: MiniMindConfig, adapter: PeftConfig | None = None
) -> PreTrainedModel | PeftModel:
    """The model without memory, on the meta device; with an adapter, as peft wraps it.

    Raises:
        UserError: the configuration makes no model, or the adapter does not fit it.
    """
    with loading_errors(Path(config.name_or_path or "this recipe")), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if adapter is None:
            return model
        named = {
            "--lora_modules_to_save": (adapter.modules_to_save, model.named_modules()),
            "--lora_target_parameters": (adapter.target_parameters, model.named_parameters()),
        }
        for option, (asked, found) in named.items():
            names = [f".{name}" for name, _ in found]
            if missing := [
                each for each in asked or () if not any(name.endswith(f".{each}") for name in names)
            ]:
                raise UserError(f"{option} {' '.join(missing)}: the model has none of that name.")
        try:
            return get_peft_model(model, copy.deepcopy(adapter))
        except Exception as error:  # peft has its own for each option
            raise UserError(
                f"--use_peft and the --lora_... options do not fit the model: {error}"
            ) from error


def core(model: nn.Module) -> PreTrainedModel:
    """The MiniMind inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters: total, active (that one token passes), embedding, trained; without an adapter
    total is the model's.

    A tied head counts once. Of a layer's routed experts a token passes `num_experts_per_tok`.
    """
    config = model.config
    named = list(model.named_parameters())
    routed = sum(p.numel() for name, p in named if ".experts." in name)
    idle = (
        routed * (1 - config.num_experts_per_tok / config.num_experts) if config.num_experts else 0
    )
    total = sum(p.numel() for _, p in named)
    return {
        "total": total,
        "active": round(total - idle),
        "embedding": core(model).get_input_embeddings().weight.numel(),
        "trained": sum(p.numel() for _, p in named if p.requires_grad),
    }


@dataclass(frozen=True)
class Product:
    """One matrix product of the model: `flops` for one position, forward."""

    name: str
    flops: float
    trained: bool  # its weight has a gradient
    layer: int | None


def products(model: nn.Module) -> Iterator[Product]:
    """The matrix products of all weights of a model; attention has none."""
    config = model.config
    head = core(model).get_output_embeddings()
    for name, module in model.named_modules():
        found = re.search(r"\blayers\.(\d+)\.", name)
        layer = int(found[1]) if found else None
        if module is head:
            yield Product("lm_head", 2 * module.weight.numel(), module.weight.requires_grad, layer)
        elif isinstance(module, MiniMindTopKRouter) or (
            isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer)
        ):
            yield Product(name, 2 * module.weight.numel(), module.weight.requires_grad, layer)
        elif isinstance(module, MiniMindExperts):
            visited = config.num_experts_per_tok / config.num_experts
            for part in ("gate_up_proj", "down_proj"):
                weight = getattr(module, part)
                yield Product(
                    f"{name}.{part}", 2 * weight.numel() * visited, weight.requires_grad, layer
                )


def attended(step: Step) -> int:
    """Pairs of query and key that a head computes for one sequence: all, or whole blocks below the
    diagonal."""
    if not step.blocked:
        return step.length**2
    starts = range(0, step.length, BLOCK)
    return sum(
        min(BLOCK, step.length - start) * min(start + BLOCK, step.length) for start in starts
    )


def flops(model: nn.Module, step: Step) -> dict[str, float]:
    """Floating-point operations of the matrix products of one micro-batch, forward and backward.

    `model`: what the mathematics needs, by which MFU is measured (Chowdhery et al., 2022, appendix
    B): 2 for each weight and position forward, 2 for the gradient of its input, 2 for that of the
    weight if trained; for DPO also the reference model's forward. `hardware`: what is executed, so
    also what checkpointing and TRL's head compute a second time.
    """
    config = model.config
    embedding_trained = core(model).get_input_embeddings().weight.requires_grad
    attention = (
        4.0
        * attended(step)
        * config.num_attention_heads
        * config.head_dim
        * config.num_hidden_layers
    )
    attention *= step.sequences
    forward, backward, layers, reference = attention, 2 * attention, attention, attention
    head = last = 0.0
    for product in products(model):
        value = product.flops * step.tokens
        if product.name == "lm_head":
            # TRL leaves out the last position
            value *= (step.length - 1) / step.length if step.pairs else 1
            head = value
        # Below the first trained weight nothing asks for a gradient; peft asks for it where layers
        # are checkpointed.
        lowest = FIRST.search(product.name) and not embedding_trained and not step.checkpointing
        forward += value
        backward += value * (product.trained + (not lowest))
        reference += value * (".lora_" not in product.name)
        if product.layer is not None:
            layers += value
            last = value  # the layers are alike
    executed = forward + backward
    if step.pairs:
        executed += head  # the backward projects again
    if step.checkpointing:
        # Recomputation stops when the layer's last saved tensor is there: before its last product,
        # unless that is the experts', which save their input afterwards.
        executed += layers - last * config.num_hidden_layers * (
            not config.num_experts or config.n_shared_experts > 0
        )
    if config.num_experts and config.router_aux_loss_coef and not step.pairs:
        # The balance of the loads
        executed += 6 * config.num_hidden_layers * step.tokens * config.num_experts
    reference *= step.reference is not None
    return {
        "model": forward + backward + reference,
        "hardware": executed + reference,
        "forward": forward,
    }


# The products whose input is the embedding itself; an adapter's second matrix has the first as its
# input.
FIRST = re.compile(r"\blayers\.0\.self_attn\.[qkv]_proj(?!.*lora_B)")


def saved_per_token(model: nn.Module, step: Step) -> dict[str, float]:
    """Bytes that autograd keeps for one position: of a "layer", of its input alone ("checkpoint"),
    of the "head".

    Beside these, copies of the weights in half precision, see `memory`.
    """
    config = model.config
    c, cuda = step.width, step.device != "cpu"
    half, stream = c == 2, c if step.pure_half else 4
    E, H, D = config.hidden_size, config.num_attention_heads, config.head_dim
    A, K = H * D, config.num_key_value_heads * D
    named = dict(core(model).named_modules())
    layer = {
        name.removeprefix("model.layers.0."): m
        for name, m in named.items()
        if name.startswith("model.layers.0.")
    }
    norms_trained = layer["input_layernorm"].weight.requires_grad

    def norm(width: int, of_stream: bool) -> float:
        """The input in fp32, its scale, and the normed input if the weight is trained; see
        MiniMindRMSNorm."""
        fused = (of_stream and not step.pure_half) or not half
        dtype = 4 if fused else c
        return 4 * width + 4 + dtype * width * (norms_trained and not (fused and cuda))

    def linears(*names: str) -> float:
        """The input that some linear layers share: one copy in fp32, a cast for each under
        autocast."""
        modules = [layer[name] for name in names]
        adapters = [m for m in modules if isinstance(m, BaseTunerLayer)]
        keeping = [m for m in modules if m in adapters or m.weight.requires_grad]
        inputs = (
            c
            * modules[0].in_features
            * (len(keeping) if half and not step.pure_half else bool(keeping))
        )
        return inputs + sum(c * rank for adapter in adapters for rank in adapter.r.values())

    def swiglu(prefix: str, width: int) -> float:
        """gate, act(gate), up; the product of the last two is the input of down_proj."""
        inputs = linears(f"{prefix}.gate_proj", f"{prefix}.up_proj") + linears(
            f"{prefix}.down_proj"
        )
        return inputs + 3 * c * width

    attention = [f"self_attn.{name}_proj" for name in "qkv"]
    total = 2 * norm(E, of_stream=True) + linears(*attention)
    if config.qk_norm:
        total += (
            norm(A, False) + 4 * (H - 1) + norm(K, False) + 4 * (config.num_key_value_heads - 1)
        )
    out_kept = linears("self_attn.o_proj")
    if step.blocked:
        total += c * (A + 2 * K) + c * H * attended(step) / step.length + out_kept
    elif step.attention == "eager" or (
        cuda and not half and config.num_key_value_heads < H and not step.masked
    ):
        # In fp32 a GPU has no fused kernel for grouped queries: SDPA computes as the eager
        # attention does.
        total += c * 3 * A + (4 + c * half) * H * step.length + out_kept
    else:  # the fused kernels keep their output, which is o_proj's input
        repeated = A if step.masked and step.attention == "sdpa" else K
        mask = c * step.length if step.masked and step.attention == "sdpa" else 0
        total += c * (A + 2 * repeated) + max(c * A, out_kept) + 4 * H + mask
    if config.num_experts:
        k, I = config.num_experts_per_tok, config.moe_intermediate_size  # noqa: E741
        routed = c * k * (2 * E + 4 * I) + c * k + 16 * k
        router = (
            c * E * (half or not config.n_shared_experts)
            + 4 * config.num_experts
            + 8 * k
            + 4 * (k + 1)
        )
        total += router + routed
        if config.n_shared_experts:
            total += swiglu("mlp.shared_experts", config.n_shared_experts * I)
        if config.router_aux_loss_coef and not step.pairs:
            total += 4 * config.num_experts + 8 * k
    else:
        total += swiglu("mlp", config.intermediate_size)
    head = norm(E, of_stream=True) + c * E
    if not step.pairs:  # TRL's DPO never holds the logits
        head += c * config.vocab_size + 13
        head += 4 * config.vocab_size * step.weighted  # log-probabilities in fp32
    return {"layer": total, "checkpoint": stream * E, "head": head}


# Bytes of optimizer state for a trained parameter in fp32: AdamW keeps two moments, Muon one.
ADAMW, MUON = 8, 4


def memory(model: nn.Module, step: Step) -> dict[str, float]:
    """Bytes per device at the moment of a step that needs most, by part, and "peak", their sum;
    "host" lies elsewhere.

    The moments looked at are the end of the forward, where accelerate holds the logits in fp32 as
    well, the gradient of the logits, the backward of each layer, and the optimizer's step.
    """
    config, counts = model.config, parameter_counts(model)
    layers, tokens, c = config.num_hidden_layers, step.tokens, step.width
    saved = {name: value * tokens for name, value in saved_per_token(model, step).items()}
    states = model_states(model, step)
    autocast = step.precision != "fp32" and not step.pure_half
    per_layer = [p for name, p in model.named_parameters() if ".layers.0." in name]
    matrices = sum(p.numel() for p in per_layer if p.ndim > 1)
    head = core(model).get_output_embeddings().weight
    outside = 4 * head.numel() * head.requires_grad  # the head's gradient comes first
    gradient = {
        "layer": sum(4 * p.numel() for p in per_layer if p.requires_grad),
        "all": states["gradients"],
    }
    if step.zero_stage is not None:
        gradient["layer"] = outside = 0  # buffers that stand all the time
    standing = step.accumulation > 1 or step.zero_stage is not None
    casts = {
        "layer": 2 * matrices * autocast,
        "head": 2 * head.numel() * autocast * (not step.pairs),
    }
    kept = saved["checkpoint"] if step.checkpointing else saved["layer"]
    logits = 0 if step.pairs else config.vocab_size * tokens
    piece = min(logits, max(PIECE[step.device == "cpu"], config.vocab_size))
    if step.weighted:
        piece = logits
    # CrossEntropy's, in fp32: widened, and the exponentials
    pieces = piece * (8 if c == 2 or step.weighted else 4)
    tile = min(DPO_TILE, tokens) * min(config.vocab_size, 2**15) if step.pairs else 0
    tiles = tile * (c + 24 * (step.device == "cpu"))  # on a GPU one kernel folds the tile in place
    widened = (
        4 * logits * (step.device == "cpu" and c == 2 and not step.weighted)
    )  # by scatter_add_, which a CPU computes in fp32
    transient = _transient(config, step) * tokens

    def moment(
        gradients: float, layers_left: int, weight_casts: float, **parts: float
    ) -> dict[str, float]:
        parts = {
            "gradients": gradients,
            "activations": kept * layers_left,
            "casts": weight_casts,
            **parts,
        }
        return states | parts

    before = gradient["all"] if standing else 0
    all_casts = casts["layer"] * layers + casts["head"]
    held = casts["head"] + casts["layer"] * layers * (not step.checkpointing)
    moments = [
        moment(
            before,
            layers,
            all_casts,
            logits=saved["head"] + max(tiles, pieces, 4 * logits * autocast),
        ),
        moment(
            before, layers, held, logits=saved["head"] + c * logits + max(tiles, pieces, widened)
        ),
    ]
    for left in range(layers, 0, -1):
        gradients = before or outside + gradient["layer"] * (layers - left)
        one = casts["layer"] * (1 if step.checkpointing else left)
        recomputed = saved["layer"] * step.checkpointing
        moments.append(moment(gradients, left, one, temporary=transient + recomputed))
    # The embedding's own gradient is as large as the head's, to which it is added; Muon works on a
    # matrix at a time.
    step_itself = {"muon": 16}.get(step.optimizer, 0) * max(
        (p.numel() for p in per_layer), default=0
    )
    embedding = 4 * counts["embedding"] * (counts["trained"] == counts["total"])
    moments.append(moment(gradient["all"], 0, 0, temporary=max(step_itself, embedding)))
    worst = max(moments, key=lambda parts: sum(parts.values()) - parts["host"])
    host = worst.pop("host")
    return {"logits": 0.0, "temporary": 0.0, **worst, "peak": sum(worst.values()), "host": host}


def evaluation_memory(model: nn.Module, step: Step, batch_size: int) -> float:
    """Bytes at the peak of an evaluation in batches of so many rows, between two steps: nothing is
    kept for a backward, but all logits are there, under autocast once more in fp32."""
    config, states = model.config, model_states(model, step)
    each = replace(step, batch_size=batch_size)
    standing = sum(value for part, value in states.items() if part not in ("host", "gradients"))
    standing += states["gradients"] * (step.zero_stage is not None)
    autocast = step.precision != "fp32" and not step.pure_half
    casts = 2 * sum(p.numel() for p in core(model).parameters() if p.ndim > 1) * autocast
    logits = 0 if step.pairs else config.vocab_size * each.tokens
    hidden = 2 * saved_per_token(model, each)["checkpoint"] * each.tokens
    inside = casts + hidden + max(step.width * logits, _transient(config, each) * each.tokens)
    return standing + max(inside, (step.width + 4 * autocast) * logits)


def _transient(config: MiniMindConfig, step: Step) -> float:
    """Bytes per position of gradients that live only while the backward is in one layer."""
    c = step.width
    inner = config.intermediate_size
    if config.num_experts:
        inner = config.num_experts_per_tok * (config.moe_intermediate_size + config.hidden_size)
    scores = 3 * c * config.num_attention_heads * BLOCK * step.blocked
    if step.attention == "eager":
        scores = 2 * (4 + c) * config.num_attention_heads * step.length
    return max(2 * c * inner, scores) + 12 * config.hidden_size


def model_states(model: nn.Module, step: Step) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and DPO's reference on each device, and of what lies
    on the "host".

    What DeepSpeed divides among the processes is that of Rajbhandari et al., 2020 (section 5): the
    optimizer's states from stage 1, gradients from 2, weights from 3.
    """
    named = list(model.named_parameters())
    total, trained = (
        sum(p.numel() for _, p in named),
        sum(p.numel() for _, p in named if p.requires_grad),
    )
    # The matrices that optimizers.build_optimizer gives to Muon.
    inside = [
        p
        for name, p in named
        if p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
    ]
    muon = sum(p.numel() for p in inside if p.requires_grad) if step.optimizer == "muon" else 0
    weights, gradients, optimizer, host = (
        4 * total,
        4 * trained,
        ADAMW * (trained - muon) + MUON * muon,
        0.0,
    )
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
    if step.offload_optimizer:
        host, optimizer = host + optimizer + gradients, 0.0
    if step.offload_parameters and step.zero_stage == 3:
        host, weights, reference = host + weights, 0.0, 0.0
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "reference": reference,
    }
    return parts | {"buckets": buckets, "host": host}


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token passes: all, but of a layer's routed experts only those it
    visits."""
    config = model.config
    if not config.num_experts:
        return sum(p.numel() for p in model.parameters())
    idle = 1 - config.num_experts_per_tok / config.num_experts
    return round(
        sum(p.numel() * (1 - idle * (".experts." in name)) for name, p in model.named_parameters())
    )
