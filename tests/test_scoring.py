"""Log-probabilities of continuations are those of each text alone, however they are computed."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from minimind.common.errors import UserError
from minimind.evaluation import scoring
from minimind.evaluation.scoring import ModelSubject, Request, shared_rows

REQUESTS = [
    Request((2,), (40, 41, 42, 43, 44)),
    Request((2,), (40, 41, 42, 50, 51, 52)),  # branches off
    Request((2,), (40, 41, 42)),  # the beginning of another
    Request((2, 40, 41), (42, 43)),  # with another border
    Request((7, 8, 9, 10, 11), (60,)),
    Request((7, 8, 9, 10, 11), (61,)),  # the same input: letters
    Request((7, 8, 9, 10, 11), (62, 63)),
    Request((2,), (60,)),
    Request((2,), (40, 41, 42, 43, 44)),  # twice
]


def alone(model, request):
    """The oracle: one text, one batch, all logits."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        found = model(ids, use_cache=False).logits[0, -ids.shape[1] :].double().log_softmax(-1)
    start = len(request.context) - 1
    return [found[start + i, token].item() for i, token in enumerate(request.continuation)]


@pytest.fixture
def sharp(model):
    """The tiny model with weights so large that its predictions depend on every token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


@pytest.mark.parametrize("with_trees", [True, False])
@pytest.mark.parametrize("tokens", [1, 12, 2**11])
def test_scores_in_batches_and_trees_are_those_of_each_text_alone(
    sharp, tokenizer, monkeypatch, with_trees, tokens
):
    monkeypatch.setitem(scoring.LIMITS, "cpu", (tokens, 2**25))
    subject = ModelSubject(sharp, tokenizer)
    assert subject.with_trees
    subject.with_trees = with_trees
    for request, found in zip(REQUESTS, subject.log_probabilities(REQUESTS), strict=True):
        assert found.dtype == np.float64
        assert found == pytest.approx(alone(sharp, request), abs=1e-4)


def test_what_texts_share_is_computed_once():
    inputs = sorted({(*context, *rest)[:-1] for context, rest in REQUESTS})
    chains, trees = (shared_rows(inputs, with_trees) for with_trees in (False, True))
    assert sum(len(row.ids) for row in chains) == 5 + 6 + 6
    assert sum(len(row.ids) for row in trees) == 5 + 2 + 6
    assert [len(row.places) for row in trees] == [5, 2]


def test_only_the_tokens_that_predict_go_through_the_head(sharp, tokenizer, monkeypatch):
    seen = []
    sharp.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    ModelSubject(sharp, tokenizer).log_probabilities(REQUESTS[4:6])
    assert seen == [(1, sharp.config.vocab_size)]


def test_a_text_beyond_the_models_positions_is_refused(sharp, tokenizer):
    subject = ModelSubject(sharp, tokenizer)
    longest = Request((2,), (40,) * subject.max_length)
    assert len(subject.log_probabilities([longest])[0]) == subject.max_length
    with pytest.raises(UserError, match="found 258 tokens, expected at most 257"):
        subject.log_probabilities([Request((2,), (40,) * 257)])


def test_an_exports_scores_are_those_of_each_text_alone(sharp, tokenizer):
    """A library's model of the same shape, which reads the trees too; and one with a window."""
    shape = sharp.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    shape = {name: shape[name] for name in names}
    torch.manual_seed(2)
    for window in ({}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}):
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8, **window)).eval()
        subject = ModelSubject(model, tokenizer)
        assert subject.with_trees == (not window)
        for request, found in zip(REQUESTS, subject.log_probabilities(REQUESTS), strict=True):
            assert found == pytest.approx(alone(model, request), abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_scores_of_adapters_are_those_of_each_text_alone(sharp, tokenizer, kind):
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config = {
        "lora": lambda: LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"]
        ),
        "prompt": lambda: PromptTuningConfig(**virtual),
        "prefix": lambda: PrefixTuningConfig(**virtual),
    }[kind]()
    model = get_peft_model(sharp, config).eval()
    subject = ModelSubject(model, tokenizer)
    assert subject.max_length == 256 - 3 * (kind != "lora")
    for request, found in zip(REQUESTS, subject.log_probabilities(REQUESTS), strict=True):
        assert found == pytest.approx(alone(model, request), abs=1e-4)
    with model.disable_adapter():
        without = alone(model, REQUESTS[0])
    assert without != pytest.approx(alone(model, REQUESTS[0]), abs=1e-3)
