import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.training.model_arguments import load_model_config_file

FILES = sorted((Path(__file__).parents[1] / "configs" / "model").glob("*.json"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 3},
            ["num_attention_heads (8)", "num_key_value_heads (3)"],
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 8},
            ["num_attention_heads (4)", "num_key_value_heads (8)"],
        ),
        (
            {"hidden_size": 516, "num_attention_heads": 8},
            ["hidden_size (516)", "num_attention_heads (8)"],
        ),
        ({"head_dim": 63}, ["head_dim (63)", "even"]),
        ({"head_dim": -64}, ["head_dim is -64"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0, expected at least 1"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads is 0, expected at least 1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0, expected at least 1"]),
        ({"vocab_size": 0}, ["vocab_size is 0, expected at least 1"]),
        ({"hidden_size": 72, "num_attention_heads": 8}, ["head_dim (9)", "even"]),
        ({"hidden_size": "512"}, ["hidden_size", "expected int, got str", "'512'"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "expected int, got float", "2.5"]),
        ({"qk_norm": "yes"}, ["qk_norm", "expected bool, got str", "'yes'"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps", "expected float, got NoneType"]),
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            ["num_experts_per_tok (3)", "num_experts (2)"],
        ),
        (
            {"num_experts": 2, "num_experts_per_tok": 0},
            ["num_experts_per_tok is 0, expected at least 1"],
        ),
        ({"num_experts": -1}, ["num_experts is -1, expected at least 0"]),
        ({"n_shared_experts": 1}, ["n_shared_experts is 1", "num_experts is 0"]),
        (
            {"num_experts": 2, "router_aux_loss_coef": -0.1},
            ["router_aux_loss_coef is -0.1, expected at least 0"],
        ),
        ({"hidden_dropout": 1.0}, ["hidden_dropout is 1.0, expected a probability below 1"]),
        (
            {"attention_dropout": -0.1},
            ["attention_dropout is -0.1, expected a probability below 1"],
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            ["'yarn' has factor None", "at least 1", "8192"],
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            ["'linear' has factor 0.5", "at least 1"],
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": "4"}},
            ["'dynamic' has factor '4'", "at least 1"],
        ),
        (
            {"rope_parameters": {"rope_type": "yarm", "factor": 4.0}},
            ["rope_type is 'yarm'", "yarn"],
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fats": 32}},
            ["rope_parameters has beta_fats", "beta_fast"],
        ),
    ],
)
def test_an_impossible_shape_is_refused_at_construction_with_what_was_given(fields, words):
    with pytest.raises(StrictDataclassError) as caught:
        MiniMindConfig(**fields)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("fields", "derived"),
    [
        ({"hidden_size": 256, "num_attention_heads": 8}, {"head_dim": 32}),
        ({"hidden_size": 100, "num_attention_heads": 8, "head_dim": 16}, {"head_dim": 16}),
        (
            {"num_attention_heads": 6, "num_key_value_heads": None, "head_dim": 8},
            {"num_key_value_heads": 6},
        ),
        ({"hidden_size": 24}, {"intermediate_size": 64, "head_dim": None}),
        ({"hidden_size": 256}, {"intermediate_size": 704}),  # 682.7 -> 11 x 64
        ({"hidden_size": 768}, {"intermediate_size": 2048}),  # 2048 exactly
        ({"hidden_size": 776}, {"intermediate_size": 2112}),  # 2069.3 -> 33 x 64
        ({"hidden_size": 776, "intermediate_size": 7}, {"intermediate_size": 7}),
    ],
)
def test_what_is_left_out_is_derived_and_what_is_given_stays(fields, derived):
    fields = {"num_attention_heads": 4, **fields}
    config = MiniMindConfig(**fields)
    if derived.get("head_dim", 0) is None:
        derived = {**derived, "head_dim": fields["hidden_size"] // fields["num_attention_heads"]}
    assert {name: getattr(config, name) for name in derived} == derived


def test_a_saved_configuration_comes_back_equal(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 123.0}
    config = MiniMindConfig(head_dim=48, qk_norm=False, rope_parameters=rope, eos_token_id=[2, 5])
    config.save_pretrained(tmp_path)
    assert MiniMindConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def parameters(fields):
    """The oracle: what a decoder of this shape counts, from the fields alone."""
    hidden, layers = fields["hidden_size"], fields["num_hidden_layers"]
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    head = hidden // heads
    query_and_output = 2 * hidden * heads * head
    key_and_value = 2 * hidden * groups * head
    norms = 2 * hidden + 2 * head  # before attention and MLP; of queries and keys
    experts = fields.get("num_experts", 0)
    mlp = 3 * hidden * fields["moe_intermediate_size" if experts else "intermediate_size"]
    mlps = (
        (experts + fields.get("n_shared_experts", 0)) * mlp + experts * hidden if experts else mlp
    )
    layer = query_and_output + key_and_value + mlps + norms
    return 6400 * hidden + layers * layer + hidden


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_model_file_holds_known_fields_and_builds_with_the_parameters_its_shape_has(file):
    fields = load_model_config_file(str(file))
    assert set(fields) <= set(MiniMindConfig.__dataclass_fields__)
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**fields))
    assert model.config.vocab_size == 6400
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(fields)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 4.6),
        ("26m", 25.8),
        ("64m", 63.9),
        ("104m", 104.0),
        ("145m-moe", 145.0),
        ("198m-moe", 198.4),
    ],
)
def test_a_model_file_has_the_size_it_is_known_by(name, millions):
    file = next(file for file in FILES if file.stem == name)
    assert round(parameters(json.loads(file.read_text(encoding="utf-8"))) / 1e6, 1) == millions
