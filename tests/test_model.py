import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    StaticCache,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import minimind
from minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindForSequenceClassification,
    MiniMindModel,
)
from minimind.model import kernels_minimind

PAD, EOS = 0, 2
CODE = {"configuration_minimind.py", "kernels_minimind.py", "modeling_minimind.py"}
SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPES = {
    "MHA": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "GQA": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "MQA": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    "one layer, untied": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "other eps and theta": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "YaRN": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
}


def build(seed=0, **fields):
    """A model whose every weight matters: norms are not all ones, and the attention is not flat."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(
        MiniMindConfig(**{**SIZE, **SHAPES["GQA"], "max_position_embeddings": 128, **fields})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model.eval()


def random_ids(*shape, seed=1):
    return torch.randint(
        3, SIZE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed)
    )


def shifted_cross_entropy(logits, labels, num_items=None):
    """The oracle: -log p(the next token), token by token, over the positions that are trained."""
    losses = [
        -row[position].log_softmax(-1)[target[position + 1]]
        for row, target in zip(logits, labels, strict=True)
        for position in range(len(target) - 1)
        if target[position + 1] != -100
    ]
    return torch.stack(losses).sum() / (num_items or len(losses))


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def assert_gradients_equal(actual, expected):
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"the oracle has no gradient for {name}"
        torch.testing.assert_close(
            actual[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def trained():
    return build().train()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("qk_norm", "twin_config", "twin_class"),
    [(True, Qwen3Config, Qwen3ForCausalLM), (False, LlamaConfig, LlamaForCausalLM)],
    ids=["Qwen3", "Llama"],
)
def test_logits_are_those_of_the_library_twin_for_the_same_weights(
    qk_norm, twin_config, twin_class, shape, attention
):
    model = build(qk_norm=qk_norm, attn_implementation=attention, **SHAPES[shape])
    same = {
        name: getattr(model.config, name)
        for name in (*SIZE, "num_attention_heads", "num_key_value_heads")
    }
    same |= {
        name: getattr(model.config, name)
        for name in ("head_dim", "rms_norm_eps", "tie_word_embeddings")
    }
    twin = twin_class(
        twin_config(
            **same,
            max_position_embeddings=128,
            rope_parameters=dict(model.config.rope_parameters),
            attn_implementation=attention,
        )
    ).eval()
    twin.load_state_dict(model.state_dict())
    ids = random_ids(3, 17)
    padded = torch.ones_like(ids)
    padded[1, :5] = padded[2, :11] = 0
    for mask in (None, padded):
        with torch.no_grad():
            actual, expected = (
                model(ids, attention_mask=mask).logits,
                twin(ids, attention_mask=mask).logits,
            )
        seen = padded.bool() if mask is not None else torch.ones_like(ids).bool()
        assert expected.std() > 0.5
        torch.testing.assert_close(actual[seen], expected[seen], atol=1e-5, rtol=0)


def left_padding_mask(ids):
    mask = torch.ones_like(ids)
    mask[1, :140] = 0
    return mask


def two_documents_mask(ids):
    """(B, 1, S, S), causal and block-diagonal: True where a token sees another."""
    document = torch.arange(ids.shape[1]) >= 170
    return (document[:, None] == document) & torch.ones(
        ids.shape[1], ids.shape[1], dtype=torch.bool
    ).tril()


MASKS = {
    "none": lambda ids: None,
    "left padding": left_padding_mask,
    "two documents": lambda ids: two_documents_mask(ids).expand(len(ids), 1, -1, -1),
    "both ways": lambda ids: torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [128, 129, 300])
def test_attention_in_blocks_gives_the_logits_and_gradients_of_eager_attention(mask, length):
    """Lengths of one block of queries, one and a bit, and several; masks that let tokens see less,
    or more."""
    ids, found = random_ids(2, length), []
    mask = MASKS[mask](ids)
    seen = torch.ones_like(ids).bool() if mask is None or mask.ndim == 4 else mask.bool()
    for attention in ("eager", "sdpa"):
        model = build(attn_implementation=attention, max_position_embeddings=512).train()
        # A mask of shape (B, 1, S, S) goes to the layers as it is; eager attention adds it to the
        # weights.
        given = mask
        if attention == "eager" and mask is not None and mask.ndim == 4:
            given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float).min)
        logits = model(ids, attention_mask=given, use_cache=False).logits
        logits[seen].square().mean().backward()
        found.append((logits[seen].detach(), gradients(model)))
    (expected_logits, expected), (logits, actual) = found
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    assert_gradients_equal(actual, expected)


def test_attention_in_blocks_drops_probabilities_in_training_and_keeps_their_mean():
    layer = build(attention_dropout=0.25).model.layers[0].self_attn
    # Flat attention to ones: each output is 1
    query, value = torch.zeros(2, 4, 200, 8), torch.ones(2, 2, 200, 8)

    def outputs():
        return kernels_minimind.blocked_attention_forward(
            layer.train(), query, value, value, None, 1.0, dropout=p
        )[0]

    torch.manual_seed(0)
    p = 0.25
    # The first token sees itself alone
    assert outputs()[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert outputs().mean() == pytest.approx(1, abs=0.02)
    p = 0.0
    torch.testing.assert_close(outputs(), torch.ones(2, 200, 4, 8))


def test_hidden_dropout_acts_in_training_only():
    model, ids = build(hidden_dropout=0.5), random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, build()(ids).logits)
        assert not torch.allclose(model.train()(ids).logits, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_eager_attention_gives_the_logits_of_sdpa(shape):
    eager, sdpa = (build(attn_implementation=name, **SHAPES[shape]) for name in ("eager", "sdpa"))
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :6] = 0
    with torch.no_grad():
        left, right = eager(ids, attention_mask=mask).logits, sdpa(ids, attention_mask=mask).logits
    torch.testing.assert_close(left[mask.bool()], right[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_step_by_step_with_the_cache_gives_the_logits_of_one_forward(shape):
    model, ids, cache, steps = build(**SHAPES[shape]), random_ids(2, 20), None, []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for start, end in [(0, 7), *((i, i + 1) for i in range(7, 20))]:
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


def test_only_the_last_logits_are_computed_on_demand():
    model, ids = build(), random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@pytest.mark.parametrize("qk_norm", [True, False])
def test_greedy_generation_of_a_left_padded_batch_is_that_of_each_prompt_alone(qk_norm):
    model = build(seed=1, qk_norm=qk_norm)
    prompts = [random_ids(1, length, seed=length) for length in (3, 11, 7)]
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    alone = [
        model.generate(p, attention_mask=torch.ones_like(p), **options)[0, p.shape[1] :]
        for p in prompts
    ]
    assert all(len(set(tokens.tolist())) > 3 for tokens in alone)
    ids = torch.full((3, 11), PAD)
    for row, prompt in zip(ids, prompts, strict=True):
        row[11 - prompt.shape[1] :] = prompt
    together = model.generate(ids, attention_mask=(ids != PAD).long(), **options)[:, 11:]
    assert together.tolist() == [tokens.tolist() for tokens in alone]


def test_generation_with_a_static_cache_gives_the_tokens_of_a_dynamic_one():
    model, prompt = build(seed=1), random_ids(2, 7)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 12}
    expected = model.generate(prompt, **options)
    assert model.generate(
        prompt, **options, cache_implementation="static", disable_compile=True
    ).equal(expected)


def test_a_smaller_model_drafts_for_a_larger_one_without_changing_its_tokens():
    model, draft = build(seed=1), build(seed=2, num_hidden_layers=1)
    prompt = random_ids(1, 7)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 16}
    expected = model.generate(prompt, **options)
    assert model.generate(prompt, **options, assistant_model=draft).equal(expected)
    # A draft that is always right
    assert model.generate(prompt, **options, assistant_model=model).equal(expected)


# Torch 2.13, of its own compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "MoE"])
def test_a_decoding_step_compiles_as_one_graph_on_a_static_cache(experts):
    model, ids = build(num_experts=experts), random_ids(1, 12)
    step = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        whole = model(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(ids[:, :10], past_key_values=cache)
        for position in (10, 11):
            position_ids = torch.tensor([[position]])
            logits = step(
                ids[:, position : position + 1], past_key_values=cache, position_ids=position_ids
            ).logits
            torch.testing.assert_close(logits[:, 0], whole[:, position], atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_sequence_scores_are_those_of_the_library_twin_at_the_last_token_before_padding(padding):
    torch.manual_seed(0)
    config = MiniMindConfig(**SIZE, **SHAPES["GQA"], num_labels=1)
    model = MiniMindForSequenceClassification(config).eval()
    names = (
        *SIZE,
        *SHAPES["GQA"],
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "pad_token_id",
        "num_labels",
    )
    twin = Qwen3ForSequenceClassification(
        Qwen3Config(**{name: getattr(config, name) for name in names})
    ).eval()
    twin.load_state_dict(model.state_dict())
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    columns = slice(None, 4) if padding == "left" else slice(5, None)
    mask[1, columns] = 0
    ids = ids * mask
    with torch.no_grad():
        scores = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(scores, twin(ids, attention_mask=mask).logits, atol=1e-6, rtol=0)
        alone = model(ids[1:2][mask[1:2].bool()][None]).logits
    torch.testing.assert_close(scores[1:2], alone, atol=1e-5, rtol=0)
    assert scores.shape == (3, 1)


@pytest.mark.parametrize("num_items", [None, 5, 40])
def test_the_loss_is_the_cross_entropy_of_the_next_token(trained, num_items):
    labels = random_ids(3, 8)
    labels[0, :4] = labels[2, 6:] = -100
    num_items_in_batch = None if num_items is None else torch.tensor(num_items)
    output = trained(random_ids(3, 8), labels=labels, num_items_in_batch=num_items_in_batch)
    torch.testing.assert_close(output.loss, shifted_cross_entropy(output.logits, labels, num_items))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 7])
def test_the_loss_and_its_gradient_are_those_of_the_library_piece_by_piece(
    monkeypatch, num_items, dtype
):
    # 16 rows in pieces of 3
    monkeypatch.setattr(kernels_minimind, "PIECE", {True: 3 * 97, False: 3 * 97})
    logits = torch.randn(2, 8, 97, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    labels = random_ids(2, 8)
    labels[0, 2:5] = labels[1, 7] = -100
    found = []
    for function in (kernels_minimind.causal_lm_loss, ForCausalLMLoss):
        leaf = logits.clone().requires_grad_()
        loss = function(logits=leaf, labels=labels, vocab_size=97, num_items_in_batch=num_items)
        (3 * loss).backward()
        found.append((loss.detach(), leaf.grad))
    (loss, grad), (expected_loss, expected_grad) = found
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad, expected_grad)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype


def test_a_label_of_minus_100_is_ignored_and_the_first_label_is_nobodys_target(trained):
    ids = random_ids(2, 8)
    labels = ids.clone()
    labels[:, 5] = -100
    other = labels.clone()
    other[:, 0] = 7
    losses = [trained(ids, labels=given).loss for given in (ids, labels, other)]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


@pytest.mark.parametrize("token", [PAD, EOS])
def test_the_pad_and_the_end_token_are_trained_wherever_they_are_labels(trained, token):
    ids = random_ids(1, 6)
    labels = torch.full_like(ids, -100)
    labels[0, 4] = token
    output = trained(ids, labels=labels)
    torch.testing.assert_close(output.loss, -output.logits[0, 3].log_softmax(-1)[token])


def test_four_accumulated_rows_give_the_gradients_of_one_batch_of_four(trained):
    ids = random_ids(4, 10)
    labels = ids.clone()
    # Rows with 9, 1, 6 and 3 targets: a mean of means would differ
    for row, ignored in enumerate((0, 8, 3, 6)):
        labels[row, 1 : 1 + ignored] = -100
    num_items = (labels[:, 1:] != -100).sum()
    assert num_items == 9 + 1 + 6 + 3
    trained(ids, labels=labels).loss.backward()
    expected = gradients(trained)
    for row in range(4):
        trained(
            ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=num_items
        ).loss.backward()
    assert_gradients_equal(gradients(trained), expected)


def test_gradient_checkpointing_recomputes_each_layer_and_gives_equal_gradients(trained):
    ids, calls = random_ids(2, 12), []
    for layer in trained.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trained(ids, labels=ids, use_cache=False).loss.backward()
    expected, plain = gradients(trained), len(calls)
    trained.activation_checkpointing_enable()
    trained(ids, labels=ids, use_cache=False).loss.backward()
    assert len(calls) - plain == 2 * plain
    assert_gradients_equal(gradients(trained), expected)


@pytest.mark.parametrize(
    "lengths", [((5, 9, 2), (4, 4, 8)), ((70, 3, 90), (100, 61, 2))], ids=["short", "in blocks"]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_give_the_logits_and_gradients_of_separate_ones(attention, lengths):
    model = build(attn_implementation=attention).train()
    rows = [[random_ids(1, n, seed=n) for n in row] for row in lengths]
    documents = [document for row in rows for document in row]
    num_items = torch.tensor(sum(document.shape[1] - 1 for document in documents))
    separate = []
    for document in documents:
        output = model(document, labels=document, use_cache=False, num_items_in_batch=num_items)
        output.loss.backward()
        separate.append(output.logits.detach())
    expected = gradients(model)

    ids = torch.cat([torch.cat(row, 1) for row in rows])
    positions = torch.stack(
        [torch.cat([torch.arange(document.shape[1]) for document in row]) for row in rows]
    )
    labels = ids.masked_fill(positions == 0, -100)
    output = model(
        ids, position_ids=positions, labels=labels, use_cache=False, num_items_in_batch=num_items
    )
    output.loss.backward()
    packed = torch.cat(list(output.logits.detach()))
    torch.testing.assert_close(packed, torch.cat(separate, 1)[0], atol=1e-5, rtol=0)
    assert_gradients_equal(gradients(model), expected)


# What transformers 5.23 and torch 2.13 warn of in one another when flex_attention compiles its
# mask.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"qk_norm": False},
        {"attention_bias": True},
        {"rope_parameters": SHAPES["YaRN"]["rope_parameters"]},
        {"num_experts": 4},
        {"num_experts": 4, "num_experts_per_tok": 1, "n_shared_experts": 1},
    ],
    ids=["qk_norm", "no qk_norm", "biases", "YaRN", "MoE", "MoE, shared"],
)
def test_on_every_back_end_each_variant_keeps_packed_documents_apart(variant, attention):
    """Forward alone: flex_attention has no backward on a CPU. Flash attention needs a GPU:
    tests/test_gpu.py."""
    documents = [random_ids(1, n, seed=n) for n in (60, 100)]
    with torch.no_grad():
        separate = [
            build(attn_implementation="eager", **variant)(document).logits for document in documents
        ]
        positions = torch.cat([torch.arange(60), torch.arange(100)])[None]
        model = build(attn_implementation=attention, **variant)
        packed = model(torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_three_adamw_steps_move_every_parameter(qk_norm, tied):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(**SIZE, **SHAPES["GQA"], qk_norm=qk_norm, tie_word_embeddings=tied)
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        ids = random_ids(4, 16, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ] == []


@pytest.mark.parametrize("tied", [True, False])
def test_lm_head_is_written_only_where_it_is_not_tied(tmp_path, tied):
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) == (not tied)
    assert names | {"lm_head.weight"} == set(model.state_dict())


@pytest.mark.parametrize(
    "shape", ["wide heads", "one layer, untied", "other eps and theta", "YaRN"]
)
def test_from_pretrained_restores_the_logits_and_the_unsaved_rotary_buffers(tmp_path, shape):
    model = build(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MiniMindForCausalLM
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    ids = random_ids(2, 11)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_rotary_frequencies_are_powers_of_theta_after_from_pretrained(tmp_path):
    build(
        head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
    ).save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        loaded.model.rotary_emb.inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.001])
    )


@pytest.mark.parametrize("part", ["config", "base model", "causal model"])
def test_every_class_saves_the_code_and_the_names_for_all_auto_classes(tmp_path, part):
    model = build()
    {"config": model.config, "base model": model.model, "causal model": model}[
        part
    ].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_minimind.MiniMindConfig",
        "AutoModel": "modeling_minimind.MiniMindModel",
        "AutoModelForCausalLM": "modeling_minimind.MiniMindForCausalLM",
        "AutoModelForSequenceClassification": "modeling_minimind.MiniMindForSequenceClassification",
    }
    if part != "config":
        assert {file.name for file in tmp_path.iterdir()} >= CODE


STRANGER = """
import sys
sys.modules["minimind"] = None  # importing it raises ModuleNotFoundError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification

