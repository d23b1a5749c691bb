"""The help, versions and usage errors of scripts and commands, which load next to nothing."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from pipeline import failure, run_cli, run_script

from minimind.cli import build_parser
from minimind.common.errors import UserError
from minimind.common.options import STAGE_NAMES, suggestion
from minimind.stages import STAGES
from minimind.training.command_line import parse
from minimind.training.parser import GROUPS, StageParser

ROOT = Path(__file__).parent.parent
SCRIPTS = {Path(spec.script).stem: spec.arguments for spec in STAGES.values()}


def all_commands(parser, words=()):
    """The words of every command, including those of groups of commands."""
    groups = (action for action in parser._actions if hasattr(action, "add_parser"))
    for group in groups:
        for name, command in group.choices.items():
            yield (*words, name)
            yield from all_commands(command, (*words, name))


COMMANDS = list(all_commands(build_parser()))


def printed(capsys, call, *args):
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert not stop.value.code
    return capsys.readouterr().out


def descriptions(text):
    """The options in a help, each with its description."""
    items = (
        item.partition("\n\n")[0] for item in re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
    )
    matches = (
        re.match(r"(?:-h, )?--(\w+)(?: VALUE(?: \.\.\.)?| \{.*?\})?\s+(.*)", item, re.DOTALL)
        for item in items
    )
    return {match[1]: " ".join(match[2].split()) for match in matches if match}


def own_fields(types):
    """The options that this package declares."""
    ours = [
        each
        for chosen in types
        for each in chosen.__mro__
        if each.__module__.startswith("minimind")
    ]
    hidden = {each.name for chosen in types for each in dataclasses.fields(chosen) if not each.init}
    return {name for each in ours for name in vars(each)["__annotations__"]} - hidden


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_describes_each_option_of_ours_under_the_headings(
    script, monkeypatch, capsys
):
    text = printed(capsys, run_script, monkeypatch, script, "--help")
    described = descriptions(text)
    own = own_fields(SCRIPTS[script])
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == [*GROUPS, "help"]
    assert own <= set(described)
    assert all(re.search(r"[a-z]{3}", words) for words in described.values())
    assert len(set(described) - own - {"help", "help_all", "version"}) <= 30
    assert "0.1 % of the rows" in described["on_bad_rows"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_all_of_a_script_has_every_option(script, monkeypatch, capsys):
    described = descriptions(printed(capsys, run_script, monkeypatch, script, "--help_all"))
    fields = {
        field.name
        for chosen in SCRIPTS[script]
        for field in dataclasses.fields(chosen)
        if field.init
    }
    assert set(described) == fields | {"help", "help_all", "version"}
    assert "~20% slower" in described["activation_checkpointing"]  # the library's own "%%"


def test_every_name_in_the_groups_is_an_option_of_a_stage():
    options = {action.dest for types in SCRIPTS.values() for action in StageParser(types)._actions}
    assert {name for names in GROUPS.values() for name in names} <= options


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "--help_all"])
def test_the_help_of_every_command_describes_its_options(words, option, capsys):
    text = printed(capsys, run_cli, *words, option)
    assert f"usage: minimind {' '.join(words)}" in text
    assert all(re.search(r"[a-z]{3}", words) for words in descriptions(text).values())


@pytest.mark.parametrize(
    ("words", "name"),
    [(["prepare"], "block_size"), (["plan"], "block_size"), (["doctor", "--stage", "dpo"], "beta")],
    ids=["prepare", "plan", "doctor"],
)
def test_help_all_of_a_command_that_takes_a_stages_options_has_those_too(words, name, capsys):
    assert name not in descriptions(printed(capsys, run_cli, *words, "--help"))
    assert name in descriptions(printed(capsys, run_cli, *words, "--help_all"))


def test_the_help_of_the_program_names_every_command_and_help_all_describes_them(capsys):
    text = printed(capsys, run_cli, "--help")
    assert all(f"    {words[0]} " in text or f"    {words[0]}\n" in text for words in COMMANDS)
    every = printed(capsys, run_cli, "--help_all")
    assert all(f"usage: minimind {words[0]}" in every for words in COMMANDS)


@pytest.mark.parametrize(
    "call", [run_cli, lambda *words: parse(*SCRIPTS["pretrain"], argv=words)], ids=["cli", "run"]
)
def test_the_versions_are_those_that_run(call, capsys):
    lines = printed(capsys, call, "--version").splitlines()
    # Whose local part, such as +cu130, a wheel's metadata may leave out
    build = torch.__version__.split("+")[0]
    assert {f"torch {build}", f"transformers {transformers.__version__}"} <= {
        line.split("+")[0] for line in lines
    }
    assert any(re.fullmatch(r"minimind-hf \d+\.\d+.*", line) for line in lines)


def test_the_stages_that_parsers_offer_are_those_of_the_table():
    assert tuple(STAGES) == STAGE_NAMES


LIGHT = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from minimind.cli import main
for words in {lines!r}:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code or 0
    loaded = {{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)
    print(code, loaded or "light", err.getvalue().strip())
"""


