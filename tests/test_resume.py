"""An interrupted run, resumed, is the run that was not interrupted: weights, optimizer, order,
random numbers, log."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline import (
    PAIR_LENGTHS,
    chat_rows,
    document_rows,
    failure,
    pair_rows,
    run_script,
    short_run,
    write_model,
)
from transformers import Trainer, TrainerCallback

from minimind.common.errors import UserError
from minimind.stage_directory import read_stage, weights_hash
from minimind.training import checkpointing_trainer
from minimind.training import run as training_run
from minimind.training.checkpoints import (
    last_complete_checkpoint,
    problem_of,
    write_manifest,
)
from minimind.training.output_directory import INCOMPLETE, MANIFEST, checkpoints
from minimind.training.progress import reproducible
from minimind.training.resumable_trainer import ResumableTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


class KilledError(Exception):
    """Stands for SIGKILL: nothing of the run comes after it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_dir):
    """Data, a model with dropout (so that random numbers matter) and a base model for the later
    stages."""
    root = tmp_path_factory.mktemp("resume")
    for name, rows in (("docs", document_rows()), ("chats", chat_rows()), ("pairs", pair_rows())):
        (root / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        )
    other = [{"text": f"{row['text']} twice, {row['text']}"} for row in document_rows()[:40]]
    (root / "other.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in other)
    )
    write_model(root / "model.json")
    fields = json.loads((root / "model.json").read_text()) | {"attention_dropout": 0.1}
    (root / "model.json").write_text(json.dumps(fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(root / "cache"))
        run_script(
            patch,
            "pretrain",
            *command(root, "pretrain", root / "base", tokenizer_dir, max_steps=1)[1:],
        )
    return root


@pytest.fixture
def cache(world, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(world / "cache"))


def command(world, stage, output_dir, tokenizer_dir=None, argv=(), **options):
    """Script and command line of a stage, with checkpoints every two steps and a log line every
    three."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "max_steps": 8,
    } | options
    words = {
        "pretrain": ["--train_files", world / "docs.jsonl", "--model_config", world / "model.json"],
        "sft": ["--train_files", world / "chats.jsonl", "--model_name_or_path", world / "base"],
        "dpo": ["--train_files", world / "pairs.jsonl", "--model_name_or_path", world / "base"],
        "reward": ["--train_files", world / "pairs.jsonl", "--model_name_or_path", world / "base"],
        "kto": ["--train_files", world / "pairs.jsonl", "--model_name_or_path", world / "base"],
    }[stage]
    length = (
        {"block_size": 32, "tokenizer": tokenizer_dir}
        if stage == "pretrain"
        else PAIR_LENGTHS
        if stage in ("dpo", "reward")
        else {"max_length": 64}
    )
    scripts = {"pretrain": "pretrain", "sft": "finetune_sft"}
    script = scripts.get(stage, f"train_{stage}")
    if "--train_files" in argv:
        words = words[2:]
    return script, *short_run(output_dir, **length | options), "--eval_ratio", "0.2", *words, *argv


def kill_at(monkeypatch, step, event="on_step_end"):
    """Raise at the end of a step, before anything is saved or logged there."""

    class Kill(TrainerCallback):
        pass

    def strike(self, args, state, control, **kwargs):
        if state.global_step >= step:
            raise KilledError

    setattr(Kill, event, strike)
    monkeypatch.setattr(training_run, "ADDITIONAL", [lambda trainer: Kill()])


def run(words):
    with pytest.MonkeyPatch.context() as patch:
        run_script(patch, *words)


def interrupted(words, *kills):
    """Start the same command once for each (step, event) to be killed at, and once more to its
    end."""
    for step, event in kills:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
            kill_at(patch, step, event)
            run_script(patch, *words)
    run(words)


def log_of(stage):
    """The log without what a clock decides."""
    return [
        reproducible(json.loads(line))
        for line in (stage / "train_log.jsonl").read_text().splitlines()
    ]


def tensors_of(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for key, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}.{key}")


def assert_same_run(one, two, step):
    """Weights, log, and in the checkpoint of `step` optimizer, schedule and random numbers, bit for
    bit."""
    assert weights_hash(one) == weights_hash(two)
    assert log_of(one) == log_of(two)
    if read_stage(one)["stage"] != "reward":  # which writes no text
        assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [
            torch.load(path / f"checkpoint-{step}" / file, weights_only=False)
            for path in (one, two)
        ]
        if file == "scheduler.pt":
            assert states[0] == states[1]
        found, expected = (dict(tensors_of(state)) for state in states)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), file
    first, second = read_stage(one), read_stage(two)
    assert first["tokens_seen"] == second["tokens_seen"]
    assert first["metrics"] == second["metrics"]


MIXTURE = ["--train_files", "docs.jsonl:0.7", "other.jsonl:0.3"]


# Between two checkpoints; all done but the stage directory
MIDST, SAVED = (5, "on_step_end"), (8, "on_train_end")


RUNS = {
    # Also before the first checkpoint, where one falls due, and where the last one does.
    "pretrain": (
        "pretrain",
        {},
        [],
        [(1, "on_step_end"), MIDST, (6, "on_step_end"), (8, "on_step_end")],
    ),
    "pretrain-mixture": (
        "pretrain",
        {"packing_strategy": "bfd_split", "document_mask": True},
        MIXTURE,
        [MIDST],
    ),
    # Three epochs of 9 steps; a checkpoint falls on the end of the second one.
    "pretrain-epochs": (
        "pretrain",
        {
            "optim": "muon",
            "dataloader_num_workers": 2,
            "max_steps": -1,
            "num_train_epochs": 3,
            "gradient_accumulation_steps": 3,
            "eval_strategy": "epoch",
        },
        [],
        [(11, "on_step_end"), (19, "on_step_end"), (27, "on_train_end")],
    ),
    "sft": (
        "sft",
        {"eval_strategy": "steps", "eval_steps": 3, "sample_steps": 2},
        [],
        [MIDST, SAVED],
    ),
    "sft-grouped": (
        "sft",
        {"packing": False, "train_sampling_strategy": "group_by_length"},
        [],
        [MIDST],
    ),
    "lora": ("sft", {"lora_dropout": 0.1}, ["--use_peft", "--lora_r", "4"], [MIDST]),
    # Nothing is logged until the end, so that TRL's means of all steps stand in the last line.
    "reward": ("reward", {"lora_dropout": 0.1}, ["--use_peft", "--lora_r", "4"], [MIDST]),
    "dpo": ("dpo", {"disable_dropout": False, "logging_strategy": "no"}, [], [MIDST, SAVED]),
    "kto": ("kto", {"disable_dropout": False, "logging_strategy": "no"}, [], [MIDST, SAVED]),
}


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_and_resumed_equals_undisturbed(world, cache, tmp_path, tokenizer_dir, name):
    stage, options, argv, kills = RUNS[name]
    argv = [world / word if ".jsonl:" in word else word for word in argv]

    def words(output):
        return command(world, stage, tmp_path / output, tokenizer_dir, argv, **options)

    run(words("whole"))
    interrupted(words("cut"), *kills)
    assert_same_run(tmp_path / "whole", tmp_path / "cut", read_stage(tmp_path / "whole")["steps"])
    if name == "pretrain-epochs":
        assert read_stage(tmp_path / "whole")["steps"] == 27
        assert (tmp_path / "cut" / "checkpoint-26").is_dir()


def test_a_finished_run_started_again_says_so_and_trains_nothing(
    world, cache, tmp_path, tokenizer_dir, capsys
):
    words = command(world, "pretrain", tmp_path / "out", tokenizer_dir, max_steps=2)
    run(words)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(SystemExit) as stop:
        run(words)
    assert stop.value.code == 0
    assert "pretrain is complete in" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    changed = command(
        world, "pretrain", tmp_path / "out", tokenizer_dir, max_steps=2, learning_rate=0.1
    )
    message = failure(capsys, run, changed)
    assert "holds a complete run of another recipe:\n  learning_rate  0.0005 -> 0.1\n" in message
    run((*changed, "--overwrite_output_dir", "true"))
    assert read_stage(tmp_path / "out")["steps"] == 2
    assert not problem_of(tmp_path / "out" / "checkpoint-2")


@pytest.fixture(scope="module")
def cut(world, tokenizer_dir, tmp_path_factory):
    """A run of 8 steps killed in the seventh, with the checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(world / "cache"))
        kill_at(patch, 7)
        with pytest.raises(KilledError):
            run_script(
                patch, *command(world, "pretrain", output, tokenizer_dir, save_total_limit=9)
            )
    return output


