"""Several processes of one training, without the five seconds of imports of each.

They are forked by a server that has imported everything and done nothing else, and find in their
environment what a launcher would have put there. The launchers are the subject of
test_launchers.py.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import wait
from pathlib import Path

from pipeline import PATIENCE, free_port

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pretrain", "finetune_sft", "train_dpo", "deepspeed"])


def start(script, *words, log, **environment):
    """Start a script of the project as a process that writes to a log file."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **environment}
    Path(log).touch()
    process = SERVER.Process(target=_run, args=(script, words, str(log), environment))
    process.start()
    return process


def _run(script, words, log, environment):
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [str(script), *map(str, words)]
    runpy.run_path(str(script), run_name="__main__")


def start_ranks(script, *words, log, count=2):
    """Start the processes of a training, on this machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count}
    shared |= {"LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [
        start(script, *words, log=log, **{name: str(value) for name, value in rank.items()})
        for rank in ranks
    ]


def run_ranks(script, *words, log, count=2):
    """Run a training to its end, which must be a good one; returns what was printed."""
    return until_done(*start_ranks(script, *words, log=log, count=count), log=log)


def until_done(*processes, log):
    """Wait for processes, which must end well; returns what they printed.

    The others of one that fails would wait for it, and are killed.
    """
    waiting = {process.sentinel: process for process in processes}
    while waiting and (ended := wait(waiting, PATIENCE)):
        for process in map(waiting.pop, ended):
            process.join()
        if any(process.exitcode for process in processes):
            break
    for process in waiting.values():
        process.kill()
        process.join()
    said = Path(log).read_text(errors="replace")
    assert {process.exitcode for process in processes} == {0}, said[-3000:]
    return said
