import pytest
import torch
from safetensors import safe_open
from test_model import SHAPES, SIZE, assert_gradients_equal, build, gradients, random_ids
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerState,
    TrainingArguments,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from minimind import MiniMindConfig
from minimind.model.modeling_minimind import MiniMindSparseMoeBlock, load_balancing_loss
from minimind.training.callbacks import RouterLoadCallback

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VARIANTS = {
    "top-1": {"num_experts_per_tok": 1},
    "top-1, normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "top-2": {},
    "top-2, not normalised": {"norm_topk_prob": False},
    "all": {"num_experts_per_tok": 4},
    "shared": {"n_shared_experts": 2},
}


def build_moe(seed=0, **fields):
    return build(seed, **{**MOE, "router_aux_loss_coef": 0.05, **fields})


def twin_of(model, implementation):
    """Qwen3-MoE with the model's weights."""
    config = model.config
    names = (
        *SIZE,
        *SHAPES["GQA"],
        *MOE,
        "norm_topk_prob",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    fields = {name: getattr(config, name) for name in names}
    twin = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**fields, rope_parameters=dict(config.rope_parameters), pad_token_id=0)
    )
    twin.load_state_dict(model.state_dict())
    twin.set_experts_implementation(implementation)
    return twin.eval()


@pytest.mark.parametrize("implementation", [None, "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "shared"])
def test_logits_and_gradients_are_those_of_qwen3_moe_for_the_same_weights(variant, implementation):
    model = build_moe(**VARIANTS[variant], router_aux_loss_coef=0.0)
    if implementation:
        model.set_experts_implementation(implementation)
    ids, found = random_ids(3, 17), []
    for each in (model, twin_of(model, "eager")):
        output = each(ids, labels=ids)
        output.loss.backward()
        found.append((output.logits.detach(), gradients(each)))
    (logits, actual), (twin_logits, expected) = found
    torch.testing.assert_close(logits, twin_logits, atol=1e-5, rtol=0)
    if variant == "top-1, normalised":  # a weight of p / p = 1 whatever the router says
        expected = {name: gradient for name, gradient in expected.items() if "mlp.gate" not in name}
    assert_gradients_equal(actual, expected)


def test_one_expert_per_token_is_not_normalised_by_default_so_that_the_loss_trains_the_router():
    assert MiniMindConfig(num_experts=4, num_experts_per_tok=1).norm_topk_prob is False
    assert MiniMindConfig(num_experts=4, num_experts_per_tok=2).norm_topk_prob is True


@pytest.mark.parametrize("implementation", ["fastest", "eager", "grouped_mm"])
def test_shared_experts_are_added_to_the_routed_ones_token_by_token(implementation):
    config = MiniMindConfig(**SIZE, **SHAPES["GQA"], **MOE, n_shared_experts=2)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = MiniMindSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden_states = torch.randn(2, 7, config.hidden_size)
    experts, shared = block.experts, block.shared_experts

    def swiglu(x, gate, up, down):
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    for row, outputs in zip(hidden_states, block(hidden_states), strict=True):
        for token, output in zip(row, outputs, strict=True):
            probabilities = (block.gate.weight @ token).softmax(-1)
            chosen = probabilities.topk(2)
            expected = swiglu(
                token, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight
            )
            for weight, e in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
                gate, up = experts.gate_up_proj[e].chunk(2)
                expected = expected + weight * swiglu(token, gate, up, experts.down_proj[e])
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_the_batch_loss_of_one_layer_is_that_of_qwen3_moe(padded):
    logits = torch.randn(15, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, :3] = mask[2, 4:] = 0
    mask = mask if padded else None
    actual = load_balancing_loss((logits,), 2, 3, mask, seq_aux=False)
    torch.testing.assert_close(actual, load_balancing_loss_func((logits,), 4, 2, mask))


def test_the_sequence_loss_is_the_mean_of_each_sequences_loss_and_both_are_means_over_layers():
    layers = tuple(torch.randn(3, 15, 4, generator=torch.Generator().manual_seed(0)))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 2:] = 0
    sequences = [
        load_balancing_loss_func((layer.view(3, 5, 4)[row],), 4, 2, mask[row : row + 1])
        for layer in layers
        for row in range(3)
    ]
    actual = load_balancing_loss(layers, 2, 3, mask, seq_aux=True)
    torch.testing.assert_close(actual, torch.stack(sequences).mean())
    batch = [load_balancing_loss_func((layer,), 4, 2, mask) for layer in layers]
    torch.testing.assert_close(
        load_balancing_loss(layers, 2, 3, mask, seq_aux=False), torch.stack(batch).mean()
    )


@pytest.mark.parametrize("seq_aux", [False, True])
def test_a_perfectly_balanced_router_has_the_least_loss_top_k_and_a_collapsed_one_more(seq_aux):
    # Two rows of four tokens, each token its own expert
    balanced = torch.eye(4).repeat(2, 1) * 1e-3
    collapsed = torch.tensor([9.0, 0, 0, 0]).expand(8, 4)
    torch.testing.assert_close(
        load_balancing_loss((balanced,), 1, 2, None, seq_aux), torch.tensor(1.0), atol=1e-3, rtol=0
    )
    assert load_balancing_loss((collapsed,), 1, 2, None, seq_aux) > 3.9


def test_the_training_loss_adds_the_weighted_router_loss_and_the_evaluation_loss_does_not():
    model = build_moe(seq_aux=True)
    ids = random_ids(2, 9)
    evaluated = model(ids, labels=ids)
    torch.testing.assert_close(
        evaluated.loss, cross_entropy(evaluated.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    assert evaluated.aux_loss is None
    trained = model.train()(ids, labels=ids)
    aux_loss = model(ids, output_router_logits=True).aux_loss
    assert trained.router_logits is None
    torch.testing.assert_close(trained.loss, evaluated.loss + 0.05 * aux_loss)
    torch.testing.assert_close(trained.aux_loss, aux_loss)


@pytest.mark.parametrize("seq_aux", [False, True])
def test_padding_changes_neither_the_loss_nor_the_router_loss_of_the_other_tokens(seq_aux):
    model, ids = build_moe(seq_aux=seq_aux).train(), random_ids(2, 9)
    alone = model(ids, labels=ids)
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 5, dtype=torch.long)], dim=1)
    labels = padded.masked_fill(mask == 0, -100)
    for given in (mask, None):  # without a mask, as in packed rows, the padding token tells
        output = model(padded, attention_mask=given, labels=labels)
        torch.testing.assert_close(output.aux_loss, alone.aux_loss)
        torch.testing.assert_close(output.loss, alone.loss)


