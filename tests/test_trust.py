"""Nothing runs that was not asked for: code of a directory, pickles, templates, escape sequences."""

import io
import json
import shutil
import sys

import pytest

from tests.pipeline import chat_rows, document_rows, failure, pair_rows, run_cli, run_script, short_run


@pytest.fixture
def stage(tmp_path, model, tokenizer):
    """A directory that every command takes."""
    directory = tmp_path / "stage"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def asked(monkeypatch):
    """Standard input that answers every question with yes; returns what is left of it."""
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


def change(file, **fields):
    """Set fields of a JSON file; None takes one away."""
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def plant(directory, marker):
    """Code in a directory that leaves a mark when it is imported, under every name that a library might ask for."""
    code = f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\ndef generate(*args, **kwargs): pass\n"
    (directory / "custom_generate").mkdir()
    for name in ("evil.py", "configuration_minimind.py", "modeling_minimind.py", "custom_generate/generate.py"):
        (directory / name).write_text(code)


def evil_model(directory):
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    change(directory / "config.json", model_type="evil", auto_map=classes)
    return directory


def evil_tokenizer(directory):
    classes = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    change(directory / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=classes)
    change(directory / "config.json", model_type="minimind", auto_map=None)
    return directory


def evil_adapter(directory):
    """An adapter whose base has code of its own."""
    adapter = directory.with_name("adapter")
    shutil.copytree(directory, adapter, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": str(directory)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(evil_model(directory) / "model.safetensors", adapter / "adapter_model.safetensors")
    return adapter


def commands(directory, data):
    """Every command that reads a model or a tokenizer."""
    train = ("--train_files", data["documents"], "--max_steps", 1, "--report_to", "none")
    return {
        "chat": ("chat", directory),
        "generate": ("generate", directory, "--prompt", "a"),
        "evaluate": ("evaluate", directory, data["documents"]),
        "export": ("export", directory, directory.with_name("out"), "--format", "qwen3"),
        "merge": ("merge", directory, directory.with_name("out")),
        "prepare": ("prepare", "--model_name_or_path", directory, *train),
        "inspect": ("inspect", data["documents"], "--tokenizer", directory),
        "tokenizer evaluate": ("tokenizer", "evaluate", directory, data["documents"]),
        "plan": ("plan", data["recipe"], "--model_name_or_path", directory, *train),
        "doctor": ("doctor", data["recipe"], "--quick", "--model_name_or_path", directory, *train),
        "import": ("import", directory, directory.with_name("out")),
    }


@pytest.fixture
def data(write_jsonl, tmp_path):
    recipe = tmp_path / "recipes" / "pretrain" / "recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("block_size: 32\n")
    return {
        "documents": write_jsonl("documents.jsonl", document_rows()),
        "chats": write_jsonl("chats.jsonl", chat_rows()),
        "pairs": write_jsonl("pairs.jsonl", pair_rows()),
        "recipe": recipe,
    }


@pytest.mark.parametrize("infect", [evil_model, evil_tokenizer, evil_adapter])
def test_no_command_runs_code_of_a_directory_nor_asks_whether_to(
    infect, stage, data, asked, tmp_path, capsys, monkeypatch
):
    marker = tmp_path / "ran"
    plant(stage, marker)
    directory = infect(stage)
    for name, words in commands(directory, data).items():
        try:
            run_cli(*words)
        except SystemExit as stop:
            assert stop.code in (1, 2), name
        said = capsys.readouterr()
        print(name, said.err[-300:], file=sys.__stderr__)
        assert not marker.exists(), name
        assert "[y/N]" not in said.out + said.err and "trust_remote_code" not in said.out + said.err, said
        assert "Traceback" not in said.out + said.err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for script, files in {"pretrain": "documents", "finetune_sft": "chats", "train_dpo": "pairs"}.items():
        options = short_run(tmp_path / script, model_name_or_path=directory, train_files=data[files])
        message = failure(capsys, run_script, monkeypatch, script, *options)
        print(script, message, file=sys.__stderr__)
        assert "trust_remote_code" not in message
        assert not marker.exists(), script
    if infect is not evil_tokenizer:
        assert asked.read() == "y\n" * 20
