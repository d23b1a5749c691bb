"""Steps much slower than planned: a warning that names what the machine shows, and what to try."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from pipeline import document_rows, run_script, short_run, write_model

from minimind.costs import slowness
from minimind.costs.slowness import Usage, explain, seen_reasons
from minimind.training import plan_callback

QUIET = Usage(moment=0.0, busy=100.0, own=50.0, swapped=0.0)
# 10 s, in which this run took both cores
LATER = Usage(moment=10.0, busy=120.0, own=70.0, swapped=0.0)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """A machine with two cores, bf16 and no other process, where torch takes both cores."""
    monkeypatch.setattr(slowness.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(slowness.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(slowness.psutil, "cpu_count", lambda logical: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(slowness, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(slowness, "busiest", lambda: " (most of it: chrome, pid 7)")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_without_a_visible_reason_the_warning_says_so():
    assert seen_reasons(QUIET, LATER, "cpu", "bf16") == []
    assert "neither another process nor an emulated precision, swapping" in explain(
        QUIET, LATER, "cpu", "bf16"
    )


def test_other_busy_processes_are_named():
    (reason,) = seen_reasons(QUIET, dataclasses.replace(LATER, own=58.0), "cpu", "fp32")
    assert reason.startswith(
        "other processes or machines kept 1.2 of 2 cores busy (most of it: chrome, pid 7): end"
    )


def test_an_emulated_precision_is_named_where_the_run_uses_it(monkeypatch):
    monkeypatch.setattr(slowness, "bf16_is_fast", lambda device: device != "cpu")
    (reason,) = seen_reasons(QUIET, LATER, "cpu", "bf16")
    assert reason == "bf16 is emulated here, much slower than fp32: leave out --bf16"
    assert seen_reasons(QUIET, LATER, "cpu", "fp32") == []


def test_swapping_is_named_with_its_amount():
    (reason,) = seen_reasons(QUIET, dataclasses.replace(LATER, swapped=300 * 2**20), "cpu", "fp32")
    assert reason.startswith("the machine swapped 300 MiB: lower --per_device_train_batch_size")


@pytest.mark.parametrize(
    ("threads", "processes", "variable", "reason"),
    [
        (1, "1", "1", "1 threads compute on 2 cores: leave out OMP_NUM_THREADS=1"),
        (2, "2", None, "4 threads compute on 2 cores: set OMP_NUM_THREADS=1"),
    ],
)
def test_threads_that_do_not_fit_the_cores_are_named(
    monkeypatch, threads, processes, variable, reason
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert seen_reasons(QUIET, LATER, "cpu", "fp32") == [reason]


def test_a_thread_for_each_physical_core_fits(monkeypatch):
    monkeypatch.setattr(slowness.psutil, "cpu_count", lambda logical: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert seen_reasons(QUIET, LATER, "cpu", "fp32") == []


def test_the_busiest_process_beside_this_run_is_found(monkeypatch):
    monkeypatch.undo()

    class Process(SimpleNamespace):
        __hash__ = object.__hash__

        def cpu_percent(self):
            return self.percent

    listed = [
        Process(pid=pid, info={"name": name}, percent=percent)
        for pid, name, percent in ((1, "own", 200.0), (2, "idle", 1.0), (3, "miner", 90.0))
    ]
    monkeypatch.setattr(slowness, "processes_of_this_run", lambda: listed[:1])
    monkeypatch.setattr(slowness.psutil, "process_iter", lambda fields: iter(listed))
    assert slowness.busiest(seconds=0) == " (most of it: miner, pid 3)"
    listed.pop()
    assert slowness.busiest(seconds=0) == ""


@pytest.mark.parametrize(("limit", "warned"), [(0.0, 1), (1e9, 0)])
def test_a_run_much_slower_than_planned_prints_a_warning(
    monkeypatch, tmp_path, tokenizer_dir, write_jsonl, capsys, limit, warned
):
    monkeypatch.setattr(plan_callback, "SLOW", limit)
    monkeypatch.setattr(plan_callback, "LOST", -1.0)
    words = [
        "--train_files",
        write_jsonl("docs.jsonl", document_rows()),
        "--tokenizer",
        tokenizer_dir,
    ]
    words += ["--model_config", write_model(tmp_path / "model.json")]
    run_script(
        monkeypatch, "pretrain", *short_run(tmp_path / "out", max_steps=6, block_size=32), *words
    )
    output = capsys.readouterr().out
    assert output.count("s a step instead of") == 1
    assert output.count("Likely reasons, and what to try:\n  - ") == warned