@pytest.fixture(scope="module")
def whole(world, tokenizer_dir, tmp_path_factory):
    """The same, not killed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(world / "cache"))
        run_script(patch, *command(world, "pretrain", output, tokenizer_dir, save_total_limit=9))
    return output


@pytest.fixture
def unfinished(cut, tmp_path):
    shutil.copytree(cut, tmp_path / "run")
    return tmp_path / "run"


def truncate(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def corrupt(checkpoint):
    data = bytearray((checkpoint / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(data)


DAMAGES = {
    "truncated": (truncate, "model.safetensors has"),
    "corrupted": (corrupt, "optimizer.pt is corrupted: its hash is not"),
    "half-deleted": (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is gone"),
    "never-finished": (
        lambda path: (path / MANIFEST).unlink(),
        "it was never finished: there is no manifest.json",
    ),
    "manifest-cut": (
        lambda path: (path / MANIFEST).write_text("{"),
        "manifest.json: not JSON, or cut off",
    ),
    "sentinel": (
        lambda path: (path / INCOMPLETE).touch(),
        "marked incomplete by the library",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_taken(unfinished, damage):
    spoil, words = DAMAGES[damage]
    assert last_complete_checkpoint(unfinished) == (unfinished / "checkpoint-6", [])
    spoil(unfinished / "checkpoint-6")
    found, problems = last_complete_checkpoint(unfinished)
    assert found == unfinished / "checkpoint-4"
    assert len(problems) == 1
    assert problems[0].startswith(f"skipped {unfinished / 'checkpoint-6'}: {words}")


def test_a_run_goes_on_past_a_broken_checkpoint_to_the_same_end(
    world, cache, tokenizer_dir, unfinished, whole, capsys
):
    words = command(world, "pretrain", unfinished, tokenizer_dir, save_total_limit=9)
    truncate(unfinished / "checkpoint-6")
    run(words)
    said = capsys.readouterr().out
    assert f"skipped {unfinished / 'checkpoint-6'}" in said
    assert f"resuming from {unfinished / 'checkpoint-4'}" in said
    assert_same_run(whole, unfinished, 8)
    assert problem_of(unfinished / "checkpoint-6") is None


def test_without_a_whole_checkpoint_the_run_begins_anew_and_says_so(
    world, cache, tokenizer_dir, unfinished, capsys
):
    for checkpoint in checkpoints(unfinished):
        truncate(checkpoint)
    words = command(world, "pretrain", unfinished, tokenizer_dir, save_total_limit=9)
    message = failure(capsys, run, (*words, "--resume_from_checkpoint", "true"))
    assert "there is no complete checkpoint in" in message
    assert message.count("skipped ") == 3
    run(words)
    said = capsys.readouterr().out
    assert "starting over" in said
    assert log_of(unfinished)[0]["step"] == 0


def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_is_not_whole(
    world, cache, tokenizer_dir, tmp_path
):
    words = command(world, "pretrain", tmp_path / "cut", tokenizer_dir)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):

        def killed(checkpoint, **facts):
            if facts["step"] == 4:
                raise KilledError
            write_manifest(checkpoint, **facts)

        patch.setattr(checkpointing_trainer, "write_manifest", killed)
        run_script(patch, *words)
    found, problems = last_complete_checkpoint(tmp_path / "cut")
    assert found.name == "checkpoint-2"
    assert "checkpoint-4: it was never finished" in problems[0]


def test_a_changed_recipe_is_listed_and_refused_and_goes_on_when_accepted(
    world, cache, tokenizer_dir, unfinished, capsys
):
    other = {"save_total_limit": 9, "learning_rate": 1e-3, "adam_beta2": 0.9, "max_steps": 10}
    words = command(world, "pretrain", unfinished, tokenizer_dir, **other)
    message = failure(capsys, run, words)
    assert f"{unfinished / 'checkpoint-6'} was written with another recipe" in message
    for line in (
        "adam_beta2     0.95 -> 0.9",
        "learning_rate  0.0005 -> 0.001",
        "max_steps      8 -> 10",
    ):
        assert line in message
    run((*words, "--allow_changed_recipe", "true"))
    assert "resuming with a changed recipe" in capsys.readouterr().out
    assert read_stage(unfinished)["steps"] == 10
    group = torch.load(unfinished / "checkpoint-10" / "optimizer.pt")["param_groups"][0]
    assert group["initial_lr"] == 1e-3
    assert group["betas"] == (0.9, 0.9)
    # The rate of the ninth step is the new recipe's, as an undisturbed run would have it.
    run(command(world, "pretrain", unfinished.parent / "new", tokenizer_dir, **other))
    rates = []
    for path in (unfinished, unfinished.parent / "new"):
        rates += [
            line["learning_rate"] for line in log_of(path) if line["step"] == 9 and "loss" in line
        ]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize(("old", "new"), [(0, 1e-3), (None, 1e-3), (5e-4, 1e-3)])
def test_a_changed_rate_is_the_next_step_s_whatever_it_was(monkeypatch, old, new):
    """Half-way down a line of 10 steps; the log shows the rate of the schedule, not the
    checkpoint's."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=old or 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    schedule.last_epoch = 5
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    trainer = ResumableTrainer.__new__(ResumableTrainer)
    trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
    trainer.args = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0)
    trainer.changes = {"learning_rate": (old, new)}
    trainer._load_optimizer_and_scheduler("checkpoint-5")
    assert optimizer.param_groups[0]["lr"] == pytest.approx(new / 2)
    assert schedule.get_last_lr() == pytest.approx([new / 2])
    trainer.changes = {"lr_scheduler_type": ("linear", "reduce_lr_on_plateau")}
    with pytest.raises(UserError, match="that had linear cannot be resumed with it"):
        trainer._load_optimizer_and_scheduler("checkpoint-5")


