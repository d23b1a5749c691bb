"""Whose files an output directory holds, what a changed command does there, and that only one run
uses it at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipeline import document_rows, failure, run_cli, run_script, write_model
from test_resume import KilledError, command, kill_at, log_of, run

from minimind.common.directories import new_directory
from minimind.common.errors import UserError
from minimind.common.locks import lock, unlock
from minimind.sharing import CARD, is_generated
from minimind.stage_directory import read_stage, weights_hash
from minimind.training.definition import changed
from minimind.training.output_directory import (
    CHECKPOINT_FILES,
    LOCK,
    RUN_FILES,
    check_output_directory,
    checkpoints,
    clear,
    delete_checkpoint,
    matches,
    unlock_directory,
)
from minimind.training.resume import begin

CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture(scope="module")
def complete(tokenizer_dir, tmp_path_factory):
    """A run of 4 steps at a constant rate, with checkpoints at 2 and 4."""
    root = tmp_path_factory.mktemp("complete")
    (root / "docs.jsonl").write_text("\n".join(map(json.dumps, document_rows())))
    write_model(root / "model.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(root / "cache"))
        run_script(
            patch, *command(root, "pretrain", root / "run", tokenizer_dir, max_steps=4, **CONSTANT)
        )
    return root / "run"


@pytest.fixture
def finished(complete, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(complete.parent / "cache"))
    yield shutil.copytree(complete, tmp_path / "run")
    unlock_directory()


@pytest.fixture
def unfinished(finished):
    """Killed just before its end."""
    (finished / "stage.json").unlink()
    return finished


def start(directory, resume="auto", overwrite=False, allow=False, other=None, **changes):
    """Begin a command whose definition has these `changes`; returns the checkpoint's name and the
    record in run.json."""
    args = SimpleNamespace(
        output_dir=other or directory,
        resume_from_checkpoint=str(resume),
        overwrite_output_dir=overwrite,
        allow_changed_recipe=allow,
    )
    definition = json.loads((directory / "run.json").read_text())["recipe"] | changes
    record, _ = begin(args, definition, "pipeline")
    return args.resume_from_checkpoint and Path(args.resume_from_checkpoint).name, record


def refused(*args, **options):
    with pytest.raises(UserError) as error:
        start(*args, **options)
    return str(error.value)


def write(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def content(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# Whose files


STRANGERS = {
    "run.json of another program": (
        {"run.json": '{"name": "x"}'},
        "run.json is not of a run of ours",
    ),
    "stage.json of another program": (
        {"stage.json": '{"stage": "build"}'},
        "stage.json is not of a run of ours",
    ),
    "one that is cut off": ({"run.json": '{"run": "1", "rec'}, "run.json: not JSON, or cut off"),
    "one that is empty": ({"run.json": ""}, "run.json: found an empty file"),
    "a list": ({"stage.json": "[]"}, "stage.json: found a list"),
    "another trainer's": (
        {"checkpoint-5/trainer_state.json": "{}"},
        "not a run of ours: found checkpoint-5",
    ),
    "an imported model": (
        {"stage.json": '{"stage": "import", "weights": "x"}'},
        "that minimind import wrote",
    ),
    "a model": (
        {"config.json": "{}", "model.safetensors": ""},
        "not a run of ours: found config.json",
    ),
    "a repository": ({".git/HEAD": "", "README.md": ""}, "not a run of ours: found README.md"),
    "hidden, of our name": ({".partial/mine": ""}, "not a run of ours: found .partial"),
    "a cook's": (
        {"checkpoint-5/recipe.json": '{"flour": 1}'},
        "not a run of ours: found checkpoint-5",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_others_wrote_is_refused_by_name_and_stays(tmp_path, name):
    files, words = STRANGERS[name]
    before = content(write(tmp_path, files))
    with pytest.raises(UserError, match=words):
        check_output_directory(tmp_path)
    assert content(tmp_path) == before


def test_overwriting_a_run_deletes_what_it_wrote_and_nothing_else(tmp_path, finished):
    mine = [
        "notes.txt",
        "data/rows.jsonl",
        "rows.jsonl",
        "checkpoint-4/notes.txt",
        "checkpoint-3/trainer_state.json",
    ]
    outside = write(tmp_path / "outside", {"config.json": "mine"})
    write(finished, dict.fromkeys([*mine, "slurm-1.out"], "mine"))
    (finished / "checkpoint-2" / "optimizer").symlink_to(outside)
    (finished / "checkpoint-7").symlink_to(finished / "checkpoint-2")
    clear(finished)
    # By run.json it is ours until the next begins
    assert {*content(finished)} == {*mine, "slurm-1.out", "run.json"}
    assert content(outside) == {"config.json": b"mine"}


def test_overwriting_a_run_keeps_a_model_card_that_was_edited(finished):
    assert is_generated(finished / CARD)
    with (finished / CARD).open("a") as file:
        file.write("More of mine.\n")
    clear(finished)
    assert (finished / CARD).read_text().endswith("More of mine.\n")


def test_the_lists_name_all_that_a_run_writes(finished):
    names = {path.name for path in finished.iterdir()} - {"checkpoint-2", "checkpoint-4", CARD}
    assert {name for name in names if not matches(name, RUN_FILES)} == set()
    names = {path.name for checkpoint in checkpoints(finished) for path in checkpoint.iterdir()}
    assert {name for name in names if not matches(name, CHECKPOINT_FILES)} == set()
    assert not (finished / LOCK).exists()


def test_a_checkpoint_is_recognised_by_what_it_holds_however_broken(tmp_path, finished):
    began = write(
        tmp_path / "checkpoint-9", {"recipe.json": '{"stage": "sft"}', "model.safetensors": "half"}
    )
    assert checkpoints(tmp_path) == [began]
    delete_checkpoint(began)
    assert checkpoints(tmp_path) == []
    assert not began.exists()
    escaping = {
        "files": {"../run.json": {}, "/etc/passwd": {}, "..": {}, "mine/../../run.json": {}}
    }
    write(finished / "checkpoint-4", {"manifest.json": json.dumps(escaping)})
    delete_checkpoint(finished / "checkpoint-4")
    assert (finished / "run.json").exists()
    assert not (finished / "checkpoint-4").exists()


def test_a_foreign_checkpoint_in_the_way_is_refused_before_anything_is_deleted(
    finished,
):
    write(finished, {"checkpoint-5/trainer_state.json": "{}"})
    before = content(finished)
    for flag in ("overwrite", "allow"):
        message = refused(finished, max_steps=6, **{flag: True})
        assert f"{finished / 'checkpoint-5'} is no checkpoint of a run of ours" in message
        assert content(finished) == before


def test_a_leftover_is_replaced_and_a_foreign_directory_of_that_name_is_not(tmp_path):
    write(tmp_path / ".out.partial", {"mine": "x"})
    with (
        pytest.raises(UserError, match="is in the way, and not one of ours"),
        new_directory(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / ".out.partial" / "mine").exists()
    write(tmp_path / ".other.partial", {".minimind": "", "half": "x"})
    with new_directory(tmp_path / "other") as partial:
        write(partial, {"file": "x"})
    assert {path.name for path in tmp_path.iterdir()} == {".out.partial", "other"}
    assert content(tmp_path / "other") == {"file": b"x"}


def test_a_models_tokenizer_is_not_replaced(tmp_path, finished, capsys):
    words = (
        "tokenizer",
        "train",
        write(tmp_path, {"a.txt": "text " * 99}) / "a.txt",
        "--vocab_size",
        300,
    )
    message = failure(capsys, run_cli, *words, "--output_dir", finished)
    assert f"--output_dir {finished} holds a tokenizer and more" in message


# The same command, changed


CHANGES = {
    "batch": (
        {"per_device_train_batch_size": 4},
        "per_device_train_batch_size  2 -> 4\nGive another",
    ),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps  1 -> 2"),
    "longer": ({"max_steps": 6}, "max_steps  4 -> 6\nExtend it with --allow_changed_recipe true"),
    "shorter": ({"max_steps": 2, "allow": True}, "max_steps  4 -> 2\nGive another"),
    "as long": (
        {"max_steps": -1, "num_train_epochs": 0.01, "allow": True},
        "has 4 steps behind it",
    ),
    "only a rate": (
        {"learning_rate": 1e-3, "allow": True},
        "learning_rate  0.0005 -> 0.001\nGive another",
    ),
    "another's checkpoint": (
        {"resume": "/", "max_steps": 6, "allow": True},
        "and the two would mix",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_command_on_a_complete_run_is_refused_with_what_to_add(finished, name):
    changes, words = CHANGES[name]
    before = content(finished)
    assert words in refused(finished, **changes)
    assert content(finished) == before


def test_a_complete_run_has_nothing_to_do_whatever_checkpoint_of_it_is_named(finished, capsys):
    for option in ("auto", "true", "false", finished / "checkpoint-2"):
        with pytest.raises(SystemExit) as stop:
            start(finished, option)
        assert stop.value.code == 0
        assert "nothing to do" in capsys.readouterr().out


def test_another_number_of_processes_alone_is_the_same_run():
    one = {"processes": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    assert not changed(one, one | {"processes": 1})
    assert not changed(one, one | {"processes": 1, "gradient_accumulation_steps": 2})
    assert len(changed(one, one | {"processes": 1, "gradient_accumulation_steps": 3})) == 2
    assert len(changed(one, one | {"per_device_train_batch_size": 2})) == 1


def test_a_complete_run_is_extended_through_kills_to_the_bits_of_a_long_one(
    tokenizer_dir, complete, finished, capsys
):
    words = (
        *command(complete.parent, "pretrain", finished, tokenizer_dir, max_steps=8, **CONSTANT),
    )
    words += (
        "--allow_changed_recipe",
        "true",
        "--resume_from_checkpoint",
        finished / "checkpoint-4",
    )
    # A user's data is neither copied into checkpoints nor cut back
    write(finished, {"rows.jsonl": "mine"})
    short = weights_hash(finished)
    for step in (5, 8):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
            kill_at(patch, step)
            run_script(patch, *words)
        assert (read_stage(finished)["steps"], weights_hash(finished)) == (4, short)
    assert "extending the complete run of 4 steps" in capsys.readouterr().out
    shutil.rmtree(finished / "checkpoint-4")  # as rotation does in the end
    run(words)
    long = finished.parent / "long"
    run(command(complete.parent, "pretrain", long, tokenizer_dir, max_steps=8, **CONSTANT))
    assert weights_hash(finished) == weights_hash(long)
    losses = [
        [line["loss"] for line in log_of(path) if "loss" in line] for path in (finished, long)
    ]
    assert losses[0][-1] == losses[1][-1]
    assert (read_stage(finished)["steps"], read_stage(finished)["extended"]) == (8, [4])
    assert (finished / "rows.jsonl").read_text() == "mine"
    assert not (finished / "checkpoint-8" / "rows.jsonl").exists()
    with pytest.raises(SystemExit) as stop:
        run(words)
    assert stop.value.code == 0


def test_a_run_without_checkpoints_explains_how_to_train_its_weights_further(finished):
    for checkpoint in checkpoints(finished):
        delete_checkpoint(checkpoint)
    message = refused(finished, max_steps=6, allow=True)
    assert "cannot be extended: no complete checkpoint of it is left" in message
    assert f"--model_name_or_path {finished} and another --output_dir" in message


def test_overwriting_deletes_an_unfinished_run_unless_it_is_the_same_run(unfinished):
    assert start(unfinished, overwrite=True)[0] == "checkpoint-4"
    assert "accept the change with --allow_changed_recipe" in refused(
        unfinished, gradient_accumulation_steps=2
    )
    name, record = start(unfinished, overwrite=True, gradient_accumulation_steps=2)
    assert (name, record["from"], checkpoints(unfinished)) == (None, None, [])


def test_a_run_shorter_than_its_checkpoint_is_refused(unfinished):
    assert "has 4 steps behind it" in refused(unfinished, max_steps=2, allow=True)


def test_resuming_from_an_older_checkpoint_deletes_newer_ones_only_on_request(unfinished):
    older = unfinished / "checkpoint-2"
    assert "would give up the newer checkpoint-4" in refused(unfinished, older)
    assert start(unfinished, older, overwrite=True)[0] == "checkpoint-2"
    assert checkpoints(unfinished) == [older]
    # What it writes then is newer, and what it began from rotated away
    older.rename(unfinished / "checkpoint-3")
    assert start(unfinished, older, overwrite=True)[0] == "checkpoint-3"


def test_a_run_started_from_another_run_resumes_from_its_own_checkpoints(unfinished, tmp_path):
    origin, other = unfinished / "checkpoint-2", tmp_path / "other"
    for option in (origin, origin, "auto"):  # killed before its first checkpoint
        name, record = start(unfinished, option, other=other)
        assert (name, record["from"]) == ("checkpoint-2", str(origin.resolve()))
    (unfinished / "checkpoint-4").rename(other / "checkpoint-4")
    for option in (origin, "auto"):
        assert start(unfinished, option, other=other)[0] == "checkpoint-4"


# One run at a time


HOLD_AND_FORK = """
import os, sys, time
from pathlib import Path
from minimind.common.locks import lock
held = lock(Path(sys.argv[1]), "x")
if os.fork() == 0:  # said by the child, which by now has let go of the lock
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_but_children_of_a_killed_run_block_nothing(unfinished):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", HOLD_AND_FORK, str(unfinished / LOCK)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    child = int(first.stdout.readline())
    try:
        before = content(unfinished)
        message = refused(unfinished, overwrite=True, max_steps=6)
        assert f"--output_dir {unfinished} is being written by process {first.pid} on " in message
        assert content(unfinished) == before
        first.kill()
        first.wait()
        os.kill(child, 0)  # a loader's worker, say, lives on for some seconds
        assert start(unfinished)[0] == "checkpoint-4"
        assert json.loads((unfinished / LOCK).read_text())["pid"] == os.getpid()
    finally:
        os.kill(child, 9)
        first.kill()
        first.stdout.close()


def test_without_locks_a_notice_is_printed_and_the_run_continues(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock._acquire", refuse)
    assert lock(tmp_path / LOCK, "x") is None
    unlock(None)
    output = capsys.readouterr().err
    assert (
        output
        == f"notice: {tmp_path / LOCK} cannot be locked (No locks available): do not start another"
        " run there\n"
    )
