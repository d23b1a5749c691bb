"""Several hosts: two network namespaces with a cable between them stand for two machines. Needs
root on Linux."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pipeline import PATIENCE, document_rows, short_run, wait_until, write_model

from minimind.training.heartbeat import SILENCE_SECONDS, HeartbeatCallback, host

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two connected network namespaces, each with an interface eth0."""
    names = [f"minimind-{os.getpid()}-{index}" for index in range(2)]
    if not shutil.which("ip") or (tried := ip("netns", "add", names[0])).returncode:
        pytest.skip(
            "no network namespaces here:"
            f" {tried.stderr.strip() if shutil.which('ip') else 'no ip command'}"
        )
    try:
        words = (
            ["netns", "add", names[1]],
            [
                "link",
                "add",
                "eth0",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
            ],
        )
        for line in (words[0], [*words[1], "eth0", "netns", names[1]]):
            assert not (done := ip(*line)).returncode, done.stderr
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                assert not (done := ip("-n", name, "link", "set", link, "up")).returncode, (
                    done.stderr
                )
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.fixture
def command(tmp_path, tokenizer_dir):
    """The options of a run, and its environment."""
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, document_rows())))
    model = ["--model_config", write_model(tmp_path / "model.json"), "--tokenizer", tokenizer_dir]
    data = [
        *model,
        "--train_files",
        tmp_path / "docs.jsonl",
        "--block_size",
        "32",
        "--eval_ratio",
        "0.2",
    ]
    options = {"max_steps": 400, "logging_steps": 1, "save_strategy": "steps", "save_steps": 20}
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"MINIMIND_CACHE": str(tmp_path / "cache"), "GLOO_SOCKET_IFNAME": "eth0"}
    words = [*short_run(tmp_path / "run", **options), *data, "--deepspeed", "ds_config_zero2.json"]
    return list(map(str, words)), environment


def kill_all_of(process):
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.launcher
def test_a_host_is_lost_and_the_run_goes_on_without_it(hosts, command, tmp_path):
    pytest.importorskip("deepspeed")
    words, environment = command
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    run, logs = tmp_path / "run", [tmp_path / f"{index}.log" for index in range(2)]

    def start(index, *launcher):
        with logs[index].open("w") as log:
            line = [
                "ip",
                "netns",
                "exec",
                hosts[index],
                "deepspeed",
                *map(str, launcher),
                "pretrain.py",
                *words,
            ]
            return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def said(index=0):
        return logs[index].read_text(errors="replace")

    there = (
        "--hostfile",
        tmp_path / "hostfile",
        "--no_ssh",
        "--master_addr",
        ADDRESSES[0],
        "--master_port",
        29500,
    )
    processes = [start(index, *there, "--node_rank", index) for index in range(2)]
    try:
        wait_until(lambda: (run / "checkpoint-20" / "manifest.json").exists(), said)
        assert "cpu x 2, DeepSpeed" in said()
        # No word of farewell reaches the other host
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        kill_all_of(processes[1])
        assert processes[0].wait(PATIENCE) != 0  # gloo's own time-out is half an hour
        assert f"error: no sign of life from host 1 for {SILENCE_SECONDS} s" in said()
        assert not (run / "stage.json").exists()

        alone = start(0, "--num_accelerators", 1, "--master_port", 29500)
        processes.append(alone)
        assert alone.wait(PATIENCE) == 0, said()[-3000:]
    finally:
        for process in processes:
            if process.poll() is None:
                kill_all_of(process)
    assert "resuming from" in said()
    assert "continues with 4 rows (2 x 2 accumulation x 1 process)" in said()
    assert "resuming from" in said()
    assert "continues with 4 rows (2 x 2 accumulation x 1 process)" in said()
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 401))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        (
            {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3", "SLURM_NODEID": "0", "SLURM_NNODES": "2"},
            (1, 3),
        ),
        ({"CROSS_RANK": "0", "CROSS_SIZE": "2"}, (0, 2)),
        ({"SLURM_NODEID": "4", "SLURM_NNODES": "8"}, (4, 8)),
    ],
)
def test_every_launcher_says_which_host_this_is(variables, expected, monkeypatch):
    for name in (
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "SLURM_NODEID",
        "SLURM_NNODES",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert host() == expected


def test_a_host_that_is_late_but_alive_is_not_lost_and_a_silent_one_is(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit())
    heart = HeartbeatCallback(silence=3)
    heart.index, heart.silent = 0, {1: 0, 2: 0}
    waits = []

    def second(_):
        waits.append(None)
        if len(waits) < 6:
            heart.silent[1] = heart.silent[2] = 0  # what `_beat` does when it hears them
        else:
            heart.silent[1] = 0
        return len(waits) > 20

    monkeypatch.setattr(heart.finished, "wait", second)
    with pytest.raises(SystemExit):
        heart._watch()
    assert (ended, len(waits)) == ([1], 8)
    assert "no sign of life from host 2 for 3 s" in capsys.readouterr().err


SRUN = """#!/usr/bin/env bash
# Stands for Slurm's: starts the tasks, passes USR1 on to them, ends with their largest exit code.
shift
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
trap 'signalled=1; kill -USR1 "${tasks[@]}"' USR1
largest=0
for task in "${tasks[@]}"; do
    while signalled=0; wait "$task"; code=$?; [ $signalled = 1 ]; do :; done
    [ $code -gt $largest ] && largest=$code
done
exit $largest
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


@pytest.mark.slow
@pytest.mark.launcher
def test_the_slurm_script_saves_on_usr1_and_puts_the_job_back_into_the_queue(command, tmp_path):
    pytest.importorskip("deepspeed")
    words, environment = command
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{environment['PATH']}"
    environment["SCONTROL_LOG"] = str(tmp_path / "q")
    slurm = {
        "JOB_ID": 4711,
        "JOB_NODELIST": "x",
        "NTASKS": 2,
        "NTASKS_PER_NODE": 2,
        "SUBMIT_DIR": ROOT,
    }
    slurm |= {"NODEID": 0, "NNODES": 1}
    environment |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    words = [*words[: words.index("--deepspeed")], "--max_steps", "100000"]
    with (tmp_path / "log").open("w") as log:
        script = ["bash", str(ROOT / "scripts" / "slurm_pretrain.sbatch"), *words]
        job = subprocess.Popen(script, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    def said():
        return (tmp_path / "log").read_text()

    try:
        wait_until(lambda: re.search("step +2/", said()) or job.poll() is not None, said)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 75, said()[-3000:]
    finally:
        if job.poll() is None:
            kill_all_of(job)
    assert "interrupted (SIGUSR1)" in said()
    assert (tmp_path / "q").read_text() == "requeue 4711\n"
    assert list((tmp_path / "run").glob("checkpoint-*/manifest.json"))