trusted = {"trust_remote_code": True}
ids = torch.load("ids.pt")
with torch.no_grad():
    config = AutoConfig.from_pretrained("saved", **trusted)
    model = AutoModelForCausalLM.from_pretrained("saved", **trusted)
    base = AutoModel.from_pretrained("saved", **trusted)
    scorer = AutoModelForSequenceClassification.from_pretrained("scorer", **trusted)
    model.save_pretrained("again")
    reloaded = AutoModelForCausalLM.from_pretrained("again", **trusted)
    names = [type(thing).__name__ for thing in (config, model, base, reloaded)]
    results = {"names": names, "model": model(ids).logits, "reloaded": reloaded(ids).logits}
    results["scores"] = scorer(ids).logits
    results["base"] = model.lm_head(base(ids).last_hidden_state)
torch.save(results, "results.pt")
"""


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "MoE"])
def test_a_checkpoint_opens_and_saves_again_where_minimind_cannot_be_imported(tmp_path, experts):
    model, ids = build(num_experts=experts), random_ids(2, 9)
    scorer = MiniMindForSequenceClassification(model.config).eval()
    model.save_pretrained(tmp_path / "saved")
    scorer.save_pretrained(tmp_path / "scorer")
    torch.save(ids, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.pop("names") == [
        "MiniMindConfig",
        "MiniMindForCausalLM",
        "MiniMindModel",
        "MiniMindForCausalLM",
    ]
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(results.pop("scores"), scorer(ids).logits, atol=1e-6, rtol=0)
    for logits in results.values():
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    # What a stranger saved is ours again
    assert {file.name for file in (tmp_path / "again").iterdir()} >= CODE
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(loaded) is MiniMindForCausalLM


def test_the_auto_classes_build_minimind_without_remote_code(tmp_path):
    build().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MiniMindConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is MiniMindModel
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert type(scorer) is MiniMindForSequenceClassification
    assert torch.equal(scorer.model.embed_tokens.weight, build().model.embed_tokens.weight)


@pytest.mark.parametrize("name", sorted(CODE))
def test_the_files_copied_into_checkpoints_import_only_torch_the_library_and_each_other(name):
    tree = ast.parse((Path(minimind.__file__).parent / "model" / name).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        "." * node.level + node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    roots = {module if module.startswith(".") else module.split(".")[0] for module in imported}
    assert roots <= {
        "collections",
        "huggingface_hub",
        "torch",
        "transformers",
        ".configuration_minimind",
        ".kernels_minimind",
    }


def test_all_names_are_sorted_and_importable():
    assert minimind.__all__ == sorted(minimind.__all__)
    assert all(isinstance(getattr(minimind, name), type) for name in minimind.__all__)
