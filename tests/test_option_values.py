"""Any value of any option of the stages and commands is accepted, or refused by one message that
names the option."""

import argparse
import json
import os
from functools import cache
from itertools import pairwise

import pytest
from pipeline import chat_rows, document_rows, failure, run_script, short_run
from transformers import Trainer

from minimind.cli import build_parser
from minimind.common import errors
from minimind.common.bounds import BOUNDS, check_options
from minimind.common.errors import UserError
from minimind.stages import STAGES
from minimind.training import command_line
from minimind.training.command_line import parse
from minimind.training.model_arguments import ModelArguments
from minimind.training.parser import StageParser
from minimind.training.starting_point import adapter_config, new_model
from minimind.training.trainers import BlockTrainer

VALUES = ("-1", "0", "nan", "inf", "1e30", str(10**30), "banana", "")


def options_of(parser):
    """The options of a parser that take a value, each once."""
    return {
        action.dest: action
        for action in reversed(parser._actions)
        if action.default != argparse.SUPPRESS and action.nargs != 0
    }


def commands(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)
            return
    yield parser


def stage_options():
    """(stage, option) of all stages; an option that stages share once."""
    options = {}
    for stage in ("pretrain", "sft", "dpo"):
        for name, action in options_of(StageParser(STAGES[stage].arguments)).items():
            options.setdefault((name, str(action.default), action.nargs), (stage, name))
    return list(options.values())


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """The message by which the options of a stage are refused, or None."""
    monkeypatch.chdir(tmp_path)
    # Milliseconds each, a thousand times
    monkeypatch.setattr(command_line, "StageParser", cache(StageParser))
    before = dict(os.environ)

    def check(stage, *argv):
        try:
            parse(*STAGES[stage].arguments, argv=argv)
        except UserError as error:
            return str(error)

    yield check
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.filterwarnings("ignore")  # the libraries' own about what is accepted
def test_every_value_of_every_option_of_a_stage_is_accepted_or_refused_by_name(refusal):
    unnamed = {}
    for stage, name in stage_options():
        for value in VALUES:
            message = refusal(stage, f"--{name}={value}")
            if message is not None and (name not in message or len(message) > 1500):
                unnamed[name, value] = message
    assert unnamed == {}


def test_every_value_of_every_option_of_a_command_is_accepted_or_refused_by_name():
    unnamed = {}
    for command in commands(build_parser()):
        words = [word for action in command._actions if not action.option_strings for word in ["x"]]
        for action in command._actions:
            if action.required and action.option_strings:
                words += [f"--{action.dest}", (action.choices or ["x"])[0]]
        for name, action in options_of(command).items():
            if not action.option_strings:
                continue
            for value in VALUES:
                try:
                    check_options(
                        command._actions,
                        command.parse_args([*words, f"--{name}={value}"]),
                        command.prog,
                    )
                except UserError as error:
                    if name not in str(error):
                        unnamed[command.prog, name, value] = str(error)
    assert unnamed == {}


def test_every_number_among_the_options_has_bounds():
    parsers = [
        *commands(build_parser()),
        *(StageParser(spec.arguments) for spec in STAGES.values()),
    ]
    numbers = {
        name
        for parser in parsers
        for name, action in options_of(parser).items()
        if action.type in (int, float)
    }
    assert numbers - set(BOUNDS) == set()


