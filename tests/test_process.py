"""Settings of the process, seen from outside in processes of their own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimind.common.launch import prepare_launch

SETTINGS = ("GOMP_SPINCOUNT", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# Each buffer of 8 MiB has 2,048 pages; the first one makes the heap large enough
FAULTS = """
import minimind
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [
    ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def step():
    buffer = libc.malloc(8 << 20)
    libc.memset(buffer, 1, 8 << 20)
    libc.free(buffer)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def printed_by(code, **settings):
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command, root = [sys.executable, "-c", code], Path(__file__).parent.parent
    options = {"cwd": root, "capture_output": True, "text": True, "check": True}
    return subprocess.run(command, env=environment | settings, **options).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_buffer_that_is_freed_and_taken_again_is_not_zeroed_by_the_system_again():
    (kept,) = printed_by(FAULTS)
    assert int(kept) < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_malloc_settings_of_the_user_are_kept():
    (given_back,) = printed_by(FAULTS, MALLOC_MMAP_THRESHOLD_="65536")
    assert int(given_back) > 10_000


@pytest.mark.parametrize(("settings", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
@pytest.mark.parametrize("script", ["pretrain", "finetune_sft", "train_dpo", "minimind.cli"])
def test_threads_wait_as_set_before_torch_is_loaded(script, settings, expected):
    # Each program imports our code first: what torch's loader finds is printed in its place
    code = f"""
import os, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            os._exit(0)
sys.meta_path.insert(0, Finder)
sys.stdout.reconfigure(line_buffering=True)
import {script}
import torch
"""
    assert printed_by(code, **settings) == [expected]


@pytest.mark.parametrize(("processes", "threads"), [(1, 6), (2, 3), (4, 1), (8, 1)])
def test_the_processes_of_a_machine_share_the_threads_that_torch_would_take(
    processes, threads, monkeypatch
):
    taken = []
    monkeypatch.setattr(os, "environ", {"LOCAL_WORLD_SIZE": str(processes)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    prepare_launch(uses_deepspeed=False)
    assert taken == [threads] and os.environ["OMP_NUM_THREADS"] == str(threads)