def test_what_does_not_decide_the_result_may_change(world, cache, tokenizer_dir, unfinished, whole):
    options = {
        "logging_steps": 1,
        "save_steps": 7,
        "dataloader_num_workers": 1,
        "save_total_limit": 1,
    }
    run(command(world, "pretrain", unfinished, tokenizer_dir, **options))
    assert weights_hash(unfinished) == weights_hash(whole)
    assert [line["step"] for line in log_of(unfinished) if "loss" in line] == [1, 3, 6, 7, 8]
    assert [path.name for path in checkpoints(unfinished)] == ["checkpoint-8"]


def test_changed_data_or_another_model_is_refused_whatever_is_accepted(
    world, cache, tokenizer_dir, unfinished, capsys
):
    data = command(
        world, "pretrain", unfinished, tokenizer_dir, ["--train_files", world / "other.jsonl"]
    )
    assert "data.train.hash" in failure(
        capsys, run, (*data, "--model_config", world / "model.json")
    )
    fields = json.loads((world / "model.json").read_text()) | {"hidden_size": 16}
    (unfinished.parent / "small.json").write_text(json.dumps(fields))
    small = ["--model_config", unfinished.parent / "small.json", "--allow_changed_recipe", "true"]
    message = failure(capsys, run, command(world, "pretrain", unfinished, tokenizer_dir, small))
    assert "cannot be resumed by this command, it is of another model or recipe" in message
    assert "model.hidden_size  32 -> 16" in message
    message = failure(capsys, run, command(world, "sft", unfinished))
    assert '"pretrain" -> "sft"' in message