# What is seen only when a run is built: (stage, words, what the message names). Each was a
# traceback.
LATE = [
    ("pretrain", ["--lr_scheduler_kwargs", '{"banana": 1}'], "banana"),
    ("pretrain", ["--lr_scheduler_kwargs", '{"min_lr": "low"}'], "--lr_scheduler_kwargs"),
    (
        "pretrain",
        ["--lr_scheduler_kwargs", '{"min_lr_rate": -1}'],
        "min_lr_rate -1: expected at least 0",
    ),
    (
        "pretrain",
        ["--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", '{"min_lr": 1}'],
        "it takes none",
    ),
    ("pretrain", ["--lr_scheduler_kwargs", '{"min_lr": NaN}'], "min_lr nan: expected at least 0"),
    ("pretrain", ["--lr_scheduler_kwargs", "[1]"], "expected a JSON object"),
    ("pretrain", ["--optim", "lomo"], "--optim lomo cannot be built"),
    ("pretrain", ["--optim_args", "banana"], "--optim_args banana"),
    ("pretrain", ["--save_strategy", "best"], "--save_strategy best compares evaluations"),
    ("pretrain", ["--logging_steps", "1.5"], "--logging_steps must be an integer"),
    (
        "pretrain",
        [
            "--activation_checkpointing",
            "true",
            "--activation_checkpointing_kwargs",
            '{"banana": 1}',
        ],
        "unexpected keyword argument 'banana'",
    ),
    ("pretrain", ["--dataloader_persistent_workers", "true"], "give --dataloader_num_workers"),
    (
        "sft",
        ["--activation_offloading", "true", "--use_cpu", "true"],
        "--activation_offloading moves",
    ),
    ("sft", ["--lora_task_type", "SEQ_CLS"], "--lora_task_type SEQ_CLS has no meaning here"),
    ("sft", ["--load_in_4bit", "true"], "--load_in_4bit True has no meaning here"),
    ("sft", ["--eos_token", "banana"], "--eos_token banana has no meaning here"),
    ("sft", ["--deepspeed", "[]"], "--deepspeed"),
    ("dpo", ["--loss_type", "sigmoid", "banana"], "loss_type"),
    (
        "dpo",
        ["--f_divergence_type", "banana"],
        "--f_divergence_type banana: expected one of reverse_kl",
    ),
    ("dpo", ["--loss_weights", "1", "nan"], "--loss_weights nan"),
    ("dpo", ["--loss_weights", "1", "2"], "loss_weights"),
    ("pretrain", ["--output_dir", os.fsdecode("狐狸".encode("gbk"))], "a name that is not UTF-8"),
    ("pretrain", ["--output_dir", "a\0b"], "--output_dir: found a NUL character"),
]


@pytest.mark.parametrize(("stage", "words", "named"), LATE, ids=lambda value: " ".join(value)[:40])
def test_what_only_a_run_would_see_is_refused_before_it(refusal, stage, words, named):
    assert named in refusal(stage, *words)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_target_modules": "banana"}, "Target modules banana not found"),
        ({"lora_modules_to_save": "banana"}, "--lora_modules_to_save banana"),
        ({"lora_target_parameters": "banana"}, "--lora_target_parameters banana"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_the_data(model, options, named):
    args = ModelArguments(use_peft=True, **{name: [value] for name, value in options.items()})
    with pytest.raises(UserError, match=named):
        adapter_config(args, model)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"packing": "false", "padding_free": "true"},
            "the options do not fit together: When `padding_free=True`",
        ),
        (
            {"router_aux_loss_coef": 1},
            "--router_aux_loss_coef is about experts, and the model has none",
        ),
    ],
    ids=["library", "experts"],
)
def test_what_fits_no_trainer_is_one_message(
    monkeypatch, tmp_path, capsys, model, tokenizer, options, problem
):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in chat_rows()))
    argv = short_run(tmp_path / "out", max_length=64, train_files=rows, **options)
    argv += ["--model_name_or_path", tmp_path / "base"]
    assert problem in failure(capsys, run_script, monkeypatch, "finetune_sft", *argv)


