"""The floating-point operations of one training step, from shapes alone.

Every count is compared with torch's own in `tests/test_costs.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from minimind.costs.parameters import core, head_of
from minimind.costs.step import Step
from minimind.model.modeling_minimind import MiniMindExperts, MiniMindTopKRouter

# The products whose input is the embedding itself; the input of an adapter's second matrix is the
# output of its first.
FIRST = re.compile(r"\blayers\.0\.self_attn\.[qkv]_proj(?!.*lora_B)")


@dataclass(frozen=True)
class Product:
    """One matrix product of the model: `flops` for one position, forward."""

    name: str
    flops: float
    trained: bool  # its weight has a gradient
    layer: int | None


def products(model: nn.Module) -> Iterator[Product]:
    """The matrix products of all weights of a model; attention has no weights of its own."""
    config = model.config
    head = head_of(model)
    for name, module in model.named_modules():
        match = re.search(r"\blayers\.(\d+)\.", name)
        layer = int(match[1]) if match else None
        linear = isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer)
        weights = {}
        share = 1.0  # of the positions that pass the weight
        if module is head:
            weights = {"lm_head": module.weight}
        elif linear or isinstance(module, MiniMindTopKRouter):
            weights = {name: module.weight}
        elif isinstance(module, MiniMindExperts):
            share = config.num_experts_per_tok / config.num_experts
            parts = ("gate_up_proj", "down_proj")
            weights = {f"{name}.{part}": getattr(module, part) for part in parts}
        for key, weight in weights.items():
            yield Product(key, 2 * weight.numel() * share, weight.requires_grad, layer)


def flops(model: nn.Module, step: Step) -> dict[str, float]:
    """Floating-point operations of the matrix products of one micro-batch, forward and backward.

    "model": what the mathematics needs, by which MFU is measured (Chowdhery et al., 2022, appendix
    B): 2 for each weight and position in the forward pass, 2 for the gradient of its input, 2 for
    that of the weight if trained; for DPO also the forward pass of a reference model on the device.
    "hardware": what is executed, including what checkpointing and TRL's head compute a second time.
    """
    config = model.config
    embedding_trained = core(model).get_input_embeddings().weight.requires_grad

    # Attention: scores and weighted values, for every layer and head
    heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    attention = 4.0 * step.attended * heads * step.sequences
    forward, backward, layers, reference = attention, 2 * attention, attention, attention

    # The products of the weights
    head = last = 0.0
    for product in products(model):
        value = product.flops * step.tokens
        if product.name == "lm_head":
            # TRL leaves out the last position
            value *= (step.length - 1) / step.length if step.tiled_head else step.predicting
            head = value
        # Below the first trained weight no gradient is needed; peft computes it nevertheless where
        # layers are checkpointed.
        lowest = FIRST.search(product.name) and not embedding_trained and not step.checkpointing
        forward += value
        backward += value * (product.trained + (not lowest))
        reference += value * (".lora_" not in product.name)
        if product.layer is not None:
            layers += value
            last = value  # the layers are alike

    # What is computed a second time, or beside the model
    executed = forward + backward
    if step.tiled_head:
        executed += head  # the backward projects again
    if step.checkpointing:
        # Recomputation stops once the layer's last saved tensor exists: before its last product,
        # unless that is the experts', which save their input afterwards.
        skipped = not config.num_experts or config.n_shared_experts > 0
        executed += layers - last * config.num_hidden_layers * skipped
    if config.num_experts and config.router_aux_loss_coef and not step.pairs:
        # The load-balancing loss
        executed += 6 * config.num_hidden_layers * step.tokens * config.num_experts
    reference *= step.reference in ("copy", "adapter")
    if step.unpaired:
        reference = 2 * reference + forward
    needed = forward + backward + reference
    return {"model": needed, "hardware": executed + reference, "forward": forward}
