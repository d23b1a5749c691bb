"""transformers' common model tests over MiniMind, and over the library's models that compute the
same.

Each MiniMind class names its twin, whose results on the same tests are what it is measured by
(conftest.py).
"""

import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
    set_seed,
)
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindForSequenceClassification,
    MiniMindModel,
)

# By these tables the common tests tell which classes are given labels, and which are trained. They
# would pass over a class that is not in them without a word.
modeling_auto.MODEL_MAPPING_NAMES["minimind"] = "MiniMindModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minimind"] = "MiniMindForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["minimind"] = (
    "MiniMindForSequenceClassification"
)

SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}

# Tests of mixtures of experts. They judge by the class, which in the library is either dense or a
# mixture; MiniMind's is what its configuration says, so a dense one would be asked for experts.
OF_EXPERTS = (
    "test_eager_matches_batched_and_grouped_inference",
    "test_output_router_logits_from_config",
    "test_reverse_loading_mapping",
)


class ModelTester:
    """What the mixins ask of a model, by the names they use: its sizes, its configuration, its
    inputs."""

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, config_class, causal_lm_class, fields):
        self.config_class, self.causal_lm_class, self.fields = config_class, causal_lm_class, fields
        vars(self).update(fields)

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(
            self.vocab_size, (self.batch_size, self.seq_length), device=torch_device
        )
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.tril(torch.ones_like(ids)),
        }


class CommonTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """Every common test, over the model classes of one architecture; subclasses say which."""

    config_class = None
    all_model_classes = ()  # the base model, the causal LM, the classifier
    fields = {}  # noqa: RUF012
    twin = None
    model_tester = None
    # The mixin runs this test only over files whose licence header has a year from 2023 on; ours
    # has no such header.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        if "num_experts" not in self.fields and self._testMethodName.startswith(OF_EXPERTS):
            self.skipTest("a dense model has no experts")
        set_seed(0)
        self.model_tester = ModelTester(
            self.config_class, self.all_model_classes[1], {**SIZE, **self.fields}
        )

    def test_config(self):
        ConfigTester(self, self.config_class, **SIZE).run_common_tests()


class Qwen3(CommonTests, unittest.TestCase):
    config_class = Qwen3Config
    all_model_classes = (Qwen3Model, Qwen3ForCausalLM, Qwen3ForSequenceClassification)


class Llama(CommonTests, unittest.TestCase):
    config_class = LlamaConfig
    all_model_classes = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)


class Qwen3Moe(CommonTests, unittest.TestCase):
    config_class = Qwen3MoeConfig
    all_model_classes = (Qwen3MoeModel, Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification)
    fields = EXPERTS


class MiniMind(CommonTests, unittest.TestCase):
    config_class = MiniMindConfig
    all_model_classes = (MiniMindModel, MiniMindForCausalLM, MiniMindForSequenceClassification)
    twin = Qwen3


class MiniMindWithoutQKNorm(MiniMind):
    fields = {"qk_norm": False}  # noqa: RUF012
    twin = Llama


class MiniMindMoe(MiniMind):
    fields = EXPERTS
    twin = Qwen3Moe


class MiniMindMoeShared(MiniMind):
    fields = EXPERTS | {"n_shared_experts": 1, "seq_aux": True}
    twin = Qwen3Moe
