"""Schedules, the best model, early stopping: what a run does at which step."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from pipeline import document_rows, failure, run_script, short_run, write_model
from safetensors.torch import load_file
from transformers import (
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from minimind.common.errors import UserError
from minimind.stage_directory import read_stage, weights_hash
from minimind.training import run as training_run
from minimind.training.arguments import PretrainConfig
from minimind.training.callbacks import Baseline, EarlyStopping
from minimind.training.checkpointing_trainer import CheckpointingTrainer
from minimind.training.command_line import parse
from minimind.training.trainers import ScheduledTrainer

STEPS, WARMUP, DECAY, PEAK = 10, 2, 3, 1e-3


def after_warmup(step, factor):
    """Factor of step `step` (the first is 0), its formula given the share of the way from the
    warm-up to the end."""
    return (step + 1) / WARMUP if step < WARMUP else factor((step - WARMUP) / (STEPS - WARMUP))


def wsd(step):
    return (
        min(1.0, (step + 1) / WARMUP)
        if step < STEPS - DECAY
        else 1 - math.sqrt((step - STEPS + DECAY) / DECAY)
    )


SCHEDULES = {
    "cosine_with_min_lr": lambda s: after_warmup(
        s, lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2
    ),
    "linear": lambda s: after_warmup(s, lambda p: 1 - p),
    "constant": lambda s: 1.0,
    "constant_with_warmup": lambda s: after_warmup(s, lambda p: 1.0),
    "warmup_stable_decay": wsd,
}


@pytest.fixture
def pretrain(monkeypatch, tmp_path, tokenizer_dir, write_jsonl):
    """Run pretrain.py on a few rows; returns the log's entries and the stage directory."""
    documents, model = (
        write_jsonl("docs.jsonl", document_rows()),
        write_model(tmp_path / "model.json"),
    )

    def run(name="run", **options):
        output = tmp_path / name
        # Some learning rates here are absurd on purpose, so findings must not stop the run.
        common = {"block_size": 32, "logging_steps": 1, "learning_rate": PEAK, "sample_steps": -1}
        options = common | {"on_findings": "warn"} | options
        data = ["--train_files", documents, "--model_config", model, "--tokenizer", tokenizer_dir]
        run_script(
            monkeypatch, "pretrain", *short_run(output, **options), *data, "--eval_ratio", 0.2
        )
        return [
            json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()
        ], output

    return run


def rates(log):
    return [entry["learning_rate"] for entry in log if "learning_rate" in entry]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_of_a_schedule_follows_its_formula(pretrain, schedule):
    log, _ = pretrain(
        max_steps=STEPS,
        lr_scheduler_type=schedule,
        warmup_steps=WARMUP / STEPS,
        lr_decay_steps=DECAY / STEPS,
    )
    assert rates(log) == pytest.approx(
        [PEAK * SCHEDULES[schedule](step) for step in range(STEPS)], rel=1e-6
    )


