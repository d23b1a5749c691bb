"""Nothing runs that was not asked for: code of a directory, pickles, templates, escape
sequences."""

import copy
import io
import json
import logging
import os
import resource
import shutil
import socket
import sys
import warnings
from importlib.util import find_spec
from pickle import UnpicklingError

import psutil
import pytest
import torch
import yaml
from datasets import Dataset
from rich.table import Table
from rich.text import Text

from minimind.common import launch
from minimind.common.errors import UserError, reports_user_errors
from minimind.common.language import say
from minimind.common.launch import open_meeting_point, refuse_code_in_pickles
from minimind.common.streams import json_text
from minimind.common.terminal import Terminal
from minimind.data import templates
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.conversations import Conversation
from minimind.data.sources import expand
from minimind.data.template_choice import set_chat_template
from minimind.generation import Streamer
from minimind.importing import import_checkpoint
from minimind.training.checkpoints import write_manifest
from tests.pipeline import (
    assistant,
    chat_rows,
    document_rows,
    failure,
    free_port,
    pair_rows,
    run_cli,
    run_script,
    short_run,
    user,
)

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


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
    """Code in a directory that leaves a mark when it is imported, under every name that a library
    might ask for."""
    code = (
        f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\ndef generate(*args, **kwargs):"
        " pass\n"
    )
    (directory / "custom_generate").mkdir()
    for name in (
        "evil.py",
        "configuration_minimind.py",
        "kernels_minimind.py",
        "modeling_minimind.py",
        "custom_generate/generate.py",
    ):
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
    shutil.copytree(
        directory, adapter, ignore=shutil.ignore_patterns("config.json", "model.safetensors")
    )
    config = {
        "peft_type": "LORA",
        "r": 1,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(directory),
    }
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
        assert not marker.exists(), name
        assert (
            "[y/N]" not in said.out + said.err and "trust_remote_code" not in said.out + said.err
        ), said
        assert "Traceback" not in said.out + said.err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for script, files in {
        "pretrain": "documents",
        "finetune_sft": "chats",
        "train_dpo": "pairs",
    }.items():
        options = short_run(
            tmp_path / script, model_name_or_path=directory, train_files=data[files]
        )
        message = failure(capsys, run_script, monkeypatch, script, *options)
        assert "trust_remote_code" not in message
        assert not marker.exists(), script
    if infect is not evil_tokenizer:
        assert asked.read() == "y\n" * 20


