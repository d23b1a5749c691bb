"""A run that a signal, a closed terminal or the end of its launcher stops writes a complete
checkpoint first.

docs/signals.md says what users of `kill`, Ctrl-C and Slurm can rely on. The library's
`enable_jit_checkpoint` is right for one process: of several, each would save at the step where its
own signal came.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from minimind.common.language import say, translated
from minimind.common.launch import is_main_process, largest_of_all
from minimind.common.streams import keep_output_writable
from minimind.training.checkpoints import last_good, problem_of
from minimind.training.report import ReportCallback

INTERRUPTED = 75  # sysexits.h: EX_TEMPFAIL, "the user is invited to try again later"
NOT_SAVED = 74  # sysexits.h: EX_IOERR; requeuing the job would not help, the disk stays full
LEFT_AT_ONCE = 130  # what a shell shows for a process that SIGINT ended
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
LAUNCHER_GONE = 1000  # used in the place of a signal's number
# torchrun repeats a Ctrl-C to processes that got it from the terminal: that is no second Ctrl-C
ECHO_SECONDS = 1.0
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "accelerate-launch"}
LAUNCHER_MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
}
LAUNCHER_MODULES |= {"torch.distributed.launch", "accelerate.commands.launch"}


class InterruptCallback(TrainerCallback):
    """Ends a run on SIGTERM, SIGINT, SIGUSR1, SIGHUP, or when the launcher is gone: with a
    checkpoint at the end of the step, and exit code 75.

    All processes agree on the step by an all-reduced maximum, one element per step, so one process
    with a signal is enough. A second Ctrl-C leaves at once, without a checkpoint, with exit code
    130. Where the checkpoint could not be written the exit code is 74.

    At a step that is not finite nothing is saved (see guards.py): the run continues to the next
    that is, or until the guard ends it.

    Raises:
        SystemExit: with code 75 or 74, from `Trainer.train`, on all processes, in `on_save`: when
            the checkpoint is complete.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.pid = os.getpid()
        self.received = 0  # this process: a signal's number, or LAUNCHER_GONE
        self.agreed = 0  # all processes
        self.first_interrupt = None
        self.left = False
        self.before: dict[int, Callable | int | None] = {}
        self.launchers = find_launchers()
        self.finished = threading.Event()

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What `nohup` (SIGHUP) or a shell's background (SIGINT) ignores stays ignored
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._receive)
        if self.launchers:
            threading.Thread(target=self._watch_launchers, name="launchers", daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs):
        # `--save_strategy best` found the step's model no better, and did not save it
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
                text = translated(
                    "\nwriting a checkpoint at the end of this step; Ctrl-C again leaves at once\n"
                )
                with suppress(OSError):  # not by `print`, which the signal may have interrupted
                    os.write(sys.__stderr__.fileno(), text.encode())
            self.first_interrupt = self.first_interrupt or now
        self.received = self.received or number

    def _watch_launchers(self) -> None:
        """Notice that a launcher is gone: a SIGTERM ends `deepspeed` without a word to the
        processes that it started."""
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
            args.save_only_model = False  # from weights alone the run could not continue
        if self.trainer.in_streak() and state.global_step < state.max_steps:
            return
        control.should_save = True
        if state.global_step >= state.max_steps:
            self.agreed = 0  # the run is complete; the weights are safe if it is killed meanwhile
        else:
            control.should_training_stop = self.trainer.interrupted = True

    def on_save(self, args, state, control, **kwargs):
        if self.agreed and control.should_training_stop:
            self._leave(args, state, control)

    on_left_out = on_save

    def _agree(self) -> int:
        return int(largest_of_all([self.received], self.trainer.args.device)[0])

    def _leave(self, args, state, control) -> None:
        # The trackers close their runs. Nobody else may take this for the end, to write samples say
        self.left = True
        handler = self.trainer.callback_handler
        callbacks, trackers = handler.callbacks, handler.trackers
        for each in callbacks:
            if isinstance(each, ReportCallback):
                each.write(state, "interrupted")
        handler.callbacks = [each for each in callbacks if isinstance(each, trackers)]
        handler.on_train_end(args, state, control)
        close_wandb()

        # A launcher ends all processes as soon as one is gone: nobody leaves before all files are
        # written, nor lets the launcher's SIGTERM change the exit code.
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        code = self._report_what_is_saved(args, state) if is_main_process() else None
        (code,) = broadcast_object_list([code])
        keep_output_writable()
        sys.exit(code)

    def _report_what_is_saved(self, args, state) -> int:
        """Look at the checkpoint and report what there is; returns the exit code."""
        is_gone = self.agreed == LAUNCHER_GONE
        why = "its launcher is gone" if is_gone else signal.Signals(self.agreed).name
        step, steps = f"{state.global_step:,}", f"{state.max_steps:,}"
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if problem_of(checkpoint, hashes=False) is None:
            say(
                f"interrupted ({why}) after step {step} of {steps}: {checkpoint} is complete. Run"
                f" the same command again to continue. Exit code {INTERRUPTED}."
            )
            return INTERRUPTED
        last = last_good(Path(args.output_dir))
        left = "there is no other, the same command starts over"
        if last:
            left = f"the same command continues from {last}"
        say(
            f"interrupted ({why}) after step {step} of {steps}, but {checkpoint} could not be"
            f" written: {left}. Exit code {NOT_SAVED}."
        )
        return NOT_SAVED


def find_launchers() -> list[psutil.Process]:
    """The launchers that this process descends from in an unbroken line; none under plain python.

    Only these are watched: a run in the background outlives its shell.
    """
    launchers = []
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            # Interpreter and its options, perhaps `timeout 1h`, then the launcher
            words = process.cmdline()[:6]
            if not any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words):
                break
            launchers.append(process)
    return launchers


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    """Called in each dataloader worker: let it ignore the signals that a terminal or Slurm sends to
    all processes of a job.

    A worker that dies takes the step with it, and with the step the checkpoint.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_obey_parent, name="signals", daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _obey_parent() -> None:
    """End the worker on a SIGTERM of its own main process, which waits for it, and on no other
    signal."""
    while True:
        signalled = signal.sigwaitinfo(SIGNALS)
        if signalled.si_signo == signal.SIGTERM and signalled.si_pid == os.getppid():
            os._exit(0)


def close_wandb() -> None:
    """Finish the wandb run, if any, as pre-empted before the launcher ends its process."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        try:
            wandb.run.mark_preempting()
            wandb.finish(exit_code=INTERRUPTED)
        except Exception as error:  # a server that is gone must not change how the run ends
            say(f"notice: wandb could not be told of the end: {error}", file=sys.stderr)
