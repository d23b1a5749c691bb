"""A saved model: its tensors, its code, and what opens it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_model import SHAPES, build, random_ids
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import minimind
from minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindForSequenceClassification,
    MiniMindModel,
)

CODE = {"configuration_minimind.py", "kernels_minimind.py", "modeling_minimind.py"}


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
import os, sys
sys.modules["minimind"] = None  # importing it raises ModuleNotFoundError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification

trusted = {"trust_remote_code": True}
for directory in sys.argv[1:]:
    os.chdir(directory)
    ids = torch.load("ids.pt")
    torch.set_grad_enabled(False)
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
STRANGERS = {"dense": 0, "MoE": 4}  # their experts


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Models that a process without the package has opened and saved again."""
    root, made = tmp_path_factory.mktemp("strangers"), {}
    for name, experts in STRANGERS.items():
        directory = root / name
        model, ids = build(num_experts=experts), random_ids(2, 9)
        scorer = MiniMindForSequenceClassification(model.config).eval()
        model.save_pretrained(directory / "saved")
        scorer.save_pretrained(directory / "scorer")
        torch.save(ids, directory / "ids.pt")
        made[name] = directory, model, scorer, ids
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGER, *(root / name for name in STRANGERS)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return made


@pytest.mark.parametrize("name", STRANGERS)
def test_a_checkpoint_opens_and_saves_again_where_minimind_cannot_be_imported(strangers, name):
    directory, model, scorer, ids = strangers[name]
    results = torch.load(directory / "results.pt")
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
    assert {file.name for file in (directory / "again").iterdir()} >= CODE
    loaded = AutoModelForCausalLM.from_pretrained(directory / "again")
    assert type(loaded) is MiniMindForCausalLM


def test_the_auto_classes_build_minimind_without_remote_code(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "kernels_minimind.py").unlink()  # as in a checkpoint of the first versions
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