def factors(name, warmup_steps, steps, trainer=ScheduledTrainer, **kwargs):
    """The rate of each step over the peak, as a schedule of our trainer has it, or one of the
    library's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    args = TrainingArguments(
        report_to=[],
        lr_scheduler_type=name,
        warmup_steps=warmup_steps,
        lr_scheduler_kwargs=kwargs,
        use_cpu=True,
    )
    args.lr_decay_steps = kwargs.get("num_decay_steps", DECAY)
    bare = trainer.__new__(trainer)
    bare.args, bare.lr_scheduler, bare.optimizer = args, None, optimizer
    schedule = bare.create_scheduler(steps)
    found = []
    for step in range(steps):
        if step:
            optimizer.step()
            schedule.step()
        found.append(schedule.get_last_lr()[0] / PEAK)
    return found


KWARGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
    "polynomial": {"lr_end": 0.0},
}
SCHEDULED = [
    each.value for each in SchedulerType if each.value not in ("reduce_lr_on_plateau", "greedy")
]


@pytest.mark.parametrize("name", SCHEDULED)
def test_of_every_schedule_the_first_step_trains_and_what_follows_the_warmup_is_the_librarys(name):
    options = KWARGS.get(name, {})
    for warmup_steps, steps in ((0, 4), (0.05, 1), (1, 2), (3, 10)):
        found = factors(name, warmup_steps, steps, **options)
        theirs = factors(name, warmup_steps, steps, Trainer, **options)
        warm = math.ceil(warmup_steps * steps) if warmup_steps < 1 else warmup_steps
        assert found[warm:] == pytest.approx(theirs[warm:])
        if name != "constant":
            assert found[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
        assert min(found) > 0


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
def test_a_schedule_that_is_0_at_every_step_is_refused():
    with pytest.raises(UserError, match="learning rate 0 at each of the 4 steps"):
        factors("warmup_stable_decay", 0, 4, num_stable_steps=0, num_decay_steps=0)


def test_a_learning_rate_of_0_is_refused():
    with pytest.raises(UserError, match="--learning_rate 0: expected above 0"):
        parse(PretrainConfig, argv=["--learning_rate", "0", "--report_to", "none"])


def test_a_stable_run_decays_from_any_of_its_checkpoints(pretrain):
    options = {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": WARMUP,
        "lr_decay_steps": DECAY,
    }
    log, stable = pretrain(
        "stable",
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=4,
        save_total_limit=3,
        **options,
    )
    decayed, _ = pretrain(
        "decayed",
        max_steps=4 + DECAY,
        resume_from_checkpoint=stable / "checkpoint-4",
        **CHANGED,
        **options,
    )
    expected = [PEAK * (1 - math.sqrt(step / DECAY)) for step in range(DECAY)]
    assert rates(decayed)[-DECAY:] == pytest.approx(expected, rel=1e-6)
    # The run it came from was still at its peak
    assert rates(log)[4:7] == pytest.approx([PEAK] * 3)


# A resumed run whose recipe differs has to be asked for where runs compare recipes.
CHANGED = (
    {"allow_changed_recipe": True}
    if "allow_changed_recipe" in PretrainConfig.__dataclass_fields__
    else {}
)


def test_the_best_model_is_the_one_that_is_kept(pretrain, caplog):
    # The learning rate rises until the model is spoilt.
    options = {
        "learning_rate": 2.0,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 12,
    }
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    log, stage = pretrain(max_steps=8, **options)
    losses = {entry["step"]: entry["eval_loss"] for entry in log[:-1] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    record = read_stage(stage)
    assert 1 < best < 8
    assert record["best"] == {"metric": "eval_loss", "value": losses[best], "step": best}
    assert record["metrics"]["after"]["loss"] == pytest.approx(losses[best], abs=1e-5)
    kept, final = (
        load_file(stage / f"checkpoint-{best}" / "model.safetensors"),
        load_file(stage / "model.safetensors"),
    )
    assert all(torch.equal(kept[name], final[name]) for name in final)
    assert "missing keys" not in caplog.text  # the head is the embedding, and so in no file


def test_what_is_called_the_best_model_is_what_is_saved_also_in_a_run_that_was_moved(
    pretrain, monkeypatch, tmp_path, capsys
):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    options = {
        "learning_rate": 2.0,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 12,
        "max_steps": 6,
    }
    options |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
    }
    options |= {"save_steps": 1, "save_total_limit": 9}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training_run, "ADDITIONAL", [lambda trainer: Kill()])
        pretrain("run", **options)
    recorded = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    best = recorded["best_global_step"]
    assert best < 4
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone" / f"checkpoint-{best}")
    capsys.readouterr()

    _, stage = pretrain("moved", **options)
    assert f"the best model is that of step {best}: " in capsys.readouterr().out
    assert (read_stage(stage)["best"]["step"], read_stage(stage)["weights_step"]) == (best, best)
    assert weights_hash(stage) == weights_hash(stage / f"checkpoint-{best}")

    _, stage = pretrain("gone", **options)
    said = capsys.readouterr().out
    assert f"warning: the best evaluation is that of step {best}: " in said
    assert "checkpoint is not there: the weights of step 6 were saved" in said
    assert "the best model is that" not in said
    assert (read_stage(stage)["best"]["step"], read_stage(stage)["weights_step"]) == (best, 6)
    assert weights_hash(stage) == weights_hash(stage / "checkpoint-6")


def test_a_step_that_is_told_to_stop_and_was_not_saved_is_saved_before_the_best_model_is_loaded(
    monkeypatch,
):
    """Else the weights of the best step would stand in the checkpoint of the last one."""
    done = []
    trainer = CheckpointingTrainer.__new__(CheckpointingTrainer)
    trainer.interrupted, trainer.model, trainer.args, trainer.control = True, None, None, None
    trainer.state = SimpleNamespace(global_step=5, best_model_checkpoint="checkpoint-2")
    trainer._save_checkpoint = lambda model, trial: done.append("saved")
    trainer.callback_handler = SimpleNamespace(on_save=lambda *args: sys.exit(75))
    monkeypatch.setattr(Trainer, "_finalize_training", lambda *args: done.append("finalised"))
    monkeypatch.setattr(Trainer, "_load_best_model", lambda self: done.append("loaded"))
    with pytest.raises(SystemExit):
        trainer._finalize_training(None, 1, 0.0)
    trainer._load_best_model()
    assert done == ["saved"]


def test_training_stops_when_evaluations_stop_improving(pretrain, capsys):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "warmup_steps": 0,
    }
    log, stage = pretrain(max_steps=30, learning_rate=5.0, lr_scheduler_type="constant", **options)
    assert read_stage(stage)["steps"] == 2
    assert "stopping early: 2 evaluations did not improve eval_loss" in capsys.readouterr().out
    baseline = next(entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert read_stage(stage)["best"] == {
        "metric": "eval_loss",
        "value": pytest.approx(baseline),
        "step": 0,
    }


def test_the_threshold_is_what_an_evaluation_has_to_gain():
    args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    counts = []
    for threshold in (0.0, 0.1):
        stopping, state, control = EarlyStopping(3, threshold), TrainerState(), TrainerControl()
        for step, loss in enumerate((2.0, 1.95, 1.94, 1.7)):
            state.global_step = step
            stopping.on_evaluate(args, state, control, {"eval_loss": loss})
            state.best_metric = min(loss, state.best_metric or loss)
        counts.append(stopping.early_stopping_patience_counter)
    assert counts == [0, 0]
    stopping.on_evaluate(args, state, control, {"eval_loss": 1.65})
    assert stopping.early_stopping_patience_counter == 1


def test_a_resumed_run_goes_on_counting_towards_its_early_stop(tmp_path):
    stopping = EarlyStopping(3, 0.0)
    stopping.early_stopping_patience_counter = 2
    state = TrainerState(global_step=5, stateful_callbacks=[stopping])
    state.save_to_json(tmp_path / "trainer_state.json")
    resumed = EarlyStopping(3, 0.0)
    resumed.on_train_begin(None, TrainerState.load_from_json(tmp_path / "trainer_state.json"), None)
    assert resumed.early_stopping_patience_counter == 2


def test_the_evaluation_before_the_first_step_is_to_be_beaten():
    args = SimpleNamespace(metric_for_best_model="loss")
    state = TrainerState()
    Baseline().on_evaluate(args, state, None, {"eval_loss": 2.5})
    assert state.best_metric == 2.5
    state.global_step = 1
    Baseline().on_evaluate(args, state, None, {"eval_loss": 1.0})
    assert state.best_metric == 2.5  # later ones are the trainer's to compare


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--early_stopping_patience", "2"],
            "--early_stopping_patience compares evaluations: give --eval_strategy",
        ),
        (
            ["--load_best_model_at_end"],
            "--load_best_model_at_end compares evaluations: give --eval_strategy",
        ),
        (
            ["--early_stopping_patience", "0", "--eval_strategy", "epoch"],
            "--early_stopping_patience 0: expected at",
        ),
        (["--lr_decay_steps", "-1"], "--lr_decay_steps -1: expected at least 0"),
    ],
)
def test_what_cannot_be_chosen_is_said(capsys, words, message, tmp_path):
    from minimind.common.errors import reports_user_errors

    call = reports_user_errors(parse)
    assert message in failure(
        capsys, lambda: call(PretrainConfig, argv=["--output_dir", str(tmp_path / "x"), *words])
    )


def test_choosing_without_held_out_rows_is_refused(pretrain, capsys):
    options = {"eval_strategy": "epoch", "early_stopping_patience": 1, "max_eval_rows": 0}
    assert "need held-out rows, and there are none" in failure(capsys, lambda: pretrain(**options))


def test_fewer_bits_per_byte_are_better(tmp_path):
    words = ["--eval_strategy", "epoch", "--load_best_model_at_end"]
    metric = [
        "--metric_for_best_model",
        "eval_bits_per_byte",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    (config,) = parse(PretrainConfig, argv=[*words, *metric])
    assert config.greater_is_better is False
    assert config.save_strategy == "best"
