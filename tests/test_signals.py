"""A run that is told to stop: what is written, what is agreed, with which exit code it ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from pipeline import PATIENCE, at_free_port, document_rows, short_run, wait_until, write_model
from ranks import start_ranks
from transformers import TrainerCallback, TrainingArguments

from minimind.training import checkpointing_trainer, saving, signals
from minimind.training.checkpointing_trainer import CheckpointingTrainer
from minimind.training.checkpoints import problem_of
from minimind.training.dataloaders import LoadingTrainer
from minimind.training.report import ReportCallback
from minimind.training.signals import INTERRUPTED, LEFT_AT_ONCE, NOT_SAVED, InterruptCallback

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WHOLE = {"model.safetensors", "config.json", "trainer_state.json", "scheduler.pt"}
needs_deepspeed = pytest.mark.skipif(
    not (BIN / "deepspeed").exists(), reason="DeepSpeed is not installed"
)


@pytest.fixture(autouse=True)
def handlers():
    """The test process gets its own handlers back: a run that leaves ignores the signals until it
    is gone.

    A shell starts what it puts into the background with SIGINT ignored, which is left so by a run,
    and not tested.
    """
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class InterruptibleTrainer(CheckpointingTrainer, LoadingTrainer):
    pass


class Tell(TrainerCallback):
    """Sends signals in the middle of a step."""

    def __init__(self, step, *numbers, to=os.getpid, pause=0.0):
        self.step, self.numbers, self.to, self.pause = step, numbers, to, pause

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                targets = self.to()
                for pid in targets if isinstance(targets, list) else [targets]:
                    os.kill(pid, number)
                time.sleep(self.pause)


def train(model, output_dir, *callbacks, resume=None, **options):
    """Four steps on 8 rows; returns the trainer."""
    rows = [
        {"input_ids": [i, i + 1, i + 2, i + 3], "labels": [i, i + 1, i + 2, i + 3]}
        for i in range(8)
    ]
    arguments = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | options
    arguments = {"max_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 1} | arguments
    args = TrainingArguments(str(output_dir), dataloader_pin_memory=False, **arguments)
    trainer = InterruptibleTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    for callback in (*callbacks, InterruptCallback(trainer)):
        trainer.add_callback(callback)
    trainer.train(resume)
    return trainer


def interrupted(*args, code=INTERRUPTED, **options):
    with pytest.raises(SystemExit) as stop:
        train(*args, **options)
    assert stop.value.code == code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_leaves_a_whole_checkpoint_and_exit_code_75_although_saving_is_off(
    name, model, tmp_path, capsys
):
    # Tests started with nohup ignore SIGHUP, as runs do
    number, handler = getattr(signal, name), signal.default_int_handler
    before = signal.signal(number, handler if name == "SIGINT" else signal.SIG_DFL)
    try:
        interrupted(model, tmp_path, Tell(2, number))
    finally:
        signal.signal(number, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names >= WHOLE | {"optimizer.pt", "rng_state.pth"}
    assert f"interrupted ({name}) after step 2 of 4" in capsys.readouterr().out


def test_an_interrupted_and_continued_run_ends_with_the_weights_of_an_undisturbed_one(
    config, tmp_path
):
    from minimind import MiniMindForCausalLM

    def fresh():
        torch.manual_seed(0)
        return MiniMindForCausalLM(config)

    undisturbed = train(fresh(), tmp_path / "a")
    interrupted(fresh(), tmp_path / "b", Tell(2, signal.SIGTERM))
    torch.manual_seed(1)
    continued = train(
        MiniMindForCausalLM(config), tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2")
    )
    for name, weight in undisturbed.model.state_dict().items():
        assert torch.equal(weight, continued.model.state_dict()[name]), name


def test_the_report_of_an_interrupted_run_says_so(model, tmp_path):
    interrupted(
        model, tmp_path, ReportCallback(tmp_path, {"stage": "sft"}), Tell(2, signal.SIGTERM)
    )
    page = (tmp_path / "report.html").read_text()
    assert "<b>interrupted</b>" in page
    assert "2 of 4" in page


def test_a_second_ctrl_c_leaves_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        train(model, tmp_path, Tell(2, signal.SIGINT, signal.SIGINT, pause=0.1))
    assert stop.value.code == LEFT_AT_ONCE
    assert not list(tmp_path.iterdir())


def test_a_ctrl_c_that_the_launcher_repeats_is_still_the_first(model, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ECHO_SECONDS", PATIENCE)
    interrupted(model, tmp_path, Tell(2, signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_a_run_told_in_its_last_step_saves_it_and_ends_as_any_other(model, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = train(model, tmp_path, Tell(4, signal.SIGTERM))
    assert trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_run_adds_no_evaluation_and_no_summary(model, tmp_path):
    log = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            log.append(logs)

        def on_train_end(self, args, state, control, **kwargs):
            log.append({"the end": None})

    interrupted(
        model,
        tmp_path,
        Log(),
        Tell(2, signal.SIGTERM),
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    assert [sorted(entry) for entry in log] == [["epoch", "grad_norm", "learning_rate", "loss"]] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("greater", [False, True], ids=["better", "worse"])
def test_where_only_better_models_are_saved_the_interrupted_one_is_saved_too(
    greater, model, tmp_path
):
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": greater}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
    interrupted(model, tmp_path, Tell(2, signal.SIGTERM), **best)
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, "there is no other, the same command starts over"),
        (
            {"save_strategy": "steps", "save_steps": 1},
            "the same command continues from {}/checkpoint-1",
        ),
    ],
)
def test_a_signal_on_a_full_disk_says_that_nothing_was_saved_and_what_is_left(
    options, left, model, tmp_path, monkeypatch, capsys
):
    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                monkeypatch.setattr(
                    saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1)
                )

    interrupted(model, tmp_path, Fill(), Tell(2, signal.SIGTERM), code=NOT_SAVED, **options)
    said = capsys.readouterr()
    assert (
        f"{tmp_path}/checkpoint-2 could not be written: {left.format(tmp_path)}. Exit code 74."
        in said.out
    )
    assert "is complete" not in said.out
    assert "training continues" not in said.err
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_checkpoint_is_called_complete_only_after_a_look_at_it(
    model, tmp_path, monkeypatch, capsys
):
    def without_manifest(checkpoint, **facts):
        assert checkpoint.is_dir()

    monkeypatch.setattr(checkpointing_trainer, "write_manifest", without_manifest)
    interrupted(model, tmp_path, Tell(2, signal.SIGTERM), code=NOT_SAVED)
    assert "is complete" not in capsys.readouterr().out


def test_an_interrupted_run_that_keeps_weights_alone_can_go_on(model, tmp_path):
    interrupted(model, tmp_path, Tell(2, signal.SIGTERM), save_only_model=True)
    assert problem_of(tmp_path / "checkpoint-2") is None


def test_a_signal_at_a_step_that_is_not_finite_waits_for_one_that_is(model, tmp_path, monkeypatch):
    class Streak(TrainerCallback):
        step = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.step = state.global_step

    streak = Streak()
    monkeypatch.setattr(InterruptibleTrainer, "in_streak", lambda self: streak.step == 2)
    interrupted(model, tmp_path, streak, Tell(2, signal.SIGTERM))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_signal_that_was_ignored_before_the_run_stays_ignored(model, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what `nohup` does
    assert train(model, tmp_path, Tell(2, signal.SIGHUP)).state.global_step == 4


def test_dataloader_workers_outlive_the_signals_of_their_whole_job_but_not_their_main_process(
    model, tmp_path
):
    loaders, others = [], psutil.Process().children()  # wandb's service for one

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                loaders.extend(
                    child for child in psutil.Process().children() if child not in others
                )
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                    for process in loaders:  # by a stranger, as a terminal or Slurm does
                        subprocess.run(["kill", f"-{int(number)}", str(process.pid)], check=True)
                time.sleep(0.2)
                assert loaders
                assert all(process.is_running() for process in loaders)

    trainer = train(model, tmp_path, Signal(), dataloader_num_workers=1, max_steps=8)
    assert trainer.state.global_step == 8

    loader = torch.utils.data.DataLoader(range(99), num_workers=1)
    loader.worker_init_fn = partial(signals.start_worker, None)
    rows = iter(loader)
    next(rows)
    (worker,) = rows._workers
    worker.terminate()
    worker.join(PATIENCE)
    assert worker.exitcode == 0


def test_output_whose_reader_is_gone_is_dropped_and_not_an_error():
    before = os.dup(1)
    reading, writing = os.pipe()
    try:
        os.dup2(writing, 1)
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            os.write(1, b"x")
        signals.keep_output_writable()
        os.write(1, b"x")
    finally:
        os.dup2(before, 1)
        for number in (before, writing):
            os.close(number)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise UserError('wrong')", 2)])
def test_a_full_disk_behind_the_output_neither_ends_a_run_nor_changes_its_exit_code(end, code):
    program = f"""
