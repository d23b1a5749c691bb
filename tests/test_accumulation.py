"""A step has the gradients and the loss of one batch, however it is divided: into micro-batches or
among processes, and the router's loss with it; and the ends of texts keep their labels."""

import copy

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.data.packing import BlockCollator, PackedCollator

DIVISIONS = ("accumulation", "ranks", "router")


class MeanOfMeans(MiniMindForCausalLM):
    """A model that ignores num_items_in_batch, as many do."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


def tiny_config(**fields):
    """A configuration small enough for milliseconds."""
    return MiniMindConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        max_position_embeddings=64,
        **fields,
    )


def accumulation_error(model_class, config, division, across=True):
    """How far gradients and loss are from those of one batch, as a share of them, when a step is
    divided.

    "accumulation": two micro-batches whose numbers of trained tokens differ. "ranks": the same two
    on two processes, by the trainer's rule: gradients are averaged, and each loss is taken over the
    tokens of all times the number of processes or, without `across` (the trainer's
    `average_tokens_across_devices`), over its own tokens. "router": two equal micro-batches, whose
    load-balancing loss counts as much as the language's and is that of both together.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "router_aux_loss_coef"):
        config.router_aux_loss_coef = 1.0 if division == "router" else 0.0
    torch.manual_seed(0)
    model = model_class(config).train()
    ids = torch.randint(3, config.vocab_size, (4, 16))
    labels = ids.clone()
    labels[:2, 3:] = -100
    if division == "router":
        ids, labels = ids[2:].repeat(2, 1), labels[2:].repeat(2, 1)

    def run(parts, processes=1):
        model.zero_grad()
        loss = torch.zeros(1)
        for part in parts:
            counted = labels[part if processes > 1 and not across else slice(None), 1:]
            items = (counted != -100).sum()
            output = model(
                input_ids=ids[part], labels=labels[part], use_cache=False, num_items_in_batch=items
            )
            own = output.loss * (processes if across else 1) / processes
            own.backward()
            loss = loss + own.detach()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([loss, *gradients])

    whole = run([slice(None)])
    parts = run([slice(0, 2), slice(2, 4)], processes=2 if division == "ranks" else 1)
    return float((parts - whole).norm() / whole.norm())


@pytest.mark.parametrize(
    ("fields", "divisions"),
    [
        ({}, ("accumulation", "ranks")),
        ({"num_experts": 4}, DIVISIONS),
        ({"num_experts": 4, "n_shared_experts": 1, "seq_aux": True}, DIVISIONS),
    ],
)
def test_our_models_have_the_same_gradients_however_a_step_is_divided(fields, divisions):
    for division in divisions:
        assert accumulation_error(MiniMindForCausalLM, tiny_config(**fields), division) < 1e-3


def test_a_loss_that_is_not_normalised_by_tokens_would_be_found():
    assert accumulation_error(MeanOfMeans, tiny_config(), "accumulation") > 1e-3


def test_ranks_that_average_their_own_means_have_other_gradients():
    """So the doctor warns of average_tokens_across_devices: false."""
    assert accumulation_error(MiniMindForCausalLM, tiny_config(), "ranks", across=False) > 1e-3


def test_our_router_loss_counts_once_and_the_librarys_once_per_part():
    """The library's own mixture of experts has the fault (transformers issue 48690)."""
    ours = tiny_config(num_experts=4)
    assert accumulation_error(MiniMindForCausalLM, ours, "router") < 1e-4
    theirs = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    assert accumulation_error(Qwen3MoeForCausalLM, theirs, "accumulation") < 1e-4
    assert accumulation_error(Qwen3MoeForCausalLM, theirs, "router") > 0.1


def test_the_ends_of_documents_have_labels_even_where_padding_is_the_end_token():
    rows = [{"input_ids": np.array([5, 6, 2, 7, 8, 2])}, {"input_ids": np.array([5, 2, 9, 2])}]
    batch = BlockCollator(pad_token_id=2, eos_token_id=2)(rows)
    assert batch["labels"].tolist() == [[5, 6, 2, 7, 8, 2], [5, 2, 9, 2, -100, -100]]


def test_the_ends_of_replies_have_labels_even_where_padding_is_the_end_token():
    rows = [
        {"input_ids": [5, 6, 2, 7, 8, 2], "labels": [-100, -100, -100, 7, 8, 2]},
        {"input_ids": [5, 2, 9, 2], "labels": [-100, -100, 9, 2]},
    ]
    labels = PackedCollator(2)(rows)["labels"]
    assert (labels == 2).sum() == 2
