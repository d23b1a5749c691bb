"""A run that another number of processes continues takes the same rows, and ends where the undisturbed one does."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import NAMES, short_run, write_model

from minimind.errors import UserError
from minimind.training.arguments import PretrainConfig
from minimind.training.elastic import Batch, saved_processes

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
needs_deepspeed = pytest.mark.skipif(not (BIN / "deepspeed").exists(), reason="DeepSpeed is not installed")


def checkpoint(path, batch, sharded=False):
    """What the code looks at in a checkpoint."""
    path.mkdir()
    record = {"processes": batch[0], "per_device_train_batch_size": batch[1], "gradient_accumulation_steps": batch[2]}
    state = {"stateful_callbacks": {"BatchRecord": {"args": {}, "attributes": {"batch": record}}}}
    (path / "trainer_state.json").write_text(json.dumps(state))
    names = ["rng_state.pth"] if batch[0] == 1 else [f"rng_state_{rank}.pth" for rank in range(batch[0])]
    for name in names:
        (path / name).touch()
    if sharded:
        (path / "global_step2").mkdir()
    return path


def resumed(path, processes, monkeypatch, **options):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    # The group of processes is not there: only what happens before it is asked for is looked at.
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    return PretrainConfig(output_dir="x", report_to="none", resume_from_checkpoint=str(path), **options)


@pytest.mark.parametrize(
    ("saved", "processes", "micro_batch", "accumulation"),
    [
        ((1, 8, 4), 2, 8, 2),
        ((2, 8, 2), 1, 8, 4),
        ((2, 4, 2), 4, 4, 1),
        ((1, 8, 1), 2, 4, 1),  # no accumulation left to divide: smaller micro-batches
        ((1, 8, 3), 4, 6, 1),
        ((3, 4, 1), 2, 3, 2),
        ((2, 8, 2), 2, 5, 7),  # the same number of processes: nothing of ours
    ],
)
def test_the_rows_of_a_step_stay_the_same(saved, processes, micro_batch, accumulation, tmp_path, monkeypatch):
    given = {"per_device_train_batch_size": saved[1], "gradient_accumulation_steps": saved[2]}
    if saved[0] == processes:
        given = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    args = resumed(checkpoint(tmp_path / "checkpoint-2", saved), processes, monkeypatch, **given)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (micro_batch, accumulation)


def test_every_division_that_is_possible_is_found_and_keeps_the_rows():
    for processes, micro_batch, accumulation, now in itertools.product(
        (1, 2, 3, 4), (1, 3, 8), (1, 2, 5), (1, 2, 3, 6)
    ):
        saved = Batch(processes, micro_batch, accumulation)
        found = saved.shared_by(now)
        assert (found is None) == (saved.rows % now != 0)
        assert found is None or (found.rows == saved.rows and found.per_device_train_batch_size <= micro_batch)


def test_a_user_who_has_shared_out_the_rows_anew_gets_the_same_rows(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "checkpoint-2", (2, 8, 2))
    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    assert resumed(path, 1, monkeypatch, **given).gradient_accumulation_steps == 4


def test_a_batch_that_cannot_be_divided_is_one_error_with_the_numbers_that_work(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "checkpoint-2", (2, 2, 2))
    with pytest.raises(UserError, match=r"8 rows .* 3 processes cannot share evenly. Start 1, 2, 4 or 8 processes"):
        resumed(path, 3, monkeypatch, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_a_checkpoint_of_the_other_engine_is_refused_since_its_optimizer_state_would_be_lost(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"written with DeepSpeed, this run is without it.*Give --deepspeed"):
        resumed(checkpoint(tmp_path / "checkpoint-2", (2, 2, 2), sharded=True), 2, monkeypatch)
    with pytest.raises(UserError, match=r"written without DeepSpeed, this run is with it.*Leave out --deepspeed"):
        resumed(checkpoint(tmp_path / "checkpoint-3", (1, 2, 2)), 1, monkeypatch, deepspeed="ds_config_zero2.json")


def test_an_optimizer_whose_shards_cannot_be_converted_keeps_its_number_of_processes(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "checkpoint-2", (2, 2, 2), sharded=True)
    with pytest.raises(UserError, match=r"muon cannot be shared out anew.*Start 2 processes"):
        resumed(path, 1, monkeypatch, deepspeed="ds_config_zero2.json", optim="muon")


# --- with a launcher -----------------------------------------------------------------------------------------------

STEPS = 60
ROWS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tokenizer_dir):
    """Start pretrain.py with some processes; returns its losses by step, its directory and what it printed."""
    root = tmp_path_factory.mktemp("elastic")
    words = random.Random(0)
    rows = [{"text": " ".join(words.choices([*NAMES, "runs", "sleeps", "狐狸", "回家"], k=40))} for _ in range(200)]
    (root / "docs.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    data = ["--model_config", write_model(root / "model.json"), "--tokenizer", tokenizer_dir, "--train_files"]
    data += [root / "docs.jsonl", "--block_size", "32", "--eval_ratio", "0.1"]
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "MINIMIND_CACHE": str(root / "cache"),
    }
    environment |= {"OMP_NUM_THREADS": "1"}

    def run(name, processes, *extra, fails=False, **options):
        options = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 2e-3} | options
        options = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 10} | options
        launcher = [sys.executable] if processes == 1 else ["torchrun", "--standalone", "--nproc_per_node", processes]
        command = [*launcher, "pretrain.py", *short_run(root / name, **options), *data, *extra]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
        if fails:
            assert done.returncode != 0
            return done.stderr
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        log = [json.loads(line) for line in (root / name / "train_log.jsonl").read_text().splitlines()]
        return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}, root / name, done.stdout

    return run


def assert_continues(losses, undisturbed, first):
    assert list(losses) == list(range(first, STEPS + 1))
    assert max(abs(loss - undisturbed[step]) for step, loss in losses.items()) < 1e-3


@pytest.mark.launcher
def test_one_two_and_one_process_again_continue_one_curve(launch):
    undisturbed, one, _ = launch("one", 1, **ROWS)
    losses, two, said = launch("two", 2, "--resume_from_checkpoint", one / "checkpoint-10", **ROWS)
    assert "this run goes on with 4 rows (2 x 1 accumulation x 2 processes)" in said
    assert saved_processes(two / "checkpoint-20") == 2
    assert_continues(losses, undisturbed, 11)
    losses, _, said = launch("again", 1, "--resume_from_checkpoint", two / "checkpoint-30", **ROWS)
    assert "this run goes on with 4 rows (2 x 2 accumulation x 1 process)" in said
    assert_continues(losses, undisturbed, 31)


@pytest.mark.launcher
@needs_deepspeed
def test_two_one_and_four_processes_continue_one_curve_under_zero_2(launch):
    zero = ("--deepspeed", "ds_config_zero2.json")
    undisturbed, two, _ = launch("zero2", 2, *zero, **ROWS)
    losses, one, said = launch("zero1", 1, *zero, "--resume_from_checkpoint", two / "checkpoint-10", **ROWS)
    assert "this run goes on with 8 rows (2 x 4 accumulation x 1 process)" in said
    assert_continues(losses, undisturbed, 11)
    losses, four, said = launch("zero4", 4, *zero, "--resume_from_checkpoint", one / "checkpoint-20", **ROWS)
    assert "this run goes on with 8 rows (2 x 1 accumulation x 4 processes)" in said
    assert_continues(losses, undisturbed, 21)
    assert not list(one.glob(".universal*"))  # the converted copy is gone
    assert len(list(four.glob("checkpoint-30/global_step30/*optim_states.pt"))) == 4