from minimind.common.errors import UserError, reports_user_errors
@reports_user_errors
def main():
    print("a line of the log" * 1000, flush=True)
    {end}
main()
"""
    with Path("/dev/full").open("w") as full:
        assert (
            subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=full
            ).returncode
            == code
        )


# --- with a launcher
# -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory, tokenizer_dir):
    """A pretraining run that only a signal ends."""
    root = tmp_path_factory.mktemp("signals")
    (root / "docs.jsonl").write_text("\n".join(map(json.dumps, document_rows())))
    model = ["--model_config", write_model(root / "model.json"), "--tokenizer", tokenizer_dir]
    data = [
        *model,
        "--train_files",
        root / "docs.jsonl",
        "--block_size",
        "32",
        "--eval_ratio",
        "0.2",
    ]

    def build(output, *launcher, **options):
        options = {"max_steps": 100_000, "logging_steps": 1} | options
        return list(
            map(
                str, [*at_free_port(*launcher, "pretrain.py"), *short_run(output, **options), *data]
            )
        )

    return build


class Run:
    """A launcher's process and what it prints, read through a file, since the launcher may be gone
    before its workers.

    `workers` are the processes that train."""

    def __init__(self, words, output):
        self.log = output.with_suffix(".log")
        environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        environment |= {"MINIMIND_CACHE": str(output.parent / "cache"), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        self.workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing of a run outlives its test."""
        with suppress(psutil.Error):
            self.workers += psutil.Process(self.process.pid).children(recursive=True)
        for process in (*self.workers, self.process):
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def wait_for_step(self):
        wait_until(
            lambda: re.search("step +2/", self.said) or self.process.poll() is not None,
            lambda: self.said,
        )
        assert self.process.poll() is None, self.said[-3000:]
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.workers = [process for process in below if self.trains(process.cmdline())]
        return self

    @staticmethod
    def trains(words):
        return "pretrain.py" in words and not any("launch" in word for word in words)

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def wait_for_all_to_be_gone(self):
        _, alive = psutil.wait_procs(self.workers, timeout=PATIENCE)
        assert not alive, self.said[-3000:]


