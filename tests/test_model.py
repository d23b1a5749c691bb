import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    StaticCache,
)

import minimind
from minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForSequenceClassification

PAD, EOS = 0, 2
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
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "MoE"])
def test_a_training_step_on_packed_rows_compiles_as_one_graph(experts):
    model, ids = build(num_experts=experts).train(), random_ids(2, 32)
    positions = torch.arange(16).repeat(2, 2)
    found = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        options = {"position_ids": positions, "use_cache": False, "num_items_in_batch": 60}
        loss = step(input_ids=ids, labels=ids, **options).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


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


def test_all_names_are_sorted_and_importable():
    assert minimind.__all__ == sorted(minimind.__all__)
    assert all(isinstance(getattr(minimind, name), type) for name in minimind.__all__)
