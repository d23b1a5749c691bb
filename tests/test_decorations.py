"""What only tells about a run ends none, and costs neither its weights nor its record."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipeline import document_rows, run_script, short_run, write_model
from transformers import TrainerCallback

from minimind.common import errors
from minimind.common.errors import decoration
from minimind.common.files import append_json, json_lines
from minimind.common.language import say
from minimind.doctor import examination
from minimind.doctor.registry import Check
from minimind.sharing import model_card
from minimind.stage_directory import load_model, read_stage, weights_hash
from minimind.training import (
    heartbeat,
    memory_growth,
    progress,
    record,
    report,
    samples,
    wandb_tracking,
)
from minimind.training import run as training_run
from minimind.training.callbacks import Baseline
from minimind.training.checkpoints import problem_of
from minimind.training.output_directory import RUN_LOGS
from minimind.training.plots import plot_loss
from minimind.training.samples import Prompt, SampleCallback, read_samples

pytestmark = pytest.mark.pictures
HOSTILE_NAME = "a$\\frac{$ [/b]\n[bold]{}%s中文\x1b[2J\\"


@pytest.fixture
def pretrain(monkeypatch, tmp_path, tokenizer_dir, write_jsonl):
    """Run pretrain.py for three steps that log, evaluate, save and sample each; returns the stage
    directory."""
    (tmp_path / HOSTILE_NAME).parent.mkdir()
    documents, model = (
        write_jsonl(f"{HOSTILE_NAME}.jsonl", document_rows()),
        write_model(tmp_path / "model.json"),
    )

    def run(name="run", **options):
        every = {
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": 1,
            "eval_steps": 1,
        }
        options = {
            "max_steps": 3,
            "block_size": 32,
            "logging_steps": 1,
            "sample_steps": 1,
            **every,
        } | options
        data = ["--train_files", documents, "--model_config", model, "--tokenizer", tokenizer_dir]
        run_script(
            monkeypatch,
            "pretrain",
            *short_run(tmp_path / name, **options),
            *data,
            "--eval_ratio",
            0.2,
        )
        return tmp_path / name

    return run


def broken(*args, **kwargs):
    raise RuntimeError("planted\nand more")


def test_all_that_decorates_may_fail_at_once_and_the_run_is_what_it_would_have_been(
    pretrain, monkeypatch, capsys
):
    whole = pretrain("whole")
    assert "notice: " not in capsys.readouterr().err
    for module, name in (
        (samples, "complete"),
        (report, "report_page"),
        (record, "token_losses"),
        (model_card, "describe"),
        (progress, "peak_memory"),
        (progress.ProgressCallback, "_line"),
        (memory_growth, "process_bytes"),
        (wandb_tracking, "open_wandb_run"),
        (heartbeat.HeartbeatCallback, "on_train_begin"),
    ):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(examination, "CHECKS", [Check("planted", broken, (), quick=True)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bare = pretrain("bare", report_to="wandb")
    said = capsys.readouterr()
    notices = [
        line.split(" failed")[0] for line in said.err.split("\n") if line.startswith("notice: ")
    ]
    assert sorted(notices) == [
        f"notice: {what}"
        for what in (
            *("heartbeat", "loss.png", "measuring the speed", "memory", "progress", "sampling"),
            *("the losses of single tokens", "the model card", "the report", "wandb"),
        )
    ]
    assert "warning: planted: the check itself failed (RuntimeError: planted" in said.out
    assert weights_hash(bare) == weights_hash(whole)
    records = [read_stage(stage) for stage in (bare, whole)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert problem_of(bare / "checkpoint-3") is None
    assert not (bare / "report.html").exists()


def test_names_are_plain_text_everywhere_and_the_loss_is_drawn(pretrain, capsys):
    stage = pretrain(HOSTILE_NAME, max_steps=1, report_to="none", run_name=HOSTILE_NAME)
    said = capsys.readouterr()
    assert "notice: " not in said.err
    assert "\x1b" not in said.out
    assert "[bold]{}%s中文\\x1b[2J\\  (from random weights)" in said.out
    for name in ("report.html", "loss.png", "samples.jsonl", "stage.json", "README.md"):
        assert (stage / name).is_file()
    assert (stage / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (stage / "report.html").read_text().count("<svg") > 4


def test_the_model_is_written_before_the_last_evaluation_and_complete_only_after_it(
    pretrain, monkeypatch, tmp_path
):
    monkeypatch.setattr(importlib.import_module("pretrain"), "language_model_metrics", broken)
    with pytest.raises(RuntimeError, match="planted"):
        pretrain(max_steps=1)
    assert load_model(tmp_path / "run").num_parameters() > 0
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    assert not (tmp_path / "run" / "stage.json").exists()


def test_logs_that_are_gone_broken_or_directories_end_no_run_and_no_resuming(
    pretrain, monkeypatch, capsys
):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            log, rows = (Path(args.output_dir) / name for name in RUN_LOGS)
            if state.global_step == 2:
                log.unlink()
                log.mkdir()
                rows.write_text('{"x": 1}\n[]\n{"step": 1, "promp')
            if state.global_step == 3 and not args.resume_from_checkpoint:
                raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "ADDITIONAL", [lambda trainer: Spoil()])
    with pytest.raises(SystemExit):
        pretrain()
    assert capsys.readouterr().err.count("notice: progress failed (IsADirectoryError: ") == 1
    stage = pretrain()
    assert read_stage(stage)["steps"] == 3
    assert "resuming from" in capsys.readouterr().out
    assert {row["step"] for row in read_samples(stage / "samples.jsonl")} == {1, 2, 3}


def test_a_sample_may_hold_every_separator_of_lines(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\x1d\x1ee\n\ud83d"
    callback = SampleCallback(None, None, [Prompt("p", [1])], tmp_path, every=1, tokens=1)
    callback._keep(1, [text])
    callback._keep(2, ["plain"])
    assert read_samples(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": "p", "text": text},
        {"step": 2, "prompt": "p", "text": "plain"},
    ]


def test_a_line_of_a_log_stands_alone_after_one_that_was_cut_off(tmp_path):
    log = tmp_path / "train_log.jsonl"
    append_json(log, {"step": 1})
    with log.open("a") as file:
        file.write('{"step": 2, "lo')
    append_json(log, {"step": 3})
    assert list(json_lines(log)) == [{"step": 1}, {"step": 3}]


def test_a_log_that_others_have_written_into_is_read_as_far_as_it_is_one(tmp_path):
    (tmp_path / "log").write_bytes(
        b'{"step": 1, "loss": 2, "x": []}\n\xff\n[]\nnull\n{"loss": 3}\n{"step": "4"}\n{"step": 5,'
        b' "loss": "?"}\n{"a'
    )
    assert report.read_log(tmp_path / "log") == [{"step": 1, "loss": 2}, {"step": 5}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_page_of_losses_that_are_no_numbers_or_stand_at_the_start_alone_is_written(
    tmp_path, value, capsys
):
    append_json(tmp_path / "train_log.jsonl", {"step": 0, "eval_loss": value})
    metrics = {"before": {"loss": value}, "after": {"loss": value}}
    assert report.write_report(tmp_path, {"stage": "sft", "metrics": metrics}) is not None
    assert capsys.readouterr().err == ""


def test_a_section_that_fails_costs_the_page_no_other(tmp_path, capsys):
    (tmp_path / "mask_report.json").write_text("{")
    (tmp_path / "samples.jsonl").mkdir()
    page = report.report_page(tmp_path, {"stage": "sft", "data": {"train": {"rows": 7}}})
    assert "7 rows" in page
    assert capsys.readouterr().err.count("notice: the report's section ") == 2


def test_a_title_is_no_formula(tmp_path):
    plot_loss(
        [{"step": 1, "loss": 2.0}],
        tmp_path / "loss.png",
        HOSTILE_NAME + os.fsdecode(b"\xff"),
        "nats per token",
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_words_that_nobody_can_take_end_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    say("a line")
    with decoration("the report"):
        raise KeyError
    assert "the report" in errors.FAILED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_does_not_change_the_exit_code():
    code = (
        "from minimind.common.language import say\nfrom minimind.common.streams import"
        " keep_output_writable\nsay('x' * 10**5)\nkeep_output_writable()"
    )
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full).returncode == 0


def test_an_evaluation_before_the_first_step_that_is_no_number_is_not_the_one_to_beat():
    state, args = (
        SimpleNamespace(global_step=0, best_metric=None),
        SimpleNamespace(metric_for_best_model="loss"),
    )
    Baseline().on_evaluate(args, state, None, {"eval_loss": float("nan")})
    assert state.best_metric is None
    Baseline().on_evaluate(args, state, None, {"eval_loss": 2.0})
    assert state.best_metric == 2.0
