"""Checkpoints: when one is complete, which are kept, and which is the best."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from minimind.training.checkpoints import (
    best_of,
    last_complete_checkpoint,
    problem_of,
    read_manifest,
    rotate,
    write_manifest,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def checkpoint_of(directory, step, whole=True):
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "rng_state.pth").write_bytes(b"x" * step)
    write_manifest(path, step=step, processes=1)
    if not whole:
        (path / "rng_state.pth").write_bytes(b"")
    return path


def test_rotation_keeps_whole_checkpoints_where_newer_ones_are_broken(tmp_path):
    for step, whole in ((2, True), (4, True), (6, False), (8, False), (10, True)):
        checkpoint_of(tmp_path, step, whole)
    rotate(tmp_path, 2, [tmp_path / "checkpoint-10"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10"}


def test_rotation_keeps_the_best_and_the_one_just_written_beyond_its_limit(tmp_path):
    for step in (2, 4, 6):
        checkpoint_of(tmp_path, step)
    rotate(tmp_path, 1, [tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    rotate(tmp_path, None, [])
    assert len(list(tmp_path.iterdir())) == 2


def test_rotation_counts_checkpoints_of_weights_alone(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint = checkpoint_of(tmp_path, step)
        (checkpoint / "rng_state.pth").rename(checkpoint / "model.safetensors")
        write_manifest(checkpoint, step=step, processes=1)
        assert problem_of(checkpoint) == "it holds weights alone (--save_only_model)"
        rotate(tmp_path, 3, [checkpoint])
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-5",
    }


def state_of(directory, step, history, best):
    checkpoint = checkpoint_of(directory, step)
    state = {"log_history": history, "best_model_checkpoint": best}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    return checkpoint


def test_the_best_checkpoint_is_found_beside_its_run_wherever_that_is(tmp_path):
    log = [
        {"step": 1, "eval_loss": float("nan"), "eval_runtime": 0.1234},
        {"step": 2, "eval_loss": 2.0},
    ]
    best = str(tmp_path / "old" / "checkpoint-1")
    state_of(tmp_path / "run", 1, log[:1], best)
    last = state_of(tmp_path / "run", 2, log, best)
    assert best_of(last) == str(tmp_path / "run" / "checkpoint-1")
    # A run that branched off another finds it there; one of another history is not it, nor one that
    # is gone.
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    assert best_of(last) is None
    state_of(tmp_path / "old", 1, [{"step": 1, "eval_loss": 1.0}], best)
    assert best_of(last) is None
    (tmp_path / "old" / "checkpoint-1" / "trainer_state.json").write_text(
        json.dumps({"log_history": log[:1]})
    )
    assert best_of(last) == best


def test_the_librarys_rotation_would_have_deleted_the_last_complete_checkpoint(tmp_path):
    """Why it is replaced: by its count the two broken ones are the two to keep."""
    from transformers.trainer_utils import rotate_checkpoints

    for step, whole in ((2, True), (4, False), (6, False)):
        checkpoint_of(tmp_path, step, whole)
    rotate_checkpoints(str(tmp_path), save_total_limit=2)
    assert last_complete_checkpoint(tmp_path)[0] is None


def test_every_file_of_a_checkpoint_is_on_the_disk_before_its_manifest_appears(
    monkeypatch, tmp_path
):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    files = [checkpoint / "model.safetensors", checkpoint / "global_step1" / "optim_states.pt"]
    for file in files:
        file.write_bytes(b"0" * 100)
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append((os.fstat(descriptor).st_ino, (checkpoint / "manifest.json").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_manifest(checkpoint, step=1, processes=1)
    for path in (*files, checkpoint / "global_step1", checkpoint / "manifest.json"):
        # The manifest under the name that it is written by
        assert (path.stat().st_ino, False) in synced, path
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_a_checkpoint_of_an_older_version_is_looked_at_for_weights_that_are_not_finite(
    make_trainer, tmp_path
):
    make_trainer(save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert read_manifest(checkpoint)["finite"] is True
    write_manifest(checkpoint, step=6, processes=1)
    assert problem_of(checkpoint) is None
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][7] = float("nan")
    save_file(weights, checkpoint / "model.safetensors")
    write_manifest(checkpoint, step=6, processes=1)
    found, (problem,) = last_complete_checkpoint(tmp_path / "run")
    assert found.name == "checkpoint-3"
    assert "model.norm.weight, holds weights that are not finite" in problem
