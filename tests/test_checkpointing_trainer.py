"""A checkpoint is complete, or left out with one message, and the run continues."""

import errno
import os
import resource
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_run import STEPS, names, spoil
from transformers import Trainer, TrainerCallback

from minimind.common.errors import UserError
from minimind.training import saving
from minimind.training.checkpoints import (
    last_complete_checkpoint,
)
from minimind.training.run import Stage
from minimind.training.saving import checkpoint_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def is_finite(checkpoint):
    return all(
        torch.isfinite(value).all()
        for value in load_file(checkpoint / "model.safetensors").values()
    )


def test_weights_that_are_not_finite_end_the_run_before_they_push_out_the_good_checkpoints(
    make_trainer, monkeypatch, tmp_path
):
    spoil(monkeypatch, {3}, "gradient")
    trainer = make_trainer(
        max_nonfinite_steps=0, save_strategy="steps", save_steps=1, save_total_limit=2
    )
    with pytest.raises(
        UserError,
        match=r"after step 3 the weights are not finite.*continues from \S+checkpoint-2\.",
    ):
        trainer.train()
    assert names(tmp_path / "run") == {"checkpoint-1", "checkpoint-2"}
    assert all(map(is_finite, (tmp_path / "run").glob("checkpoint-*")))
    assert last_complete_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", [])


def test_final_weights_that_are_not_finite_are_no_complete_stage(make_trainer):
    trainer = make_trainer(guarded=False)
    trainer.check_weights()
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[3, 1] = float("inf")
    stage = object.__new__(Stage)
    with pytest.raises(
        UserError,
        match=r"not finite: model.embed_tokens.weight.*There is no earlier checkpoint",
    ):
        stage.finish(trainer, None, {})


def test_a_checkpoint_that_falls_due_at_a_skipped_step_is_written_at_the_next_that_is_finite(
    make_trainer, monkeypatch, tmp_path, capsys
):
    spoil(monkeypatch, {2, 6})
    make_trainer(save_strategy="steps", save_steps=2, save_total_limit=None).train()
    assert names(tmp_path / "run") == {"checkpoint-3", "checkpoint-4"}
    assert "step 2: no checkpoint, since the step is not finite" in capsys.readouterr().err


def test_a_checkpoint_without_room_is_left_out_and_training_goes_on(
    make_trainer, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "step 3: no checkpoint, training continues. " in capsys.readouterr().err


def full(*args, **kwargs):
    """Stands for a call of the system on a disk without room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        # These as the libraries hide it: the disk has to be asked, unless there is a number of the
        # system.
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=["EIO", "EROFS", "torch", "iostream", "safetensors"],
)
def test_a_disk_that_fills_while_a_checkpoint_is_written_costs_it_and_not_the_run(
    make_trainer, monkeypatch, tmp_path, capsys, error
):
    write = Trainer._save_optimizer_and_scheduler

    def fail_once(self, directory):
        if self.state.global_step != 2:
            return write(self, directory)
        if not isinstance(error, (OSError, SafetensorError)):
            # What the probe is written to
            monkeypatch.setattr(saving.tempfile, "TemporaryFile", full)
        raise error

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail_once)
    trainer = make_trainer(save_strategy="steps", save_steps=2, save_total_limit=None)
    trainer.train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert "step 2: no checkpoint, training continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["shape mismatch", "unexpected pos 64 vs 0", "I/O error: no space left on device"]
)
def test_errors_of_a_save_are_not_hidden_where_the_disk_is_well_whatever_their_words(
    make_trainer, monkeypatch, words
):
    def fail(self, directory):
        raise RuntimeError(words)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(RuntimeError, match=words):
        make_trainer(save_strategy="steps", save_steps=2).train()


def test_a_real_limit_of_the_size_of_files_costs_a_checkpoint_and_not_the_run(
    make_trainer, tmp_path, capsys
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            size = 60_000 if state.global_step == 1 else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    trainer = make_trainer(save_strategy="steps", save_steps=2, save_total_limit=None)
    trainer.add_callback(Limit())
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "run") == {"checkpoint-4", "checkpoint-6"}
    assert "checkpoint-2 could not be written: File too large" in capsys.readouterr().err


def test_a_best_checkpoint_that_found_no_room_is_not_the_best_one(
    make_trainer, monkeypatch, tmp_path
):
    trainer = make_trainer(save_strategy="steps", save_steps=2, metric_for_best_model="loss")

    class Evaluation(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 4):
                trainer._determine_best_metric({"eval_loss": -state.global_step}, None)
            if state.global_step == 4:
                assert state.best_global_step == 4
                monkeypatch.setattr(
                    saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1)
                )

    trainer.add_callback(Evaluation())
    trainer.train()
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (-2, 2)
    assert state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")


def test_the_size_of_a_checkpoint_is_foreseen(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=3, max_steps=3, optim="adamw_torch")
    foreseen = checkpoint_bytes(trainer.model, deepspeed=False)
    trainer.train()
    files = [
        tmp_path / "run" / "checkpoint-3" / name for name in ("model.safetensors", "optimizer.pt")
    ]
    assert foreseen == pytest.approx(sum(file.stat().st_size for file in files), rel=0.15)
    assert trainer.needed >= foreseen
