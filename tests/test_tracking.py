"""Each tracker for real and offline: a short run is logged, and read back with the tracker's own
tools."""

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from pipeline import PATIENCE, chat_rows, document_rows, failure, run_script, short_run, write_model
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from minimind.training import tracking

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, tmp_path, tokenizer_dir, write_jsonl):
    """Run pretrain.py for two steps with a tracker; returns the stage directory."""
    for name in (
        "WANDB_PROJECT",
        "TENSORBOARD_LOGGING_DIR",
        "SWANLAB_LOG_DIR",
        "WANDB_NAME",
        "WANDB_RUN_GROUP",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    data = ["--train_files", write_jsonl("docs.jsonl", document_rows()), "--eval_ratio", 0.2]
    data += ["--model_config", write_model(tmp_path / "model.json"), "--tokenizer", tokenizer_dir]

    def start(tracker, **options):
        options = {
            "block_size": 32,
            "logging_steps": 1,
            "report_to": tracker,
            "sample_tokens": 4,
        } | options
        run_script(monkeypatch, "pretrain", *short_run(tmp_path / "run", **options), *data)
        return tmp_path / "run"

    wandb.teardown()  # else its run would be written where the last one of this process was
    yield start
    wandb.teardown()
    monkeypatch.undo()


def losses(stage):
    entries = [json.loads(line) for line in (stage / "train_log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_a_wandb_run_holds_what_the_log_holds_and_its_samples(run, tmp_path):
    stage = run("wandb")
    wandb.finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(
        losses(stage)
    )
    first = next(row for row in rows if "train/loss" in row)
    assert {
        "train/bits_per_byte",
        "train/learning_rate",
        "train/tokens_per_second",
        "train/memory_gib",
    } <= set(first)
    assert any(key.startswith("samples") for row in rows for key in row)
    (table,) = file.parent.glob("files/media/table/samples_*.table.json")
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    assert json.loads(table.read_text())["data"] == [
        [row["step"], row["prompt"], row["text"]] for row in samples
    ]
    opened = next(record["run"] for record in records if record["type"] == "run")
    pipeline = json.loads((stage / "stage.json").read_text())["pipeline"]
    assert opened["run_group"] == opened["config"]["update"]["pipeline"] == pipeline
    assert opened["job_type"] == "pretrain"


def test_tensorboard_holds_what_the_log_holds(run):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: board)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = run("tensorboard")
    events = EventAccumulator(str(stage / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        losses(stage), rel=1e-6
    )
    assert {"train/tokens_per_second", "train/bits_per_byte", "eval/bits_per_byte"} <= set(
        events.Tags()["scalars"]
    )


def test_trackio_holds_what_the_log_holds(run):
    pytest.importorskip("trackio", reason="trackio is not installed (extra: board)")
    stage = run("trackio")
    assert list(Path(os.environ["TRACKIO_DIR"]).glob("minimind*.db"))
    command = [
        str(Path(sys.executable).parent / "trackio"),
        "get",
        "metric",
        "--project",
        "minimind",
        "--json",
    ]
    command += ["--run", f"pretrain: {stage}", "--metric", "train/loss"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    metric = json.loads(done.stdout)
    assert [value["value"] for value in metric["values"]] == pytest.approx(losses(stage))


def test_swanlab_writes_what_the_log_holds_into_a_file_to_be_uploaded(run, monkeypatch, tmp_path):
    swanlab = pytest.importorskip("swanlab", reason="swanlab is not installed (extra: swanlab)")
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    stage = run("swanlab")
    swanlab.finish()  # as the end of the process does
    (file,) = (stage / "swanlog").rglob("*.swanlab")
    written = file.read_bytes()
    for name in (b"train/loss", b"train/bits_per_byte", b"samples"):
        assert name in written
    for loss in losses(stage):
        assert struct.pack("<d", loss) in written  # a protobuf double


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(run, capsys, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    message = failure(capsys, lambda: run("trackio"))
    assert (
        "--report_to trackio: it is not installed. Install it (pip install -e '.[board]' in"
        in message
    )


class Broken(TrainerCallback):
    """A tracker whose disk is full."""

    calls = 0

    def on_log(self, *args, **kwargs):
        Broken.calls += 1
        raise OSError("No space left on device\nand more")


def test_a_tracker_that_fails_is_left_out_and_the_run_continues(run, monkeypatch, capsys):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Broken)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: True)
    stage = run("tensorboard")
    assert len(losses(stage)) == 2
    assert Broken.calls == 1
    output = capsys.readouterr().err
    assert (
        output.count(
            "notice: broken failed (OSError: No space left on device); the run continues\n"
        )
        == 1
    )


def dashboard():
    return json.loads((ROOT / "configs" / "dashboard.json").read_text())


def drawn(names=None):
    return {
        metric
        for section in dashboard()["sections"]
        if names is None or section["name"] in names
        for panel in section["panels"]
        for metric in panel["metrics"]
    }


def test_the_dashboard_draws_what_the_stages_log(run):
    from transformers.integrations.integration_utils import rewrite_logs

    stage = run("none")
    entries = [json.loads(line) for line in (stage / "train_log.jsonl").read_text().splitlines()]
    logged = {name for entry in entries for name in rewrite_logs(entry)}
    assert drawn({"Learning", "Speed"}) - logged <= {"train/mfu"}


# On import of the package
@pytest.mark.filterwarnings("ignore:.*Pydantic V1 style:DeprecationWarning")
def test_the_dashboard_is_one_that_wandb_s_package_takes():
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    script = importlib.util.spec_from_file_location(
        "wandb_dashboard", ROOT / "scripts" / "wandb_dashboard.py"
    )
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    view = module.build(dashboard(), "me", "minimind")._to_model()
    text = view.spec.model_dump_json(by_alias=True)
    assert all(json.dumps(metric) in text for metric in drawn())


@pytest.mark.parametrize("stage", ["sft"])
def test_a_chat_stage_is_grouped_with_its_parent(run, stage, monkeypatch, tmp_path, write_jsonl):
    base = run("none")
    chats = write_jsonl("chats.jsonl", chat_rows())
    options = short_run(tmp_path / "sft", max_length=64, report_to="wandb", sample_steps=-1)
    monkeypatch.setattr(wandb, "finish", lambda *args, **kwargs: None)
    run_script(
        monkeypatch, "finetune_sft", *options, "--model_name_or_path", base, "--train_files", chats
    )
    try:
        assert wandb.run.group == json.loads((base / "stage.json").read_text())["pipeline"]
        assert wandb.run.config["parent"]["directory"] == str(base)
    finally:
        monkeypatch.undo()
        wandb.finish()