def test_a_checkpoint_given_by_its_path_is_gone_on_from_elsewhere(
    world, cache, tokenizer_dir, unfinished, whole, tmp_path, capsys
):
    words = command(world, "pretrain", tmp_path / "branch", tokenizer_dir)
    path = unfinished / "checkpoint-4"
    run((*words, "--resume_from_checkpoint", path))
    assert_same_run(whole, tmp_path / "branch", 8)
    corrupt(path)
    words = command(world, "pretrain", tmp_path / "another", tokenizer_dir)
    message = failure(capsys, run, (*words, "--resume_from_checkpoint", path))
    assert "is not a complete checkpoint: optimizer.pt is corrupted" in message
    assert str(unfinished / "checkpoint-6") in message
    assert not (tmp_path / "another").exists()


def test_not_resuming_leaves_an_unfinished_run_alone_unless_told_to_delete_it(
    world, cache, tokenizer_dir, unfinished, capsys
):
    words = (
        *command(world, "pretrain", unfinished, tokenizer_dir, max_steps=1),
        "--resume_from_checkpoint",
        "false",
    )
    assert "holds an unfinished run (checkpoint-6)" in failure(capsys, run, words)
    assert last_complete_checkpoint(unfinished)[0].name == "checkpoint-6"
    run((*words, "--overwrite_output_dir", "true"))
    assert [path.name for path in checkpoints(unfinished)] == ["checkpoint-1"]


