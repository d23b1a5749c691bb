"""A run that is told to stop writes a whole checkpoint first: signals, a closed terminal, a
launcher that is gone.

What every user of `kill`, Ctrl-C and Slurm can rely on is in docs/signals.md. The library has
`enable_jit_checkpoint`, which is right for one process: of several, each would save at the step
where its own signal came.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from minimind.common.language import say, translated
from minimind.common.launch import is_main_process
from minimind.common.streams import keep_output_writable
from minimind.training.checkpoints import last_good, problem_of
from minimind.training.report import ReportCallback
from minimind.training.saving import in_streak

# sysexits.h: EX_TEMPFAIL, "the user is invited to try again later". Slurm scripts and the tests go
# by it.
INTERRUPTED = 75
# sysexits.h: EX_IOERR. Not the number that puts a job back into a queue: the disk would be as full
# as before.
NOT_SAVED = 74
# What a shell shows for a process that SIGINT ended.
LEFT_AT_ONCE = 130
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
LAUNCHER_GONE = 1000  # travels where a signal's number does
# torchrun passes a Ctrl-C on to processes that the terminal has told already: not the second one.
ECHO_SECONDS = 1.0
TRACKERS = tuple(INTEGRATION_TO_CALLBACK.values())
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "accelerate-launch"}
LAUNCHER_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
}
LAUNCHER_MODULES |= {"torch.distributed.launch", "accelerate.commands.launch"}


class InterruptCallback(TrainerCallback):
    """On SIGTERM, SIGINT, SIGUSR1, SIGHUP, or when the launcher is gone: a checkpoint at the end of
    the step, exit 75.

    All processes agree on the step by an all-reduced maximum, one element per step, so one told
    process is enough. A second Ctrl-C leaves at once, without a checkpoint, with exit code 130.
    Where the checkpoint could not be written the exit code is 74.

    At a step that is not finite nothing is saved (see guards.py): it waits for one that is, or for
    the guard's end.

    It leaves from the Trainer's `on_save`, when the checkpoint is whole; to be added after
    callbacks that look at it.

    Raises:
        SystemExit: with code 75 or 74, from `Trainer.train`, on all processes.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.pid = os.getpid()
        self.received = 0  # this process: a signal's number, or LAUNCHER_GONE
        self.agreed = 0  # all processes
        self.first_interrupt = None
        self.left = False
        self.before: dict[int, Callable | int | None] = {}
        self.launchers = find_launchers()
        self.finished = threading.Event()
        spare_workers(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self.flag = torch.zeros(1, dtype=torch.int32, device=args.device)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # `nohup` has told this process to ignore SIGHUP, and a shell its background jobs
                # SIGINT: leave it so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._receive)
        if self.launchers:
            threading.Thread(target=self._watch_launchers, name="launchers", daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs):
        # `--save_strategy best` has found the step's model no better and not saved
        if self.agreed and not self.left:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self._leave(args, state, control)
        self.finished.set()
        if not self.left:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if os.getpid() != self.pid:  # a forked child that has no handler of its own yet
            return
        now = time.monotonic()
        if number == signal.SIGINT:
            if self.first_interrupt is not None and now - self.first_interrupt > ECHO_SECONDS:
                os._exit(LEFT_AT_ONCE)
            if self.first_interrupt is None and is_main_process():
                said = translated(
                    "\nwriting a checkpoint at the end of this step; Ctrl-C again leaves at once\n"
                )
                with suppress(OSError):
                    # `print` may be what the signal has interrupted
                    os.write(sys.__stderr__.fileno(), said.encode())
            self.first_interrupt = self.first_interrupt or now
        self.received = self.received or number

    def _watch_launchers(self) -> None:
        """The `deepspeed` command dies of a SIGTERM without a word to the processes that it
        started."""
        while not self.finished.wait(1):
            if not all(map(is_alive, self.launchers)):
                self.received = self.received or LAUNCHER_GONE
                return

    def on_step_end(self, args, state, control, **kwargs):
        if not self.agreed:
            self.agreed = self._agree()
            if not self.agreed:
                return
            keep_output_writable()
            args.save_only_model = False  # from weights alone the run could not go on
        if in_streak(self.trainer) and state.global_step < state.max_steps:
            return
        control.should_save = True
        if state.global_step >= state.max_steps:
            # Nothing is left to train: only keep the weights, should the evaluation that follows
            # not end in time.
            self.agreed = 0
        else:
            control.should_training_stop = self.trainer.interrupted = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed and control.should_training_stop:
            self._leave(args, state, control)

    on_left_out = on_save

    def _agree(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return self.received
        self.flag.fill_(self.received)
        dist.all_reduce(self.flag, dist.ReduceOp.MAX)
        return int(self.flag)

    def _leave(self, args, state, control) -> None:
        # The trackers close their runs, and nobody else takes this for the end, to write samples
        # say.
        self.left = True
        handler = self.trainer.callback_handler
        for each in handler.callbacks:
            if isinstance(each, ReportCallback):
                each.write(state, "interrupted")
        handler.callbacks = [each for each in handler.callbacks if isinstance(each, TRACKERS)]
        handler.on_train_end(args, state, control)
        close_wandb()
        if dist.is_available() and dist.is_initialized():
            # A launcher ends all processes as soon as one is gone, so nobody leaves before all
            # files are written ...
            dist.barrier()
        for number in SIGNALS:  # ... nor takes the launcher's SIGTERM for another exit code.
            signal.signal(number, signal.SIG_IGN)
        (code,) = broadcast_object_list(
            [self._say_what_is_saved(args, state) if is_main_process() else None]
        )
        keep_output_writable()
        sys.exit(code)

    def _say_what_is_saved(self, args, state) -> int:
        """Look at the directory before saying so; returns the exit code."""
        why = (
            "its launcher is gone"
            if self.agreed == LAUNCHER_GONE
            else signal.Signals(self.agreed).name
        )
        step, steps = f"{state.global_step:,}", f"{state.max_steps:,}"
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if problem_of(checkpoint, hashes=False) is None:
            say(
                f"interrupted ({why}) after step {step} of {steps}: {checkpoint} is complete. Run"
                f" the same command again to go on. Exit code {INTERRUPTED}."
            )
            return INTERRUPTED
        last = last_good(Path(args.output_dir))
        left = (
            f"the same command goes on from {last}"
            if last
            else "there is no other, the same command begins anew"
        )
        say(
            f"interrupted ({why}) after step {step} of {steps}, but {checkpoint} could not be"
            f" written: {left}. Exit code {NOT_SAVED}."
        )
        return NOT_SAVED


def find_launchers() -> list[psutil.Process]:
    """The launchers that this process descends from in an unbroken line; none where plain python
    was started.

    Only these are watched: a shell may go, and a run in the background lives on.
    """
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            # Interpreter and its options, perhaps `timeout 1h`, then the launcher
            words = process.cmdline()[:6]
            if not any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words):
                break
            found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for its exit code does
    not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def spare_workers(trainer: Trainer) -> None:
    """Dataloader workers ignore the signals that a terminal or Slurm sends to all processes of a
    job: a worker that dies takes the step with it, and with the step the checkpoint."""
    build = trainer._get_dataloader

    def build_with_spared_workers(*args, **kwargs):
        loader = build(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper asks this one
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
        return loader

    trainer._get_dataloader = build_with_spared_workers


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey_parent, name="signals", daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _obey_parent() -> None:
    """In a worker: of all signals only the SIGTERM of its own main process counts, which waits for
    it to end."""
    while True:
        signalled = signal.sigwaitinfo(SIGNALS)
        if signalled.si_signo == signal.SIGTERM and signalled.si_pid == os.getppid():
            os._exit(0)


def close_wandb() -> None:
    """Finish the wandb run, if there is one, as pre-empted, before the launcher ends its
    process."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        try:
            wandb.run.mark_preempting()
            wandb.finish(exit_code=INTERRUPTED)
        except Exception as error:  # a server that is gone must not change how the run ends
            say(f"notice: wandb could not be told of the end: {error}", file=sys.stderr)
