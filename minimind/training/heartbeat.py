"""Hosts of one run watch each other: when one is lost, the others name it and end within a minute.

On one machine the launcher sees a process die and ends the rest. A host that loses its power or
network sends no sign, and the others would wait for it in the next all-reduce for half an hour, the
process group's time-out. That cannot be much shorter: a process may well wait minutes for another
that writes a checkpoint or compiles.
"""

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

from minimind.common.language import say
from minimind.training.callback_handler import Decoration

SILENCE_SECONDS = 40
HOST_VARIABLES = (
    ("GROUP_RANK", "GROUP_WORLD_SIZE"),  # torchrun, accelerate launch
    ("CROSS_RANK", "CROSS_SIZE"),  # deepspeed
    ("SLURM_NODEID", "SLURM_NNODES"),  # srun without a launcher
)


def host() -> tuple[int, int]:
    """Index of this machine among those of the run, and their number, from the launcher."""
    for index, count in HOST_VARIABLES:
        if index in os.environ and count in os.environ:
            return int(os.environ[index]), int(os.environ[count])
    return 0, 1


class HeartbeatCallback(Decoration):
    """Ends a process with exit code 1 when another host has been silent for 40 s.

    While a run of several hosts trains, each host increments a number in the processes' store every
    second. Seconds are counted one by one and not read from a clock, so that a run that was
    suspended finds nobody late.
    """

    def __init__(self, silence: int = SILENCE_SECONDS):
        self.silence = silence
        self.finished = threading.Event()

    def on_train_begin(self, args, state, control, **kwargs):
        self.index, count = host()
        if count < 2 or not (dist.is_available() and dist.is_initialized()):
            return
        self.silent = {other: 0 for other in range(count) if other != self.index}
        # A connection of its own: on the shared one a call waits while others wait for a process
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.store.set_timeout(timedelta(seconds=self.silence))
        self.speaks = os.environ.get("LOCAL_RANK") in ("0", None)
        for loop in (self._beat, self._watch):
            threading.Thread(target=loop, name=f"heartbeat{loop.__name__}", daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs):
        self.finished.set()

    def _beat(self) -> None:
        heard = dict.fromkeys(self.silent, 0)
        while not self.finished.wait(1):
            try:
                if self.speaks:
                    self.store.add(f"heartbeat/{self.index}", 1)
                for other in heard:
                    count = self.store.add(f"heartbeat/{other}", 0)
                    if count != heard[other]:
                        heard[other], self.silent[other] = count, 0
            except RuntimeError:  # the host that keeps the store is gone: nobody is heard anymore
                return

    def _watch(self) -> None:
        while not self.finished.wait(1):
            for other in self.silent:
                self.silent[other] += 1
            lost = [other for other, seconds in self.silent.items() if seconds > self.silence]
            if lost:
                say(
                    f"error: no sign of life from host {', '.join(map(str, lost))} for"
                    f" {self.silence} s, so host {self.index} ends too (hosts are counted from 0)."
                    " Run the same command again, with the hosts that are left: it resumes from the"
                    " last checkpoint.",
                    file=sys.stderr,
                )
                os._exit(1)
