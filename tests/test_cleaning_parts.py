"""Cleaning is the same to the byte whatever the processes, and resumes after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cleaning_corpus import ROOT, corpus, output, procedure, small_shards, tree
from pipeline import PATIENCE

from minimind.cleaning import cache_key, clean
from minimind.common.errors import UserError


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def test_output_is_the_same_byte_by_byte_for_any_number_of_processes(tmp_path, write_jsonl):
    path, steps = write_jsonl("a.jsonl", corpus(700)), small_shards(tmp_path)
    for processes in (1, 2, 3):
        clean([path], tmp_path / str(processes), steps, processes)
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")
    assert len(tree(tmp_path / "1")) > 10


# Of a process that kills itself, once the fifth part is finished and its workers are told.
KILLED = """
import os, psutil, signal
from minimind.cleaning.pipeline import Cleaning
finish = Cleaning._finish_part

def finish_and_die(self, part):
    finish(self, part)
    if part == 4:
        print(*(child.pid for child in psutil.Process().children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

Cleaning._finish_part = finish_and_die
"""


def start(arguments, before=""):
    """`minimind clean` as a process of its own."""
    command = [sys.executable, "-c", before + "from minimind.cli import main; main()", "clean"]
    environment = {**os.environ}
    del environment["WANDB_MODE"]  # with it --json waits for the import of transformers
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_leaves_nothing_whole_and_the_next_goes_on_where_it_stopped(
    tmp_path, write_jsonl, caplog
):
    path, steps, out = write_jsonl("a.jsonl", corpus(600)), small_shards(tmp_path), tmp_path / "out"
    clean([path], tmp_path / "expected", steps, 1)
    process = start([path, out, "--recipe", steps, "--num_proc", 2], KILLED)
    # Until the workers are gone too, which hold the same stderr
    workers, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert len(workers.split()) == 2
    assert not out.exists()
    assert len(list((tmp_path / ".out.partial" / ".state").glob("*.json"))) == 5
    # Nothing of it can be taken for data: a directory given as data does not show what is hidden.
    from minimind.data.sources import expand

    assert {file.parent.name for file in expand([str(tmp_path)])} == {tmp_path.name, "expected"}

    last_shard = sorted((tmp_path / ".out.partial").glob("data-*.jsonl"))[0]
    before = last_shard.stat().st_mtime_ns
    report = clean([path], out, steps, 2)
    assert tree(out) == tree(tmp_path / "expected")
    assert report["run"]["rows_found_finished"] == 40 * 5
    assert (out / last_shard.name).stat().st_mtime_ns == before  # not written again
    assert "resuming after" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_two_cleanings_into_one_directory_wait_for_each_other(tmp_path, write_jsonl):
    path, steps = write_jsonl("a.jsonl", corpus(300)), small_shards(tmp_path)
    clean([path], tmp_path / "expected", steps, 1)
    both = [
        start([path, tmp_path / "out", "--recipe", steps, "--num_proc", 1, "--json"])
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    found = sorted(json.loads(output)["run"]["rows_found_finished"] for output, _ in outputs)
    assert found[0] == 0 and found[1] in (0, 300)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def interrupted(monkeypatch, path, out, steps, parts=3):
    """Clean in this process and fail after some parts."""
    from minimind.cleaning.pipeline import Cleaning

    finish = Cleaning._finish_part

    def failing(self, part):
        if part == parts:
            raise KeyboardInterrupt
        finish(self, part)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Cleaning, "_finish_part", failing)
        clean([path], out, steps, 1, "skip")


def test_a_changed_recipe_or_input_starts_anew(tmp_path, write_jsonl, monkeypatch):
    rows, steps, out = corpus(200), small_shards(tmp_path), tmp_path / "out"
    path = write_jsonl("a.jsonl", rows)
    interrupted(monkeypatch, path, out, steps)
    path = write_jsonl("a.jsonl", [*rows[1:], rows[0]])
    assert clean([path], out, steps, 1)["run"]["rows_found_finished"] == 0
    assert output(out)[0]["id"] == 1

    other = tmp_path / "other"
    interrupted(monkeypatch, path, other, steps)
    Path(steps).write_text(Path(steps).read_text().replace("min_chars: 20", "min_chars: 1"))
    assert clean([path], other, steps, 1)["run"]["rows_found_finished"] == 0
    assert any(row["text"].startswith("No. ") for row in output(other))


def test_a_damaged_part_is_made_again(tmp_path, write_jsonl, monkeypatch):
    path, steps = write_jsonl("a.jsonl", ["bad", *corpus(200)]), small_shards(tmp_path)
    clean([path], tmp_path / "expected", steps, 1, "skip")
    for name, damaged in [
        ("a", "data-00001.jsonl"),
        ("b", ".state/00001.json"),
        ("c", ".state/00001-1.npz"),
    ]:
        interrupted(monkeypatch, path, tmp_path / name, steps)
        partial = tmp_path / f".{name}.partial"
        (partial / damaged).write_bytes((partial / damaged).read_bytes()[:-20])
        report = clean([path], tmp_path / name, steps, 1, "skip")
        assert report["run"]["rows_found_finished"] == 40
        assert report["rows"]["bad"] == 1
        assert tree(tmp_path / name) == tree(tmp_path / "expected")


def test_the_same_cleaning_again_finds_itself_done_and_another_is_refused(tmp_path, write_jsonl):
    path, out = write_jsonl("a.jsonl", corpus(50)), tmp_path / "out"
    first = clean([path], out, procedure("whitespace"))
    written = tree(out)
    again = clean([path], out, procedure("whitespace"))
    assert again["run"]["rows_found_finished"] == 50
    assert {**again, "run": None} == {**first, "run": None}
    assert "the result of another recipe or input" in refusal(
        lambda: clean([path], out, procedure("length"))
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    assert "holds something, expected a new" in refusal(
        lambda: clean([path], tmp_path / "full", procedure("length"))
    )
    assert tree(out) == written
    (tmp_path / "empty").mkdir()
    clean([path], tmp_path / "empty", procedure("whitespace"))
    assert tree(tmp_path / "empty") == written


def test_the_cache_key_follows_content_and_options_not_names(tmp_path, write_jsonl):
    a, b = write_jsonl("a.jsonl", corpus(5)), write_jsonl("b.jsonl", corpus(5))
    c = write_jsonl("c.jsonl", corpus(6))
    key = cache_key([a], procedure("length"))
    assert key == cache_key([b], procedure({"length": {"min_chars": 20}}))
    assert (
        len(
            {
                key,
                cache_key([c], procedure("length")),
                cache_key([a], procedure({"length": {"min_chars": 21}})),
            }
        )
        == 3
    )
    first = cache_key([a], procedure({"decontaminate": {"against": [b]}}))
    assert first != cache_key([a], procedure({"decontaminate": {"against": [c]}}))
