"""The model. Importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from minimind.model.configuration_minimind import MiniMindConfig
from minimind.model.modeling_minimind import (
    MiniMindForCausalLM,
    MiniMindForSequenceClassification,
    MiniMindModel,
)

# exist_ok: announced already, see minimind/__init__.py
AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
AutoModel.register(MiniMindConfig, MiniMindModel)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM)
AutoModelForSequenceClassification.register(MiniMindConfig, MiniMindForSequenceClassification)

# The second registration makes each `save_pretrained` copy the model's code into the checkpoint.
# Without it, a checkpoint would name files that it does not have.
MiniMindConfig.register_for_auto_class()
MiniMindModel.register_for_auto_class("AutoModel")
MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MiniMindForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "MiniMindForSequenceClassification",
    "MiniMindModel",
]
