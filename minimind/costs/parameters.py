"""The parameters of a model, from its configuration alone.

The model is built on the meta device, which allocates nothing, so that parameters, adapters and
tied weights are those of the real model.
"""

import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from minimind import MiniMindConfig
from minimind.common.errors import UserError
from minimind.stage_directory import auto_class, loading_errors


def empty_model(
    config: MiniMindConfig, adapter: PeftConfig | None = None
) -> PreTrainedModel | PeftModel:
    """The model on the meta device; with an adapter, as peft wraps it.

    Raises:
        UserError: no model can be built from the configuration, or the adapter does not fit it.
    """
    with loading_errors(Path(config.name_or_path or "this recipe")), torch.device("meta"):
        model = auto_class(config).from_config(config)
        if adapter is None:
            return model
        targets = {
            "modules_to_save": model.named_modules(),
            "target_parameters": model.named_parameters(),
        }
        for field, named in targets.items():
            option, wanted = f"--lora_{field}", getattr(adapter, field, None)
            names = tuple(f".{name}" for name, _ in named)
            missing = [w for w in wanted or () if not any(n.endswith(f".{w}") for n in names)]
            if missing:
                raise UserError(f"{option} {' '.join(missing)}: the model has none of that name.")
        try:
            return get_peft_model(model, copy.deepcopy(adapter))
        except Exception as error:  # peft raises a different one for each option
            raise UserError(
                f"--use_peft and the options of its adapter do not fit the model: {error}"
            ) from error


def core(model: nn.Module) -> PreTrainedModel:
    """The MiniMind inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_of(model: nn.Module) -> nn.Module:
    """The layer that projects to the vocabulary, or to the score of a reward model."""
    model = core(model)
    return model.get_output_embeddings() or model.score


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: total, active, embedding and trained; a tied head counts once."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "active": active_parameters(model),
        "embedding": core(model).get_input_embeddings().weight.numel(),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token passes: of a layer's routed experts only those it visits."""
    config, named = model.config, list(model.named_parameters())
    total = sum(p.numel() for _, p in named)
    if not config.num_experts:
        return total
    routed = sum(p.numel() for name, p in named if ".experts." in name)
    return round(total - routed * (1 - config.num_experts_per_tok / config.num_experts))
