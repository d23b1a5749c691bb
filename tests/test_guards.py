"""A fault in a run: what is skipped, what is said, what is left behind."""

import errno
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from pipeline import document_rows, failure, run_script, short_run, write_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, get_cosine_with_min_lr_schedule_with_warmup

from minimind import MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.data.packing import BlockCollator
from minimind.training import guards, memory_growth, saving
from minimind.training.arguments import PretrainConfig
from minimind.training.callback_handler import Decoration
from minimind.training.checkpointing_trainer import DueCheckpointCallback
from minimind.training.checkpoints import (
    last_complete_checkpoint,
    problem_of,
    read_manifest,
    write_manifest,
)
from minimind.training.guards import GuardCallback
from minimind.training.kept_batches import read_batch
from minimind.training.memory_growth import MemoryCallback, growth
from minimind.training.optimizers import build_optimizer
from minimind.training.progress import ProgressCallback
from minimind.training.run import Stage
from minimind.training.saving import NotWrittenError, check_writable, checkpoint_bytes
from minimind.training.trainers import BlockTrainer

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


class Witness(TrainerCallback):
    """Weights, optimizer state and learning rate after each step."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.moments, self.rates = trainer, [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self._note()

    def on_step_end(self, args, state, control, **kwargs):
        self._note()

    def _note(self):
        trainer = self.trainer
        self.weights.append([p.detach().clone() for p in trainer.model.parameters()])
        inner = trainer.optimizer.optimizer
        parts = getattr(inner, "parts", [inner])
        self.moments.append(
            [
                v.clone()
                for part in parts
                for s in part.state.values()
                for v in s.values()
                if torch.is_tensor(v)
            ]
        )
        self.rates.append(trainer.lr_scheduler.get_last_lr()[0])


@pytest.fixture
def make_trainer(config, tokenizer, tmp_path):
    def make(guarded=True, **options):
        options = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "report_to": "none",
            "bf16": False,
        } | options
        options = {
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "warmup_steps": 0,
        } | options
        options = {"save_strategy": "no"} | options
        args = PretrainConfig(output_dir=str(tmp_path / "run"), block_size=16, **options)
        torch.manual_seed(0)
        model = MiniMindForCausalLM(config)
        ids = torch.randint(
            5, config.vocab_size, (64, 16), generator=torch.Generator().manual_seed(1)
        )
        trainer = BlockTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy"),
            data_collator=BlockCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
            processing_class=tokenizer,
            optimizers=(build_optimizer(model, args), None),
        )
        Path(args.output_dir).mkdir(exist_ok=True)
        if guarded:
            trainer.guard = GuardCallback(trainer) if args.max_nonfinite_steps else None
            for callback in (DueCheckpointCallback(trainer), trainer.guard, MemoryCallback()):
                if callback:
                    trainer.add_callback(callback)
        trainer.witness = Witness(trainer)
        trainer.add_callback(trainer.witness)
        return trainer

    return make


def spoil(monkeypatch, steps, kind="loss", micro_batch=0):
    """Make the loss or the gradients of some steps not finite, as a fault in model or data
    would."""
    forward = MiniMindForCausalLM.forward
    calls = {"count": 0}

    @wraps(forward)
    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            step, number = divmod(calls["count"], spoilt.micro_batches)
            calls["count"] += 1
            if step + 1 in steps and number == micro_batch:
                if kind == "gradient":
                    output.loss.register_hook(lambda gradient: gradient * float("inf"))
                elif kind == "empty":  # the mean over no token: its gradient is 0
                    output.loss = output.loss * 0 + float("nan")
                else:  # a value alone, its gradient stays finite
                    output.loss = output.loss + (float("nan") if kind == "loss" else float("inf"))
        return output

    spoilt.micro_batches = 1
    monkeypatch.setattr(MiniMindForCausalLM, "forward", spoilt)
    return spoilt


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_guards_change_no_bit_of_a_healthy_run(make_trainer, optim):
    runs = [make_trainer(guarded, optim=optim) for guarded in (True, False)]
    for trainer in runs:
        trainer.train()
    for one, other in zip(*(trainer.witness.weights for trainer in runs), strict=True):
        assert equal(one, other)
    logs = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in runs]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("optim", "kind"),
    [
        ("adamw_torch_fused", "loss"),
        ("adamw_torch_fused", "inf"),
        ("adamw_torch_fused", "empty"),
        ("adamw_torch_fused", "gradient"),
        ("adamw_torch", "gradient"),
        ("muon", "empty"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule(
    make_trainer, monkeypatch, optim, kind
):
    healthy = make_trainer(guarded=False, optim=optim)
    healthy.train()
    spoil(monkeypatch, {3}, kind)
    trainer = make_trainer(optim=optim)
    trainer.train()
    seen = trainer.witness
    for step in range(1, STEPS + 1):
        assert equal(seen.weights[step], seen.weights[step - 1]) == (step == 3), step
    assert equal(seen.moments[3], seen.moments[2])
    assert seen.rates == healthy.witness.rates
    assert equal(seen.weights[2], healthy.witness.weights[2])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_very_first_step_may_be_skipped(make_trainer, monkeypatch):
    spoil(monkeypatch, {1})
    trainer = make_trainer(optim="adamw_torch")
    trainer.train()
    assert equal(trainer.witness.weights[0], trainer.witness.weights[1])
    assert not equal(trainer.witness.weights[1], trainer.witness.weights[2])


def test_one_bad_micro_batch_skips_its_whole_step(make_trainer, monkeypatch):
    spoil(monkeypatch, {2}, micro_batch=1).micro_batches = 4
    trainer = make_trainer(gradient_accumulation_steps=4)
    trainer.train()
    assert equal(trainer.witness.weights[2], trainer.witness.weights[1])
    assert not equal(trainer.witness.weights[3], trainer.witness.weights[2])


def test_without_the_guard_one_bad_step_spoils_the_weights(make_trainer, monkeypatch):
    spoil(monkeypatch, {3}, "gradient")
    trainer = make_trainer(max_nonfinite_steps=0)
    trainer.train()
    assert not all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_the_logged_loss_is_the_mean_of_the_steps_taken(make_trainer, monkeypatch, capsys):
    spoil(monkeypatch, {2})
    single = make_trainer()
    single.train()
    each = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
    monkeypatch.undo()
    spoil(monkeypatch, {2})
    trainer = make_trainer(logging_steps=3, logging_first_step=False)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx((each[0] + each[2]) / 2, rel=1e-6)
    assert logs[1]["loss"] == pytest.approx(sum(each[3:]) / 3, rel=1e-6)
    assert [entry["skipped_steps"] for entry in logs] == [1, 1]
    assert "step 2: loss nan" in capsys.readouterr().err


def test_too_many_bad_steps_in_a_row_end_the_run_and_leave_batch_and_weights(
    make_trainer, monkeypatch, tmp_path
):
    spoil(monkeypatch, {2, 4, 5, 6})
    trainer = make_trainer(max_nonfinite_steps=3)
    with pytest.raises(UserError, match=r"3 steps in a row.*minimind replay") as error:
        trainer.train()
    assert trainer.state.global_step == STEPS - 1  # the count began anew after step 3
    directory = tmp_path / "run" / "bad_batch-6"
    assert str(directory) in str(error.value)
    record, batches = read_batch(directory)
    assert record["step"] == 6
    assert record["weights"] == "model"
    assert batches[0][0]["input_ids"].shape == (2, 16)
    from minimind.stage_directory import load_model

    kept = load_model(directory / "model").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in trainer.model.state_dict().items())
    assert not list(directory.glob(".*"))


def names(directory):
    return {path.name for path in directory.glob("checkpoint-*")}


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


@pytest.mark.parametrize(("first", "left"), [(2, None), (3, 1)])
def test_after_too_many_bad_steps_the_same_command_goes_back_behind_the_weights_they_met(
    make_trainer, monkeypatch, tmp_path, first, left
):
    spoil(monkeypatch, {first, first + 1})
    trainer = make_trainer(max_nonfinite_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(UserError, match="2 steps in a row"):
        trainer.train()
    met = tmp_path / "run" / f"checkpoint-{first - 1}"
    assert problem_of(met) is None  # it can be asked for by name
    if left is None:
        with pytest.raises(
            UserError,
            match=r"the 2 steps that followed were not finite\. There is no checkpoint before",
        ):
            last_complete_checkpoint(tmp_path / "run")
    else:
        found, (problem,) = last_complete_checkpoint(tmp_path / "run")
        assert found.name == f"checkpoint-{left}"
        assert problem.startswith(f"skipped {met}: ")


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


def test_a_loss_far_above_the_last_ones_is_noticed_once(make_trainer, capsys):
    trainer = make_trainer()
    guard = trainer.guard
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        guard._compare(step, 2.0 + 0.1 * torch.randn(1, generator=generator).item())
    assert "notice" not in capsys.readouterr().err
    guard._compare(60, 4.0)
    guard._compare(61, 4.1)
    assert capsys.readouterr().err.count("notice: step 60: loss 4.0000") == 1
    assert guard.spike > guards.SPIKE


def test_a_falling_or_slowly_rising_loss_is_no_spike(make_trainer, capsys):
    guard = GuardCallback(make_trainer(guarded=False))
    for step in range(200):
        guard._compare(step, 8.0 - 0.03 * step)
    for step in range(100):
        guard._compare(step, 2.0 + 0.005 * step)
    assert capsys.readouterr().err == ""


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


@pytest.mark.parametrize(
    ("fault", "raised"),
    [((errno.ENOSPC, "No space left on device"), NotWrittenError), (None, RuntimeError)],
)
def test_what_one_process_could_not_write_all_processes_know(monkeypatch, tmp_path, fault, raised):
    monkeypatch.setattr(
        saving, "gather_object", lambda own: [*own, ("RuntimeError: unexpected pos", fault)]
    )
    with pytest.raises(raised, match="could not"):
        saving.Writing(tmp_path / "checkpoint-1", 0).check()


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True
    ).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_really_full_disk_ends_a_stage_with_one_message(
    monkeypatch, tmp_path, write_jsonl, capsys, small_disk
):
    (small_disk / "filler").write_bytes(bytes(900_000))
    options = [*short_run(small_disk / "run", block_size=32, on_findings="warn"), "--train_files"]
    options += [write_jsonl("d.jsonl", document_rows())]
    message = failure(
        capsys,
        run_script,
        monkeypatch,
        "pretrain",
        *options,
        "--model_config",
        write_model(tmp_path / "m.json"),
    )
    assert "could not be written" in message
    assert "MB free" in message
    assert not (small_disk / "run" / "model.safetensors").exists()
    assert not (small_disk / "run" / "stage.json").exists()


def test_a_read_only_output_directory_is_refused_before_anything_runs(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        check_writable(small_disk / "run")


def test_a_tracker_that_loses_its_network_does_not_end_the_run(make_trainer, monkeypatch, capsys):
    from transformers.integrations import TensorBoardCallback

    class Lost(TensorBoardCallback):
        def __init__(self):
            self.calls = 0

        def on_train_begin(self, *args, **kwargs):
            pass

        def on_log(self, *args, **kwargs):
            self.calls += 1
            raise ConnectionError("network is unreachable")

    trainer = make_trainer(guarded=False)
    lost = Lost()
    trainer.add_callback(lost)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert lost.calls == 1
    assert (
        capsys.readouterr().err.count(
            "notice: lost failed (ConnectionError: network is unreachable)"
        )
        == 1
    )


def test_a_log_file_that_cannot_be_written_does_not_end_the_run(make_trainer, tmp_path, capsys):
    trainer = make_trainer(guarded=False)
    trainer.add_callback(ProgressCallback(tmp_path / "gone"))
    trainer.train()
    assert capsys.readouterr().err.count("notice: progress failed (FileNotFoundError: ") == 1


def test_a_decoration_that_fails_is_asked_again_and_nothing_else_is_forgiven(make_trainer, capsys):
    class Failing:
        def on_log(self, *args, **kwargs):
            Broken.calls += 1
            raise KeyError("loss")

    class Broken(Failing, Decoration):
        calls = 0

    class NoDecoration(Failing, TrainerCallback):
        pass

    trainer = make_trainer(guarded=False)
    trainer.add_callback(Broken())
    trainer.train()
    assert Broken.calls == STEPS + 1
    assert (
        capsys.readouterr().err.count("notice: broken failed (KeyError: 'loss'); the run continues")
        == 1
    )

    trainer = make_trainer(guarded=False)
    trainer.add_callback(NoDecoration())
    with pytest.raises(KeyError):
        trainer.train()


def test_growing_memory_is_noticed_and_a_filling_cache_is_not():
    leak = [(step, 1e9 + step * 20e6) for step in range(30)]
    assert growth(leak) == pytest.approx(400e6)
    assert growth([(step, 1e9 + min(step, 8) * 60e6) for step in range(30)]) == 0
    assert growth([(step, 1e9 + (step % 2) * 500e6) for step in range(30)]) == 0
    assert growth([(step, 10e9 + step * 20e6) for step in range(30)]) == 0  # 4 % of what there was


def test_the_memory_watch_reads_the_real_memory_of_the_process(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr(memory_growth, "SAMPLES", 6)
    monkeypatch.setattr(memory_growth, "GROWN_BYTES", 20e6)
    monkeypatch.setattr(memory_growth, "GROWTH", 0.0)
    held, private = [], mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    class Leak(TrainerCallback):
        def on_log(self, *args, **kwargs):
            # A tensor may get pages that were freed before
            held.append(mmap.mmap(-1, 20_000_000, flags=private))
            held[-1].write(b"1" * 20_000_000)

    trainer = make_trainer(guarded=False, max_steps=8)
    trainer.add_callback(Leak())
    trainer.add_callback(MemoryCallback())
    trainer.train()
    said = capsys.readouterr().err
    assert "the memory of the process has grown by" in said
    assert 60 < float(said.split("grown by ")[1].split(" MB")[0]) < 100  # four logs of 20 MB


def test_the_size_of_a_checkpoint_is_foreseen(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=3, max_steps=3, optim="adamw_torch")
    foreseen = checkpoint_bytes(trainer.model, deepspeed=False)
    trainer.train()
    files = [
        tmp_path / "run" / "checkpoint-3" / name for name in ("model.safetensors", "optimizer.pt")
    ]
    assert foreseen == pytest.approx(sum(file.stat().st_size for file in files), rel=0.15)
    assert trainer.needed >= foreseen


def test_the_counts_reach_the_log_of_a_whole_run(monkeypatch, tmp_path, write_jsonl):
    compute_loss = BlockTrainer.compute_loss

    def spoilt(self, model, *args, **kwargs):  # not the model's own, which the doctor calls too
        loss = compute_loss(self, model, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step == 1 else loss

    monkeypatch.setattr(BlockTrainer, "compute_loss", spoilt)
    options = short_run(tmp_path / "run", block_size=32, max_steps=3, logging_steps=1)
    options += ["--train_files", write_jsonl("docs.jsonl", document_rows())]
    run_script(
        monkeypatch, "pretrain", *options, "--model_config", write_model(tmp_path / "model.json")
    )
    entries = [
        json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()
    ]
    assert [entry.get("skipped_steps") for entry in entries if "loss" in entry] == [None, 1, 1]
    assert (tmp_path / "run" / "bad_batch-2" / "batch.json").is_file()


def several_processes(output, steps, *deepspeed):
    """Run guarded_run.py in two processes; returns what each saw."""
    output.mkdir()
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*map(str, command), "tests/guarded_run.py", str(output), steps, *deepspeed],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads((output / f"seen-{rank}.json").read_text()) for rank in range(2)]


needs_deepspeed = pytest.mark.skipif(
    not shutil.which("deepspeed"), reason="DeepSpeed is not installed"
)


@pytest.mark.launcher
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param((), id="ddp"),
        pytest.param(
            ("ds_config_zero2.json",), id="zero2", marks=[needs_deepspeed, pytest.mark.slow]
        ),
    ],
)
def test_one_process_with_a_bad_loss_makes_all_skip_and_stop_at_the_same_step(tmp_path, engine):
    """Steps 3, 5 and 6 of 6 are bad on the second process alone, and two in a row stop the run."""
    one, other = several_processes(tmp_path / "run", "3,5,6", *engine)
    assert one["weights"] == other["weights"]
    changed = [
        before != after for before, after in zip(one["weights"], one["weights"][1:], strict=False)
    ]
    assert changed == [True, False, True, False]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, STEPS, min_lr_rate=0.1)
    for rates in zip(one["rates"], other["rates"], strict=True):
        optimizer.step()
        schedule.step()
        assert rates == pytest.approx(schedule.get_last_lr() * 2)
    finite = [loss != "nan" for loss in one["losses"]]
    assert finite == [True, True, False, True, False]
    assert all("2 steps in a row" in each["stopped"] for each in (one, other))
    directory = tmp_path / "run" / "bad_batch-6"
    record, batches = read_batch(directory)
    assert record["processes"] == 2
    assert sorted(batches) == [0, 1]
    assert len(batches[1]) == 2  # micro-batches
    assert not torch.equal(batches[0][0]["input_ids"], batches[1][0]["input_ids"])
    assert (directory / "model" / "model.safetensors").is_file()