def test_a_model_of_ours_needs_no_code_of_its_directory(stage, asked, tmp_path, capsys):
    """It is loaded by the package's classes whatever its directory names and holds, and exported
    with its code."""
    marker = tmp_path / "ran"
    plant(stage, marker)
    change(
        stage / "config.json",
        auto_map={"AutoConfig": "a/b--evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )
    run_cli("generate", stage, "--prompt", "the", "--max_new_tokens", 2)
    run_cli("export", stage, tmp_path / "out", "--format", "minimind")
    assert not marker.exists()
    assert "class MiniMindForCausalLM" in (tmp_path / "out" / "modeling_minimind.py").read_text()
    assert asked.read() == "y\n" * 20


def test_the_option_to_run_foreign_code_is_refused(stage, data, tmp_path, capsys, monkeypatch):
    options = short_run(
        tmp_path / "sft",
        model_name_or_path=stage,
        trust_remote_code=True,
        train_files=data["chats"],
    )
    assert "--trust_remote_code has no meaning here" in failure(
        capsys, run_script, monkeypatch, "finetune_sft", *options
    )


class Evil:
    """Pickled, it is a call."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_whose_pickles_are_calls_is_skipped_by_name_and_runs_none(
    stage, data, tmp_path, capsys, monkeypatch
):
    run, marker = tmp_path / "run", tmp_path / "ran"
    options = {"model_name_or_path": stage, "train_files": data["documents"], "block_size": 32}
    options |= {"save_strategy": "steps", "save_steps": 1}
    run_script(monkeypatch, "pretrain", *short_run(run, **options))
    (run / "stage.json").unlink()
    shutil.rmtree(run / "checkpoint-2")
    torch.save({"step": Evil(marker)}, run / "checkpoint-1" / "optimizer.pt")
    write_manifest(run / "checkpoint-1", step=1, processes=1)
    capsys.readouterr()
    run_script(monkeypatch, "pretrain", *short_run(run, **options))
    said = capsys.readouterr().out
    assert (
        "checkpoint-1: optimizer.pt cannot be read: it needs the code posix.mkdir, which is"
        " never run" in said
    )
    assert "weights_only" not in said and not marker.exists()


@needs_deepspeed
def test_deepspeed_loads_what_it_writes_and_no_code(tmp_path, monkeypatch):
    """It asks torch to run what a file holds, and this stack does not: the environment is stronger
    than the call."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    refuse_code_in_pickles()
    own, evil = tmp_path / "own.pt", tmp_path / "evil.pt"
    torch.save(
        {"loss_scaler": LossScaler(2.0), "zero_stage": ZeroStageEnum(2), "step": torch.ones(1)}, own
    )
    torch.save({"step": Evil(tmp_path / "ran")}, evil)
    assert torch.load(own, weights_only=False)["loss_scaler"].cur_scale == 2.0
    with pytest.raises(UnpicklingError):
        torch.load(evil, weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_processes_of_one_machine_meet_where_no_other_machine_reaches(monkeypatch):
    port = free_port()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "STORES", [])
    open_meeting_point()
    listening = [
        c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN
    ]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
    assert socket.if_nametoindex(os.environ["GLOO_SOCKET_IFNAME"])
    group = torch.distributed.rendezvous("env://", rank=0, world_size=1)
    store, _, _ = next(iter(group))
    store.set("key", "value")
    assert store.get("key") == b"value"
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with pytest.raises(
        UserError, match=f"port {port}, at which the processes are to meet, cannot be opened"
    ):
        open_meeting_point()


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/hosts", "", "..", "a/b.arrow", None])
def test_a_saved_dataset_reads_its_own_directory_alone(name, tmp_path, capsys):
    saved = tmp_path / "saved"
    Dataset.from_list(document_rows()).save_to_disk(str(tmp_path / "outside"))
    (tmp_path / "outside" / "data-00000-of-00001.arrow").rename(tmp_path / "outside.arrow")
    Dataset.from_list(document_rows()).save_to_disk(str(saved))
    assert expand([str(saved)]) == [saved / "data-00000-of-00001.arrow"]
    change(saved / "state.json", _data_files=[{"filename": name}])
    with pytest.raises(
        UserError, match=r"state\.json: found .*expected the name of a file in the same directory"
    ):
        expand([str(saved)])


def test_an_import_reads_the_shards_of_its_own_directory_alone(stage, tmp_path):
    shutil.move(stage / "model.safetensors", tmp_path / "outside.safetensors")
    (stage / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../outside.safetensors"}})
    )
    with pytest.raises(UserError, match="expected the name of a file in the same directory"):
        import_checkpoint(stage, tmp_path / "out")


ESCAPES = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202eright to left \r\x7f"


def is_harmless(text):
    text = text.replace("\n", "").replace("\t", "")
    return not any(ord(sign) < 32 or 127 <= ord(sign) < 160 or sign == "\u202e" for sign in text)


def test_no_text_that_is_shown_controls_the_terminal(capsys, caplog, tokenizer):
    table = Table(ESCAPES, title=ESCAPES)
    table.add_row(ESCAPES, Text(ESCAPES))
    shown = io.StringIO()
    Terminal(file=shown, width=200).print(table, ESCAPES)
    assert is_harmless(shown.getvalue()) and shown.getvalue().count("\\x1b[2J") == 5
    coloured = io.StringIO()
    Terminal(file=coloured, force_terminal=True).print("[red]a[/]")
    assert "\x1b[31m" in coloured.getvalue()

    say(ESCAPES)
    streamer = Streamer(tokenizer)
    streamer.put(torch.zeros(1, 1))  # the prompt
    streamer.put(torch.tensor(tokenizer(ESCAPES).input_ids))
    streamer.end()
    reports_user_errors(lambda: logging.getLogger("minimind").warning("%s", ESCAPES))()
    with pytest.raises(SystemExit):
        run_cli("inspect", "--" + ESCAPES, ESCAPES)
    try:
        raise ValueError(ESCAPES)
    except ValueError:
        sys.excepthook(*sys.exc_info())
    print(warnings.formatwarning(ESCAPES, UserWarning, "file", 1), file=sys.stderr)
    said = capsys.readouterr()
    assert is_harmless(said.out + said.err + caplog.text) and ESCAPES[:1] not in caplog.messages[-1]

    value = {ESCAPES: [ESCAPES, "中文\ud83d"]}
    assert (
        is_harmless(json_text(value))
        and json.loads(json_text(value)) == value
        and "中文" in json_text(value)
    )


def test_a_command_shows_names_and_data_harmless(data, tmp_path, capsys):
    rows = tmp_path / f"rows{ESCAPES}.csv"
    sign = ESCAPES.replace("\r", "")
    rows.write_text(
        f"text,{sign}\n" + "".join(f"{row['text']}{sign},1\n" for row in document_rows())
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({f"a{ESCAPES}": 1}))
    for words in (
        ("inspect", rows),
        ("inspect", rows, "--json"),
        ("plan", recipe, "--stage", "dpo"),
        ("doctor", recipe, "--stage", "dpo"),
    ):
        try:
            run_cli(*words)
        except SystemExit as stop:
            assert stop.code in (1, 2)
        said = capsys.readouterr()
        assert said.out + said.err and is_harmless(said.out + said.err), words


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "{{ 1 / 0 }}": "division by zero",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "recursion",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ 'a' * 10 ** 10 }}": "more than 2 GiB of memory",
    "{{ 'a' | center(10 ** 10) }}": "more than 2 GiB of memory",
    "{{ 9 ** (9 ** 9) }}": "a number of more than 4,096 bits",
    "{{ 'a' * 10 ** 7 }}": "writes 10,000",
    ENDLESS: "more than 1 s of the processor",
}


@pytest.mark.parametrize("program", TEMPLATES)
def test_a_template_is_bounded_whatever_it_does(program, tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1)
    hostile = copy.deepcopy(tokenizer)
    hostile.chat_template = program + tokenizer.chat_template
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError, match=TEMPLATES[program]):
        set_chat_template(hostile, None)
    assert psutil.Process().memory_info().rss - before < 2**31
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_template_that_fails_on_one_row_costs_that_row(tokenizer):
    hostile = copy.deepcopy(tokenizer)
    test = (
        "{% for message in messages %}{% if 'odd' in message.content %}{{ 1 / 0 }}{% endif %}{%"
        " endfor %}"
    )
    hostile.chat_template = test + tokenizer.chat_template
    set_chat_template(hostile, None)
    chats = [Conversation([user(text), assistant("b")]) for text in ("even", "odd")]
    even, odd = ChatEncoder(hostile).encode(chats)
    assert even.ids and "division by zero" in str(odd)