def test_help_versions_and_usage_errors_load_neither_torch_nor_transformers():
    good = [["--help"], ["--version"], ["--help_all"], *([*words, "--help"] for words in COMMANDS)]
    bad = {
        "invalid choice: 'chta'": ["chta"],
        "required: directory": ["chat"],
        "Did you mean --temperature?": ["chat", "runs/sft", "--temp", "0.5"],
        "required: RECIPE": ["plan"],
        "--device h900: expected one of": ["plan", "configs/sft/26m.yaml", "--device", "h900"],
        "--price much: expected an amount": ["plan", "configs/sft/26m.yaml", "--price", "much"],
        "--processes 0: expected at least 1": ["plan", "configs/sft/26m.yaml", "--processes", "0"],
        "invalid float value: 'many'": ["plan", "configs/sft/26m.yaml", "--tokens", "many"],
        "nowhere.yaml: cannot be read": ["plan", "nowhere.yaml"],
    }
    code = LIGHT.format(lines=[*good, *bad.values()])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[: len(good)] == ["0 light "] * len(good)
    for line, message in zip(lines[len(good) :], bad, strict=True):
        assert line.startswith("2 light error: ")
        assert message in line


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("lr", "learning_rate"),
        ("--batch-size", "per_device_train_batch_size"),
        ("epochs", "num_train_epochs"),
        ("model", "model_name_or_path"),
        ("data_path", "train_files"),
        ("wd", "weight_decay"),
        ("warmup", "warmup_steps"),
        ("learning_rat", "learning_rate"),
        ("max_seq_len", "block_size"),
    ],
)
def test_what_other_tools_call_an_option_is_answered_with_our_name(word, option, tmp_path):
    with pytest.raises(UserError, match=rf"unknown option .*\. Did you mean [^?]*--{option}\b"):
        parse(*SCRIPTS["pretrain"], argv=[f"--{word.removeprefix('--')}", "1"])
    (tmp_path / "recipe.yaml").write_text(json.dumps({word.removeprefix("--"): 1}))
    with pytest.raises(
        UserError, match=rf"recipe.yaml: unknown key .*\. Did you mean [^?-]*\b{option}\b"
    ):
        parse(*SCRIPTS["pretrain"], argv=["--config", str(tmp_path / "recipe.yaml")])


def test_nothing_is_suggested_for_a_name_like_no_other():
    assert suggestion(["zzzzz"], ["learning_rate"]) == ""


def test_an_unknown_option_of_a_command_is_refused_with_the_likely_one(capsys):
    message = failure(capsys, run_cli, "evaluate", "runs/sft", "a.jsonl", "--max_tokens", "3")
    assert (
        "unrecognized arguments: --max_tokens 3. Did you mean --max_new_tokens? See minimind"
        " evaluate" in message
    )


AUTO = """
import sys
import minimind
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import LlamaForCausalLM, Trainer, AutoConfig, AutoModelForCausalLM
assert "minimind.model" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({path!r})
assert type(model) is minimind.MiniMindForCausalLM
assert AutoConfig.for_model("minimind").qk_norm
print(type(model).__module__, model.num_parameters())
"""


def test_after_importing_the_package_the_auto_classes_know_the_model_without_its_code(
    tmp_path, model
):
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.unlink()
    code = AUTO.format(path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == [
        "minimind.model.modeling_minimind",
        str(model.num_parameters()),
    ]
