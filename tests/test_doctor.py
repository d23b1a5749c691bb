"""`minimind doctor` on recipes: its report, and what stops a run before it begins."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from pipeline import (
    MODEL,
    PAIR_LENGTHS,
    chat_rows,
    document_rows,
    failure,
    pair_rows,
    run_cli,
    run_script,
    short_run,
    write_model,
)

from minimind import MiniMindConfig, MiniMindForCausalLM, stages
from minimind.common.files import write_json
from minimind.costs.this_machine import find_device
from minimind.doctor import budget, doctor
from minimind.planning.computing import make_plan
from minimind.planning.planned_runs import read_recipes

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
RECIPES = sorted(
    str(path) for path in Path("configs").glob("*/*.yaml") if path.parent.name != "data"
)
DEEPSPEED = json.loads(Path("ds_config_zero2.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_of_the_project_have_no_fault(recipe, monkeypatch, tmp_path):
    """Sizes of 100 M are not needed to see it, and would take long to make."""
    monkeypatch.setattr(stages, "new_model", small_model)
    report = doctor(
        recipe,
        ["--train_files", "a/file/not/there.jsonl", "--output_dir", str(tmp_path)],
        quick=True,
    )
    assert report["errors"] == 0, report["findings"]
    assert {f["name"] for f in report["findings"] if f["severity"] == "warning"} == {"inputs"}, (
        report["findings"]
    )
    assert report["stage"] == {"lora": "sft"}.get(
        Path(recipe).parent.name, Path(recipe).parent.name
    )


def small_model(config_file, tokenizer, attn_implementation):
    """Layers of the size that the file says, on the meta device."""
    from minimind.training.model_arguments import load_model_config_file

    fields = load_model_config_file(config_file) | {"vocab_size": len(tokenizer)}
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**fields, eos_token_id=tokenizer.eos_token_id))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture
def recipe(tmp_path, write_jsonl, tokenizer_dir):
    """A recipe of a short pretraining, as a file."""

    def write(name="pretrain", **changes):
        values = {
            "train_files": [write_jsonl("docs.jsonl", document_rows())],
            "model_config": write_model(tmp_path / "model.json"),
            "tokenizer": str(tokenizer_dir),
            "output_dir": str(tmp_path / "run"),
            "block_size": 32,
            "num_train_epochs": 1,
            "bf16": False,
            "report_to": "none",
        } | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            json.dumps({key: value for key, value in values.items() if value is not None})
        )
        return str(path)

    return write


def test_a_healthy_recipe_passes_with_exit_code_0_and_a_table(recipe, capsys):
    run_cli("doctor", recipe())
    said = capsys.readouterr().out
    assert "0 errors" in said
    assert "accumulation" in said


def test_json_is_one_object_and_faults_end_with_exit_code_1(recipe, capsys, tmp_path):
    spoilt = tmp_path / "ds.json"
    write_json(spoilt, DEEPSPEED | {"scheduler": {"type": "WarmupLR"}})
    with pytest.raises(SystemExit) as stop:
        run_cli("doctor", recipe(), "--deepspeed", spoilt, "--warmup_steps", "500", "--json")
    assert stop.value.code == 1
    report = json.loads(capsys.readouterr().out)
    errors = {finding["name"] for finding in report["findings"] if finding["severity"] == "error"}
    assert errors == {"deepspeed_scheduler", "warmup"}
    assert report["errors"] == 2


def test_an_old_name_in_a_recipe_is_one_finding_with_the_name_of_today(recipe):
    report = doctor(recipe(evaluation_strategy="steps", warmup_ratio=0.1))
    (finding,) = report["findings"]
    assert (finding["name"], finding["severity"]) == ("start", "error")
    assert "unknown key evaluation_strategy, warmup_ratio" in finding["found"]
    assert "eval_strategy" in finding["found"].partition("Did you mean")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_sise": 3}, "block_size"),
        ({"block_size": 512}, "max_position_embeddings"),
        ({"vocab_size": 200}, "the tokenizer has"),
    ],
)
def test_what_a_run_would_be_refused_for_is_a_finding(recipe, tmp_path, changes, message):
    if "vocab_size" in changes:
        write_json(tmp_path / "narrow.json", MODEL | changes)
        changes = {"model_config": str(tmp_path / "narrow.json")}
    report = doctor(recipe(**changes))
    assert [finding["name"] for finding in report["findings"]] == ["start"]
    assert message in report["findings"][0]["found"]


def test_held_out_documents_that_are_trained_on_are_found(recipe, write_jsonl):
    other = write_jsonl(
        "eval.jsonl", [*document_rows()[:4], {"text": "never seen before by anyone"}]
    )
    findings = {f["name"]: f for f in doctor(recipe(eval_files=[other]))["findings"]}
    assert findings["held_out_rows"]["severity"] == "error"
    assert "eval.jsonl:1" in findings["held_out_rows"]["fix"]


def test_inputs_that_are_not_there_yet_are_a_warning(recipe):
    report = doctor(recipe(train_files=["runs/not/there.jsonl"], tokenizer="runs/no/tokenizer"))
    assert report["errors"] == 0
    assert "runs/not/there.jsonl" in report["findings"][0]["found"]
    assert "default tokenizer" in report["findings"][0]["found"]


@pytest.fixture
def next_recipe(recipe, tmp_path, write_jsonl):
    """A recipe of SFT whose parent is still to be written, by a pretraining that lies beside it."""

    def write(writer=True):
        folders = {name: tmp_path / "configs" / name for name in ("pretrain", "sft")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        if writer:
            shutil.move(recipe(), folders["pretrain"])
        rows = write_jsonl("chats.jsonl", [*chat_rows(), {"messages": "no list"}])
        own = {
            "model_config": None,
            "tokenizer": None,
            "block_size": None,
            "max_length": 64,
            "train_files": [rows],
        }
        own |= {"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "next")}
        shutil.move(recipe("sft", **own, on_bad_rows="skip"), folders["sft"])
        return str(folders["sft"] / "sft.yaml")

    return write


def test_before_the_parent_is_there_its_recipe_tells_shape_and_tokenizer(next_recipe, tokenizer):
    report = doctor(next_recipe())
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert "pretrain.yaml" in findings["inputs"]["found"]
    assert "1 of 17 rows are left out" in findings["data_findings"]["found"]
    assert (
        f"{len(tokenizer)} tokens, {len(tokenizer)} embeddings" == findings["vocabulary"]["found"]
    )
    skipped = {name: f["found"] for name, f in findings.items() if f["severity"] == "skipped"}
    assert {name for name, reason in skipped.items() if reason != "no --deepspeed"} == {
        "tied_weights",
        "untrained_tokens",
    }


def test_without_a_recipe_of_the_parent_the_data_is_inspected_all_the_same(next_recipe):
    findings = {
        finding["name"]: finding for finding in doctor(next_recipe(writer=False))["findings"]
    }
    assert (
        "no recipe writes it: tokens are those of the default tokenizer"
        in findings["inputs"]["found"]
    )
    assert "1 of 17 rows are left out" in findings["data_findings"]["found"]
    assert findings["vocabulary"]["severity"] == "skipped"


def test_at_80_columns_names_are_whole_and_what_was_not_checked_is_one_line(
    next_recipe, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    path = next_recipe()
    run_cli("doctor", path)
    said = capsys.readouterr().out
    checked = [f["name"] for f in doctor(path)["findings"] if f["severity"] != "skipped"]
    assert len(checked) > 15
    assert all(f" {name} " in said for name in checked)
    assert "skipped" not in said
    assert [line for line in said.splitlines() if line.startswith("not checked: ")]


def test_tokens_memory_and_time_are_those_of_the_plan(recipe):
    path = recipe()
    findings = {finding["name"]: finding for finding in doctor(path)["findings"]}
    (read,) = read_recipes([path], [])
    plan = make_plan(read, find_device("cpu"))
    ratio = plan.tokens / plan.parameters["total"]
    assert findings["tokens_per_parameter"]["severity"] == "warning"
    assert f"{plan.tokens:,} tokens" in findings["tokens_per_parameter"]["found"]
    assert f"{ratio:.2g} each" in findings["tokens_per_parameter"]["found"]
    assert findings["memory"]["severity"] == "ok"
    assert f"{plan.steps} steps" in findings["run_time"]["found"]


def test_a_step_without_room_is_an_error(recipe, monkeypatch):
    small = dataclasses.replace(find_device("cpu"), memory=2**20)
    monkeypatch.setattr(budget, "find_device", lambda name: small)
    findings = {finding["name"]: finding for finding in doctor(recipe())["findings"]}
    assert findings["memory"]["severity"] == "error"
    assert findings["memory"]["fix"]


def test_a_fault_stops_a_run_before_it_begins_unless_told_otherwise(
    monkeypatch, tmp_path, write_jsonl, capsys, tokenizer_dir
):
    options = [
        *short_run(tmp_path / "run", block_size=32, warmup_steps=2),
        "--tokenizer",
        tokenizer_dir,
    ]
    options += ["--train_files", write_jsonl("docs.jsonl", document_rows())]
    options += ["--model_config", write_model(tmp_path / "model.json")]
    message = failure(capsys, run_script, monkeypatch, "pretrain", *options)
    assert "warmup: 2 warm-up steps, expected fewer than the 2 steps of the run" in message
    assert "--on_findings warn" in message
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
    run_script(monkeypatch, "pretrain", *options, "--on_findings", "warn")
    assert "error: warmup" in capsys.readouterr().out
    assert (tmp_path / "run" / "stage.json").exists()


def test_the_doctor_reads_all_three_stages(
    recipe, write_jsonl, monkeypatch, tmp_path, tokenizer_dir
):
    run_script(monkeypatch, "pretrain", "--config", recipe(max_steps=2))
    nothing = {"model_config": None, "tokenizer": None, "block_size": None}
    start = {
        "model_name_or_path": str(tmp_path / "run"),
        "output_dir": str(tmp_path / "next"),
        **nothing,
    }
    chats, pairs = write_jsonl("chats.jsonl", chat_rows()), write_jsonl("pairs.jsonl", pair_rows())
    for stage, rows, rate in (("sft", chats, 2e-5), ("dpo", pairs, 5e-6)):
        length = {"max_length": 64} if stage == "sft" else PAIR_LENGTHS
        path = recipe(stage, train_files=[rows], learning_rate=rate, **start, **length)
        report = doctor(path, stage=stage)
        assert report["errors"] == 0, report["findings"]
        assert not any(finding["severity"] == "skipped" for finding in report["findings"][7:]), (
            report["findings"]
        )
    report = doctor(
        recipe("lora", train_files=[chats], learning_rate=2e-4, use_peft=True, **start), stage="sft"
    )
    findings = {finding["name"]: finding["severity"] for finding in report["findings"]}
    assert findings["untrained_tokens"] in ("warning", "error")
