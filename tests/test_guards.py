"""A step that is not finite is skipped, and several in a row end the run."""

import json
import shutil

import pytest
import torch
from pipeline import document_rows, run_script, short_run, write_model
from ranks import run_ranks
from small_run import STEPS, equal, spoil
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from minimind.common.errors import UserError
from minimind.training import guards
from minimind.training.checkpoints import (
    last_complete_checkpoint,
    problem_of,
)
from minimind.training.guards import GuardCallback
from minimind.training.kept_batches import read_batch
from minimind.training.trainers import BlockTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


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
    run_ranks("tests/guarded_run.py", output, steps, *deepspeed, log=output / "log")
    return [json.loads((output / f"seen-{rank}.json").read_text()) for rank in range(2)]


needs_deepspeed = pytest.mark.skipif(
    not shutil.which("deepspeed"), reason="DeepSpeed is not installed"
)


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
