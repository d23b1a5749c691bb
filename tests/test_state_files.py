"""What a power loss or a bad disk leaves of our files is said in one message, and costs as little
as it can."""

import json
import os
import shutil
from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipeline import chat_rows, document_rows, failure, run_cli, run_script, short_run, write_model
from safetensors.torch import load_file, save_file

from minimind import quickstart
from minimind.cleaning.pipeline import finished_report
from minimind.common.errors import UserError
from minimind.common.files import hash_file, read_json, write_json
from minimind.common.recipes import read_deepspeed
from minimind.doctor import doctor
from minimind.generation import load_for_generation
from minimind.stage_directory import load_model, read_stage, weights_hash
from minimind.training.checkpoints import (
    last_complete_checkpoint,
    problem_of,
)
from minimind.training.model_arguments import load_model_config_file
from minimind.training.output_directory import MANIFEST, RUN, read_record
from minimind.training.replay import replay
from minimind.training.report import write_report
from minimind.training.starting_point import new_model, starting_point

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


# What can become of a file.


def holding(content):
    return lambda file: (file.unlink(), file.write_bytes(content))


def cut(file):
    content = file.read_bytes()
    holding(content[: len(content) * 3 // 5])(file)


def directory(file):
    file.unlink()
    file.mkdir()


def dangling(file):
    file.unlink()
    file.symlink_to("nowhere")


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def retyped(value):
    """Every value of the object in a file becomes this one; a file of another kind gets one such
    value."""

    def change(file):
        try:
            names = list(json.loads(file.read_bytes()))
        except ValueError:
            names = ["a"]
        holding(json.dumps(dict.fromkeys(map(str, names), value)).encode())(file)

    return change


GONE = {
    "empty": holding(b""),
    "zeros": holding(bytes(4096)),
    "a directory": directory,
    "dangling": dangling,
    "a pipe": pipe,
}
NO_JSON = {
    "cut": cut,
    "not UTF-8": holding(b"\xff\xfe\x80{"),
    "nested": holding(b"[" * 100_000),
    "nested objects": holding(b'{"a":' * 100_000),
}
OTHER_JSON = {name: holding(name.encode()) for name in ("[]", "null", '"text"', "NaN", "{}")}
OTHER_VALUES = {f"values {value!r}": retyped(value) for value in ("two", [], {}, -3, None)}
CORRUPTIONS = GONE | NO_JSON | OTHER_JSON | OTHER_VALUES


# What is corrupted.


def command(world, output_dir, **options):
    options = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "sample_steps": -1,
        "block_size": 32,
    } | options
    words = ["--train_files", world / "docs.jsonl", "--model_config", world / "model.json"]
    return [
        "pretrain",
        *short_run(output_dir, **options),
        *words,
        "--tokenizer",
        world / "tokenizer",
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer, tokenizer_dir):
    """A stage with two checkpoints, the same in shards, an adapter of it, a kept batch, data and a
    recipe."""
    root = tmp_path_factory.mktemp("state")
    for name, rows in (("docs", document_rows()), ("chats", chat_rows())):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_model(root / "model.json")
    shutil.copytree(tokenizer_dir, root / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(root / "cache"))
        run_script(patch, *command(root, root / "stage"))

    load_model(root / "stage").save_pretrained(root / "shards", max_shard_size="20KB")
    adapted = get_peft_model(
        load_model(root / "stage"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    adapted.peft_config["default"].base_model_name_or_path = str(root / "stage")
    adapted.save_pretrained(root / "adapter")
    for name in ("shards", "adapter"):
        tokenizer.save_pretrained(root / name)
        write_json(
            root / name / "stage.json", {"stage": "lora", "weights": weights_hash(root / name)}
        )

    ids = torch.randint(5, 200, (2, 8))
    (root / "bad_batch-2").mkdir()
    save_file(
        {"0/input_ids": ids, "0/labels": ids.clone()}, root / "bad_batch-2" / "rank-0.safetensors"
    )
    record = {
        "step": 2,
        "loss": "nan",
        "grad_norm": "1.0",
        "micro_batches": 1,
        "precision": "fp32",
        "weights": None,
    }
    write_json(root / "bad_batch-2" / "batch.json", record)
    (root / "sft").mkdir()
    (root / "sft" / "recipe.yaml").write_text(
        f"max_steps: 1\nmax_length: 32\ntrain_files: {root / 'chats.jsonl'}\n"
    )
    return root


@pytest.fixture
def copy(world, tmp_path):
    """A fresh copy of one of the world's directories, in links: change no file in place."""

    def make(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(world / name, tmp_path / name, copy_function=os.link))

    return make


# Who reads a stage directory.


def examine(world, stage):
    report = doctor(
        str(world / "sft" / "recipe.yaml"), ["--model_name_or_path", str(stage)], quick=True
    )
    refused = [finding["found"] for finding in report["findings"] if finding["name"] == "start"]
    if refused:
        raise UserError(refused[0])


READERS = {
    "generate and evaluate": lambda world, stage: load_for_generation(stage),
    "the next stage": lambda world, stage: starting_point(stage),
    "plan": lambda world, stage: run_cli(
        "plan", world / "sft" / "recipe.yaml", "--device", "a100", "--model_name_or_path", stage
    ),
    "doctor": examine,
    "export": lambda world, stage: run_cli("export", stage, stage / "out", "--format", "qwen3"),
    "merge": lambda world, stage: run_cli("merge", stage, stage / "out"),
    "inspect": lambda world, stage: run_cli(
        "inspect", world / "chats.jsonl", "--stage", "sft", "--tokenizer", stage
    ),
    "import": lambda world, stage: run_cli("import", stage, stage / "out"),
    "replay": lambda world, stage: replay(world / "bad_batch-2", stage),
}


def refusal(capsys, call, *args):
    """The message with which a call ends, None where it succeeds; all but a UserError and code 2
    fail the test."""
    try:
        call(*args)
    except UserError as error:
        return str(error)
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and said.count("error: ") == 1 and "Traceback" not in said, said
        return said.split("error: ")[1]


FILES = {
    "stage": {
        *(
            "stage.json",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        *("chat_template.jinja", "model.safetensors", RUN, "train_log.jsonl", "training_args.bin"),
    },
    "shards": {"model.safetensors.index.json", "model-00002-of-00006.safetensors"},
    "adapter": {"adapter_config.json", "adapter_model.safetensors", "stage.json", "tokenizer.json"},
}
UNREAD = {RUN, "train_log.jsonl", "training_args.bin"}  # by all readers of a stage


@pytest.mark.parametrize(
    "place, name", sorted((place, name) for place, names in FILES.items() for name in names)
)
def test_a_damaged_file_of_a_stage_is_named_to_each_reader(world, copy, capsys, place, name):
    others = cycle([reader for reader in READERS if reader != "generate and evaluate"])
    if name in UNREAD:
        must_fail = set()
    else:
        must_fail = (
            set(GONE) if name == "chat_template.jinja" else {*GONE, *NO_JSON, '"text"', "null"}
        )
    for number, (corruption, corrupt) in enumerate(CORRUPTIONS.items()):
        if name in {*UNREAD, "chat_template.jinja"} and corruption not in (
            *GONE,
            "not UTF-8",
            "{}",
        ):
            continue
        for reader in (
            ("generate and evaluate", next(others)) if number % 2 else ("generate and evaluate",)
        ):
            stage = copy(place)
            corrupt(stage / name)
            said = refusal(capsys, READERS[reader], world, stage)
            if reader == "generate and evaluate" and corruption in must_fail:
                assert said and name in said, (corruption, said)
            if name not in {*UNREAD, "chat_template.jinja"}:
                assert (
                    said is None
                    or str(stage) in said
                    or "is a complete model, not an adapter" in said
                ), (corruption, said)


# Checkpoints of an unfinished run.


@pytest.fixture
def unfinished(copy):
    """A run that was killed after its second checkpoint."""
    run = copy("stage")
    for file in [*run.glob("*.safetensors"), run / "stage.json", run / "config.json"]:
        file.unlink()
    return run


CHECKPOINT = (
    "trainer_state.json",
    "recipe.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


def list_anew(checkpoint, name):
    """Let the manifest say what a file holds now."""
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    manifest["files"].pop(name)
    if (checkpoint / name).exists():
        size, digest = (checkpoint / name).stat().st_size, hash_file(checkpoint / name)
        manifest["files"][name] = {"size": size, "xxh3_128": digest}
    holding(json.dumps(manifest).encode())(checkpoint / MANIFEST)


@pytest.mark.parametrize("name", [MANIFEST, *CHECKPOINT, "run_state_0.pth"])
def test_a_checkpoint_that_does_not_read_is_skipped_by_name_for_the_one_before(
    world, unfinished, name
):
    """Also where the manifest was written after the damage, so that all hashes fit."""
    newest = unfinished / "checkpoint-2"
    fitting = () if name == MANIFEST else ("empty", "zeros", "cut", "null")
    for corruption, hash_fits in [
        *((each, False) for each in CORRUPTIONS),
        *((each, True) for each in fitting),
    ]:
        shutil.rmtree(newest)
        shutil.copytree(world / "stage" / "checkpoint-2", newest, copy_function=os.link)
        CORRUPTIONS[corruption](newest / name)
        if hash_fits:
            list_anew(newest, name)
        found, problems = last_complete_checkpoint(unfinished)
        assert found == unfinished / "checkpoint-1", corruption
        assert len(problems) == 1 and str(newest) in problems[0] and name in problems[0], (
            corruption,
            problems,
        )


@pytest.mark.parametrize(
    "state",
    [
        [],
        {},
        {"global_step": "two", "max_steps": 2, "log_history": []},
        {"global_step": 2, "unknown": 1},
    ],
    ids=str,
)
def test_a_state_that_the_library_would_not_take_is_a_problem_though_its_hash_fits(
    unfinished, state
):
    newest = unfinished / "checkpoint-2"
    holding(json.dumps(state).encode())(newest / "trainer_state.json")
    list_anew(newest, "trainer_state.json")
    assert "trainer_state.json" in problem_of(newest)
    (newest / "trainer_state.json").unlink()
    list_anew(newest, "trainer_state.json")
    assert problem_of(newest) == "manifest.json does not name trainer_state.json"


@pytest.mark.parametrize(
    "files",
    [[], {}, {"a": 3}, {"a": {"size": "two"}}, {"../x": {"size": 1, "xxh3_128": ""}}],
    ids=str,
)
def test_a_manifest_of_other_values_is_a_problem(unfinished, files):
    write_json(unfinished / "checkpoint-2" / MANIFEST, {"step": 2, "processes": 1, "files": files})
    assert problem_of(unfinished / "checkpoint-2")


@pytest.mark.parametrize("corruption", ["empty", "zeros", *NO_JSON, *OTHER_JSON])
def test_a_broken_run_json_costs_no_checkpoint(unfinished, corruption):
    """What the run is stands in its checkpoints: else --overwrite_output_dir would take it for
    another one."""
    recipe = read_record(unfinished, RUN)["recipe"]
    CORRUPTIONS[corruption](unfinished / RUN)
    record = read_record(unfinished, RUN)
    assert record["recipe"] == recipe
    assert str(unfinished / RUN) in record["problem"]


@pytest.mark.parametrize("corruption", ["a directory", "dangling", "a pipe", *OTHER_VALUES])
def test_what_stands_in_the_place_of_run_json_is_not_overwritten(unfinished, corruption):
    CORRUPTIONS[corruption](unfinished / RUN)
    with pytest.raises(UserError, match=RUN):
        read_record(unfinished, RUN)


def test_a_run_goes_on_without_its_run_json_and_its_newest_checkpoint(
    world, unfinished, monkeypatch, capsys
):
    monkeypatch.setenv("MINIMIND_CACHE", str(world / "cache"))
    holding(b"")(unfinished / RUN)
    cut(unfinished / "checkpoint-2" / "trainer_state.json")
    run_script(monkeypatch, *command(world, unfinished))
    said = capsys.readouterr().out
    assert f"{unfinished / RUN}: found an empty file" in said
    assert f"skipped {unfinished / 'checkpoint-2'}: trainer_state.json has" in said
    assert f"from {unfinished / 'checkpoint-1'}" in said
    assert read_stage(unfinished)["weights"] == read_stage(world / "stage")["weights"]


@pytest.mark.parametrize("corruption", ["empty", "a directory", "cut", "null", "{}"])
def test_a_finished_run_with_a_broken_record_says_what_to_do(
    world, copy, monkeypatch, capsys, corruption
):
    monkeypatch.setenv("MINIMIND_CACHE", str(world / "cache"))
    stage = copy("stage")
    CORRUPTIONS[corruption](stage / "stage.json")
    message = failure(capsys, run_script, monkeypatch, *command(world, stage))
    assert f"{stage / 'stage.json'}: " in message and "remove it" in message


# Weights and what says how to read them.


def weights(change):
    """A change of the tensors in a directory, without the record that would tell it by its hash."""

    def apply(stage):
        file = next(stage.glob("*model.safetensors"))
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors, sorted(tensors)[3])
        file.unlink()
        save_file(tensors, file, {"format": "pt"})
        (stage / "stage.json").unlink()

    return apply


def entries(name, **values):
    def apply(stage):
        value = json.loads((stage / name).read_bytes())
        holding(json.dumps(value | values).encode())(stage / name)

    return apply


INDEX = "model.safetensors.index.json"
MISFITS = {
    "a tensor is missing": (
        "stage",
        weights(lambda tensors, name: tensors.pop(name)),
        "1 missing: model.layers",
    ),
    "a tensor is too many": (
        "stage",
        weights(lambda t, _: t.update(x=torch.ones(2))),
        "1 not of this model: x",
    ),
    "another shape": (
        "stage",
        weights(lambda t, name: t.update({name: torch.ones(3, 3)})),
        "other shapes",
    ),
    "whole numbers": (
        "stage",
        weights(lambda t, name: t.update({name: t[name].long()})),
        "of type I64",
    ),
    "another model": ("stage", entries("config.json", model_type="llama"), "not of this model"),
    "more layers": ("stage", entries("config.json", num_hidden_layers=3), "11 missing"),
    "layers without end": (
        "stage",
        entries("config.json", num_hidden_layers=10**9),
        "num_hidden_layers is 1,000,000,000",
    ),
    "another vocabulary": ("stage", entries("config.json", vocab_size=400), "other shapes"),
    "an untied head": (
        "stage",
        entries("config.json", tie_word_embeddings=False),
        "1 missing: lm_head.weight",
    ),
    "weights elsewhere": (
        "stage",
        entries("config.json", transformers_weights="x"),
        "transformers_weights is a string",
    ),
    "settings": (
        "stage",
        entries("generation_config.json", temperature="hot"),
        "temperature is a string",
    ),
    "end tokens": (
        "stage",
        entries("generation_config.json", eos_token_id=["x"]),
        "no generation settings",
    ),
    "a shard elsewhere": (
        "shards",
        entries(INDEX, weight_map={"x": "../stage/model.safetensors"}),
        INDEX,
    ),
    "a shard that is gone": (
        "shards",
        lambda s: (s / "model-00003-of-00006.safetensors").unlink(),
        "model-00003",
    ),
    "no shards": ("shards", entries(INDEX, weight_map={}), "no shard"),
    "half an adapter": ("adapter", weights(lambda tensors, name: tensors.pop(name)), "1 missing"),
    "more adapter": (
        "adapter",
        weights(lambda t, _: t.update(x=torch.ones(2))),
        "1 not of this model: x",
    ),
    "its own base": (
        "adapter",
        entries("adapter_config.json", base_model_name_or_path="."),
        "leads back to itself",
    ),
    "no known adapter": (
        "adapter",
        entries("adapter_config.json", peft_type="NOPE"),
        "KeyError: 'NOPE'",
    ),
    "another rank": ("adapter", entries("adapter_config.json", r=3), "cannot be loaded"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_weights_that_do_not_fit_are_refused(copy, misfit):
    """The libraries take random numbers for what is missing, and leave out what is too much."""
    place, change, said = MISFITS[misfit]
    stage = copy(place)
    change(stage)
    with pytest.raises(UserError) as refused:
        load_for_generation(stage)
    assert said in str(refused.value) and str(stage) in str(refused.value)


def test_zeros_in_the_weights_are_found_by_the_hash_in_the_record(copy):
    stage = copy("stage")
    content = (stage / "model.safetensors").read_bytes()
    holding(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))(
        stage / "model.safetensors"
    )
    with pytest.raises(UserError, match="not those of this stage"):
        load_model(stage)


def test_a_model_that_is_not_finite_is_not_asked_for_words(copy):
    stage = copy("stage")
    weights(lambda tensors, name: tensors[name].fill_(float("nan")))(stage)
    load_model(stage)  # `minimind replay` looks at such a model
    with pytest.raises(UserError, match="weights that are not finite"):
        load_for_generation(stage)


# Other files of ours, and those that users write.


def others(world, place):
    """Readers of single files, and the words that the name of the file may be in."""
    return {
        "batch.json": lambda file: replay(file.parent, world / "stage"),
        "rank-0.safetensors": lambda file: replay(file.parent, world / "stage"),
        "report.json": lambda file: finished_report(file.parent, "key"),
        "pretrain/stage.json": lambda file: quickstart.read_measured(file.parent),
        "deepspeed.json": lambda file: read_deepspeed(str(file)),
        "model.json": lambda file: load_model_config_file(str(file)),
    }[place]


@pytest.mark.parametrize(
    "place",
    [
        "batch.json",
        "rank-0.safetensors",
        "report.json",
        "pretrain/stage.json",
        "deepspeed.json",
        "model.json",
    ],
)
def test_other_files_are_named_too(world, tmp_path, copy, place):
    file = tmp_path / "files" / place
    sources = {
        "batch.json": "bad_batch-2/batch.json",
        "rank-0.safetensors": "bad_batch-2/rank-0.safetensors",
    }
    sources |= {"pretrain/stage.json": "stage/stage.json", "model.json": "model.json"}
    for corruption, corrupt in CORRUPTIONS.items():
        shutil.rmtree(tmp_path / "files", ignore_errors=True)
        shutil.copytree(world / "bad_batch-2", tmp_path / "files")
        file.parent.mkdir(exist_ok=True)
        content = (
            (world / sources[place]).read_bytes()
            if place in sources
            else b'{"zero_optimization": {"stage": 2}}'
        )
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        corrupt(file)
        try:
            others(world, place)(file)
        except UserError as error:
            assert str(file) in str(error) or str(file.parent) in str(error)
        else:
            assert corruption not in {*GONE, *NO_JSON, '"text"', "null", "[]"}, corruption


@pytest.mark.parametrize(
    "fields",
    [{"rope_parameters": []}, {"num_attention_heads": 0}, {"hidden_size": -1}, {"hidden_act": 3}],
    ids=str,
)
def test_a_model_file_of_other_values_is_named(tmp_path, tokenizer, fields):
    (tmp_path / "model.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"model\.json"):
        new_model(str(tmp_path / "model.json"), tokenizer)


def test_a_report_shows_a_parent_whose_record_is_broken_as_gone(world, copy):
    stage = copy("stage")
    holding(b"")(stage / "stage.json")
    record = read_stage(world / "stage") | {
        "parent": {"directory": str(stage), "stage": "pretrain", "weights": "w"}
    }
    assert "no longer there" in write_report(world / "stage", record).read_text()


def test_a_record_names_the_value_of_another_type(tmp_path):
    write_json(tmp_path / "a.json", {"a": True})
    with pytest.raises(
        UserError, match=r"a\.json: a is true or false, expected a whole number or null\. Do this\."
    ):
        read_json(tmp_path / "a.json", "Do this.", fields={"a": int | None})