@pytest.mark.slow
@pytest.mark.launcher
@needs_deepspeed
def test_workers_of_a_deepspeed_launcher_that_died_save_and_end(command, tmp_path):
    words = command(tmp_path / "run", "deepspeed", "--num_accelerators", "2")
    with Run([*words, "--deepspeed", "ds_config_zero2.json"], tmp_path / "run") as run:
        run.wait_for_step()
        assert len(run.workers) == 2
        run.process.terminate()
        assert run.process.wait(PATIENCE) == -signal.SIGTERM
        run.wait_for_all_to_be_gone()
        assert "interrupted (its launcher is gone)" in run.said
        (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
        shards = {
            path.name.split("_mp")[0] for path in checkpoint.glob("global_step*/*optim_states.pt")
        }
        assert {path.name for path in checkpoint.iterdir()} >= WHOLE | {
            "rng_state_0.pth",
            "rng_state_1.pth",
        }
        assert shards == {"zero_pp_rank_0", "zero_pp_rank_1"}


def test_all_ranks_stop_at_the_step_at_which_one_of_them_is_told(command, tmp_path):
    log = tmp_path / "log"
    ranks = start_ranks(*command(tmp_path / "run"), log=log)
    try:
        wait_until(
            lambda: (
                re.search("step +2/", log.read_text()) or not all(rank.is_alive() for rank in ranks)
            ),
            log.read_text,
        )
        os.kill(ranks[1].pid, signal.SIGUSR1)
        for rank in ranks:
            rank.join(PATIENCE)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [INTERRUPTED] * 2
    assert "interrupted (SIGUSR1)" in log.read_text()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert {path.name for path in checkpoint.iterdir()} >= WHOLE | {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.launcher
def test_when_a_rank_dies_the_others_end_with_its_error_on_the_screen(command, tmp_path):
    words = command(tmp_path / "run", "torchrun", "--nproc_per_node", "2")
    with Run(words, tmp_path / "run") as run:
        run.wait_for_step()
        run.workers[-1].kill()
        run.wait_for_all_to_be_gone()
        assert run.process.wait(PATIENCE) == 1
        assert "Signal 9 (SIGKILL)" in run.said


@pytest.mark.slow
@pytest.mark.launcher
@needs_deepspeed
def test_a_port_in_use_is_one_clear_error(command, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = command(
            tmp_path / "run", "deepspeed", "--num_accelerators", "2", "--master_port", port
        )
        with Run([*words, "--deepspeed", "ds_config_zero2.json"], tmp_path / "run") as run:
            assert run.process.wait(PATIENCE) == 2
        assert run.said.count(f"error: port {port}") == 1
        assert "Traceback" not in run.said
