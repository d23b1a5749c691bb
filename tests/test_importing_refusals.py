"""Checkpoints that cannot be imported are refused with the reason, and nothing is written."""

import json
import os

import pytest
import torch
from pipeline import failure, run_cli
from published import HIDDEN, VOCAB, Published, library_model


class Code:
    """Unpickled, it would make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def refused(tmp_path, capsys):
    """Import what must be refused: return the message, and see that nothing was written."""

    def run(source, *options, out=None):
        message = failure(capsys, run_cli, "import", source, out or tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*partial"))
        return message

    return run


@pytest.fixture
def saved(tmp_path):
    """Save any object as a .pth file."""

    def save(value):
        torch.save(value, tmp_path / "a.pth")
        return tmp_path / "a.pth"

    return save


def said(message, *words):
    for word in words:
        assert str(word) in message, message


def test_all_tensors_that_do_not_fit_are_named(refused, tmp_path):
    published = Published("3")
    del published.tensors["model.layers.1.self_attn.v_proj.weight"]
    published.tensors["model.layers.0.mlp.extra.weight"] = torch.ones(2, 2)
    published.tensors["model.norm.weight"] = torch.ones(3)
    said(
        refused(published.folder(tmp_path / "source")),
        *(
            "1 missing: model.layers.1.self_attn.v_proj.weight",
            "1 unexpected: model.layers.0.mlp.extra.weight",
        ),
        "1 of another shape: model.norm.weight (3,) instead of (64,)",
    )


def test_a_missing_expert_is_named(refused, saved):
    tensors = Published("2", moe=True).tensors
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    said(refused(saved(tensors)), "1 missing: model.layers.1.mlp.experts.2.up_proj.weight")


def test_long_lists_are_cut_with_their_number(refused, saved):
    tensors = Published("3").tensors
    short = {
        name: tensor
        for name, tensor in tensors.items()
        if "layers.1" not in name or "q_proj" in name
    }
    said(refused(saved(short)), "10 missing", "and 4 more")


def test_a_configuration_of_another_size_is_refused(refused, tmp_path):
    message = refused(
        Published("3").folder(tmp_path / "source", num_hidden_layers=3, intermediate_size=96)
    )
    said(message, "11 missing: model.layers.2", "mlp.down_proj.weight (64, 48) instead of (64, 96)")


def test_code_in_a_pickle_is_refused_and_not_run(refused, saved, tmp_path):
    message = refused(saved({"model.norm.weight": Code(tmp_path / "made")}))
    said(message, "a.pth", "mkdir", "never run", "torch.save(model.state_dict()")
    assert "weights_only" not in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.ones(2)], ["holds a list", "expected a state dict"]),
        ({}, ["expected a state dict"]),
        ({"epoch": 3}, ["'epoch' is a int"]),
        ({"a.weight": torch.ones(2)}, ["unknown layout", "self_attn.q_proj", "found a.weight"]),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.ones(2).char()},
            ["no floating-point numbers"],
        ),
    ],
    ids=["list", "empty", "number", "names", "quantised"],
)
def test_a_file_that_is_no_state_dict_of_a_known_layout(refused, saved, value, words):
    said(refused(saved(value)), "a.pth", *words)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1"], ids=["empty", "pointer"]
)
def test_a_damaged_file(refused, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    said(refused(tmp_path / name), name)


def test_paths_that_hold_no_checkpoint(refused, tmp_path):
    said(refused(tmp_path / "nowhere"), "nowhere does not exist")
    (tmp_path / "folder").mkdir()
    said(refused(tmp_path / "folder"), "has no config.json", ".pth file itself")
    source = Published("3").folder(tmp_path / "source")
    (source / "pytorch_model.bin").unlink()
    said(refused(source), "has no weights", "model.safetensors or pytorch_model.bin")
    (source / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "part1.safetensors"}}'
    )
    said(refused(source), "part1.safetensors: no such file")
    (source / "config.json").write_text("{")
    said(refused(source), "config.json: not JSON")


def test_a_destination_that_is_not_empty_is_left_as_it_is(refused, tmp_path, saved):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    said(refused(saved({}), out=tmp_path / "full"), "full exists and is not empty")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("generation", "field", "value", "words"),
    [
        ("2", "model_type", "gpt2", ["'gpt2'", "minimind, minimind-v, llama, qwen3, qwen3_moe"]),
        ("2", "scoring_func", "sigmoid", ["'sigmoid'", "softmax"]),
        ("2", "routed_scaling_factor", 2.5, ["2.5", "not scaled"]),
        ("2", "n_group", 4, ["4", "among all experts"]),
        ("2", "hidden_act", "maxout", ["'maxout'", "activation"]),
        ("2", "use_memory", True, ["True", "no published MiniMind has"]),
        ("2", "hidden_size", "64", ["expected int"]),
        (
            "2",
            "inference_rope_scaling",
            True,
            ["rope_scaling", "autumn 2025", "inference_rope_scaling to false"],
        ),
        ("2", "quantization_config", {"bits": 4}, ["not quantised"]),
        ("2", "num_attention_heads", 7, ["num_attention_heads (7)"]),
    ],
)
def test_a_minimind_that_cannot_be_expressed(refused, tmp_path, generation, field, value, words):
    config = {field: value}
    if field == "inference_rope_scaling":
        config["rope_scaling"] = {"type": "yarn", "factor": 4, "beta_fast": 4}
    message = refused(Published(generation).folder(tmp_path / "source", **config))
    said(message, "config.json", *words)
    assert field in message or field in ("hidden_size", "inference_rope_scaling")


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("Llama", {"mlp_bias": True}, ["mlp_bias is True", "no biases"]),
        ("Llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["longrope"]),
        ("Llama", {"hidden_act": "maxout"}, ["maxout"]),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 8},
            ["sliding_window is True", "whole sequence"],
        ),
        (
            "Qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types has sliding_attention"],
        ),
        ("Qwen3-MoE", {"decoder_sparse_step": 2}, ["decoder_sparse_step is 2", "every layer"]),
        ("Qwen3-MoE", {"mlp_only_layers": [0]}, ["mlp_only_layers is [0]", "every layer"]),
        (
            "Qwen3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor"],
        ),
        ("Qwen3", {"num_hidden_layers": "two"}, ["num_hidden_layers"]),
    ],
)
def test_a_library_model_that_cannot_be_expressed(refused, tmp_path, name, config, words):
    model, _ = library_model(name)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    said(refused(tmp_path / "source"), "config.json", *words)


def test_a_head_that_is_not_the_embedding_contradicts_tied_embeddings(refused, tmp_path):
    published = Published("3", extra={"tie_word_embeddings": True})
    published.tensors["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN)
    said(
        refused(published.folder(tmp_path / "source")),
        "tie_word_embeddings is true",
        "lm_head.weight is not",
    )


def test_options_that_do_not_fit(refused, saved, tmp_path, tokenizer_dir):
    source = saved(
        {name: t[:200] if len(t) == VOCAB else t for name, t in Published("2").tensors.items()}
    )
    said(refused(source, "--num_attention_heads", 5), "num_attention_heads (5)")
    said(
        refused(source, "--tokenizer", tokenizer_dir), "the tokenizer has", "tokens, the model 200"
    )
    said(refused(source, "--tokenizer", tmp_path), "holds no tokenizer")
    said(refused(source, "--config", tmp_path / "no.json"), "no.json: no such file")