@pytest.mark.parametrize("parts", [4, 2], ids=["4 x 1", "2 x 2"])
def test_the_router_loss_counts_once_however_the_batch_is_cut(parts):
    """The gradient of the sum over parts is the mean of the parts' router losses by their trained
    tokens."""
    model, ids = build_moe(seq_aux=True).train(), random_ids(4, 10)
    labels = ids.clone()
    num_items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels, num_items_in_batch=num_items).loss.backward()
    expected = gradients(model)
    for part in ids.chunk(parts):
        model(part, labels=part, num_items_in_batch=num_items).loss.backward()
    assert_gradients_equal(gradients(model), expected)


def test_gradient_checkpointing_keeps_the_gradient_of_the_router_loss():
    model, ids = build_moe().train(), random_ids(2, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert_gradients_equal(gradients(model), expected)


@pytest.mark.parametrize("variant", ["top-1", "shared"])
def test_a_file_holds_one_tensor_per_expert_and_gives_the_same_logits(tmp_path, variant):
    model, ids = build_moe(**VARIANTS[variant]), random_ids(2, 9)
    # As stages save, with a gathered state dict
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {
            name.removeprefix("model.layers.0.mlp.")
            for name in file.keys()  # noqa: SIM118, it is no dict
            if "layers.0.mlp" in name
        }
    shared = (
        {f"shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")}
        if variant == "shared"
        else set()
    )
    each = {f"experts.{e}.{p}_proj.weight" for e in range(4) for p in ("gate", "up", "down")}
    assert names == {"gate.weight"} | each | shared
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_router_loads_are_the_shares_of_the_visits_in_training_since_the_last_log():
    model = build_moe(num_experts_per_tok=1).train()
    callback, args, state = (
        RouterLoadCallback(model),
        TrainingArguments(report_to="none"),
        TrainerState(),
    )
    callback.on_train_begin(args, state, None)
    batches = [random_ids(2, 9, seed=seed) for seed in (1, 2)]
    visits = torch.zeros(2, 4)
    for batch in batches:
        logits = model(batch, output_router_logits=True).router_logits
        visits += torch.stack([layer.argmax(-1).bincount(minlength=4) for layer in logits])
    with torch.no_grad():
        model.eval()(batches[0])  # an evaluation does not count
    logs = {"loss": 1.0}
    callback.on_log(args, state, None, logs=logs)
    for layer in range(2):
        actual = [logs[f"router_load/layer_{layer}/expert_{e}"] for e in range(4)]
        torch.testing.assert_close(
            torch.tensor(actual), visits[layer] / visits[layer].sum(), atol=1e-4, rtol=0
        )
    assert logs["router_load/max"] == pytest.approx((visits / 18 / 2).max().item(), abs=1e-4)
    model.train()(batches[1])
    again = {"loss": 1.0}
    callback.on_log(args, state, None, logs=again)
    assert sum(again[f"router_load/layer_0/expert_{e}"] for e in range(4)) == pytest.approx(
        1, abs=1e-3
    )
    callback.on_train_end(args, state, None)
    model(batches[1])
    assert not any(visits.any() for visits in callback.visits)