def test_a_directory_that_is_no_run_is_refused_before_anything_runs(
    world, cache, tokenizer_dir, tmp_path, capsys
):
    strange = tmp_path / "photos"
    strange.mkdir()
    (strange / "summer.jpg").write_bytes(b"x")
    message = failure(capsys, run, command(world, "pretrain", strange, tokenizer_dir))
    assert f"--output_dir {strange} is not empty and not a run of ours: found summer.jpg" in message
    assert [path.name for path in strange.iterdir()] == ["summer.jpg"]
    message = failure(
        capsys, run, command(world, "pretrain", strange / "summer.jpg", tokenizer_dir)
    )
    assert "is a file" in message
    (strange / "summer.jpg").rename(strange / "slurm-1.out")
    run(command(world, "pretrain", strange, tokenizer_dir, max_steps=1))


def test_time_goes_on_and_wandb_stays_in_the_same_run(
    world, cache, tokenizer_dir, tmp_path, monkeypatch
):
    wandb = pytest.importorskip("wandb")
    words = command(
        world, "pretrain", tmp_path / "out", tokenizer_dir, report_to="wandb", logging_steps=1
    )

    # Two directories: wandb names a run's by the second in which it starts, and both may start in
    # the same one here.
    lives = [tmp_path / "first", tmp_path / "second"]
    for directory in lives:
        directory.mkdir()

    try:
        monkeypatch.setenv("WANDB_DIR", str(lives[0]))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
            kill_at(patch, 5)
            run_script(patch, *words)
        wandb.finish()
        wandb.teardown()  # it remembers its directory
        first = json.loads((tmp_path / "out" / "run.json").read_text())

        monkeypatch.setenv("WANDB_DIR", str(lives[1]))
        run(words)
        wandb.finish()
    finally:
        wandb.teardown()

    assert json.loads((tmp_path / "out" / "run.json").read_text())["run"] == first["run"]
    for directory in lives:
        (written,) = (directory / "wandb").glob("offline-run-*")
        assert written.name.endswith(f"-{first['run']}")

    lines = [
        json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()
    ]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    elapsed = [line["elapsed"] for line in lines]
    assert elapsed == sorted(elapsed)
    assert lines[-1]["eta"] == 0


@pytest.mark.slow
@pytest.mark.launcher
def test_a_short_storm_of_kills_ends_as_an_undisturbed_run_does():
    words = [sys.executable, "benchmarks/resume_storm.py", "--kills", "2", "--json"]
    done = subprocess.run(words, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same_weights"]
    assert result["same_log"]
    assert sum("moment" in life for life in result["lives"]) == 2