RECIPES = {
    "learning_rate: [1]": "learning_rate: found a list, expected one value",
    "learning_rate: {a: 1}": "learning_rate: found 'name: value' lines",
    "learning_rate: -1": "--learning_rate -1: expected above 0",
    "learning_rate: .nan": "--learning_rate nan",
    "seed: true": "--seed",
    "seed: 2023-13-45": "not YAML",
    "max_steps: 1.5": "--max_steps",
    "max_steps: 0": "--max_steps 0: expected at least 1",
    "bf16: maybe": "--bf16",
    "train_files: [[a]]": "train_files: found [['a']], expected a list of names",
    "train_files: [null]": "train_files: found [None]",
    "train_files: [--overwrite_output_dir]": "train_files: found ['--overwrite_output_dir']",
    "run_name: --overwrite_output_dir=true\noutput_dir: {a: b}": (
        "output_dir: found 'name: value' lines"
    ),
    'output_dir: ""': "--output_dir: found an empty text",
    'output_dir: "a\\0b"': "--output_dir: found a NUL character",
    "seed: 1\nseed: 2": "the key seed appears twice",
    "seed:\t1\n\tblock_size: 2": "not YAML",
    "": "expected 'name: value' lines, found NoneType",
    "- seed": "expected 'name: value' lines, found list",
    "[" * 100_000: "more than 50 deep",
    "- " * 100_000: "more than 50 deep",
    "seed: !!python/object/apply:os.getcwd []": "not YAML",
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh")
    ): "perhaps by aliases",
    b"seed: 1 # \xba\xfc\xc0\xea": "not UTF-8",
    b"\0\1\2": "not YAML",
    b"a" * (2**20 + 1): "found more than",
}


@pytest.mark.parametrize(
    ("content", "named"), RECIPES.items(), ids=[str(each)[:30] for each in RECIPES]
)
def test_a_recipe_with_a_value_of_another_shape_is_refused_by_file_and_key(
    refusal, tmp_path, content, named
):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal("pretrain", f"--config={path}")
    assert named in message
    assert str(path) in message


def test_a_recipe_means_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "save_strategy: no\nrun_name: --overwrite_output_dir\nreport_to: [none]\n"
    text += "lr_scheduler_kwargs: {min_lr: 1.e-5}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    *_, args = parse(*STAGES["pretrain"].arguments, argv=["--config", "recipe.yaml"])
    assert (args.save_strategy, args.run_name, args.report_to) == (
        "no",
        "--overwrite_output_dir",
        [],
    )
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert not args.overwrite_output_dir


def test_a_file_of_arguments_beside_the_script_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "pretrain.args").write_text("--seed 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "pretrain.py")])
    assert parse(*STAGES["pretrain"].arguments)[-1].seed == 42


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "x"}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size 1000000000000000000000000000000"),
        ({"hidden_size": 96, "num_attention_heads": 7}, "num_attention_heads (7)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (
            {"chunk_size_feed_forward": 10**400},
            "chunk_size_feed_forward 10000000000000000000... (401 characters)",
        ),
        (
            {"vocab_size": 16_000_000, "hidden_size": 1_048_576, "num_attention_heads": 8},
            "weights take",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta -1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"initializer_range": -1}, "initializer_range"),
        ({"hidden_act": "banana"}, "banana"),
    ],
    ids=str,
)
def test_an_impossible_model_is_refused_by_file_and_field(tmp_path, fields, named, tokenizer):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError) as error:
        new_model(str(path), tokenizer)
    assert named in str(error.value)
    assert str(path) in str(error.value)


def test_an_unreachable_hub_is_reported_before_training(
    monkeypatch, tmp_path, capsys, model, tokenizer
):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in document_rows()))
    argv = short_run(tmp_path / "out", block_size=32, push_to_hub="true", train_files=rows)
    message = failure(
        capsys,
        run_script,
        monkeypatch,
        "pretrain",
        *argv,
        "--model_name_or_path",
        tmp_path / "base",
    )
    assert "--push_to_hub: the repository cannot be opened" in message


def test_an_upload_that_fails_costs_no_run(monkeypatch, capsys):
    monkeypatch.setattr(errors, "FAILED", set())

    def fail(*args):
        raise ConnectionError("no network")

    trainer = object.__new__(BlockTrainer)
    for name in ("_push_from_checkpoint", "_finish_current_push"):
        monkeypatch.setattr(Trainer, name, fail)
    trainer._push_from_checkpoint("checkpoint-1")
    trainer._finish_current_push()
    assert (
        capsys.readouterr().err.count("the upload to the Hub failed (ConnectionError: no network)")
        == 1
    )
