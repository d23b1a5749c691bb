"""Why steps take much longer than planned: the likely reasons, those that the machine shows
first."""

import os
import time
from dataclasses import dataclass

import psutil
import torch

from minimind.common.launch import bf16_is_fast

BUSY = 0.3  # cores that others take: less is the system itself
SWAPPED = 2**26  # bytes that went to the disk or came back
HELD = 2 * 2**30  # bytes of a card beside our own: less is the driver's


@dataclass(frozen=True)
class Usage:
    """What the machine has done up to a moment: its cores' busy seconds, those of this run's
    processes, and the bytes swapped."""

    moment: float
    busy: float
    own: float
    swapped: float


def processes_of_this_run() -> list[psutil.Process]:
    """This process and its children; for a run of several processes the launcher and all that it
    started."""
    process = psutil.Process()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        process = process.parent() or process
    return [process, *process.children(recursive=True)]


def usage() -> Usage:
    """The machine's usage until now."""
    times, swap, own = psutil.cpu_times(), psutil.swap_memory(), 0.0
    for process in processes_of_this_run():
        try:
            own += sum(process.cpu_times()[:2])
        except psutil.Error:  # it has ended
            continue
    busy = sum(
        getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")
    )
    return Usage(time.monotonic(), busy, own, swap.sin + swap.sout)


def busiest(seconds: float = 0.2) -> str:
    """Name and pid of the process outside this run that uses most of the processor; empty if there
    is none."""
    ours = {process.pid for process in processes_of_this_run()}
    others = [process for process in psutil.process_iter(["name"]) if process.pid not in ours]
    shares = {}
    for wait in (True, False):
        for process in others:
            try:
                shares[process] = process.cpu_percent()  # since the last call
            except psutil.Error:
                shares.pop(process, None)
        if wait:
            time.sleep(seconds)
    most = max(shares, key=shares.__getitem__, default=None)
    if most is None or shares[most] < 100 * BUSY:
        return ""
    return f" (most of it: {most.info['name']}, pid {most.pid})"


def seen_reasons(before: Usage, after: Usage, device: str, precision: str) -> list[str]:
    """The likely reasons that the machine shows, each with what to try; may be empty."""
    reasons = []
    allowed = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1

    # Other processes, an emulated precision, swapping
    busy = after.busy - before.busy - (after.own - before.own)
    others = busy / max(after.moment - before.moment, 1e-9)
    if others > BUSY:
        reasons.append(
            f"other processes or machines kept {others:.1f} of {os.cpu_count()} cores"
            f" busy{busiest()}: end them, wait for them, or set OMP_NUM_THREADS to the number of"
            " cores that are left"
        )
    if precision == "bf16" and not bf16_is_fast(device):
        reasons.append("bf16 is emulated here, much slower than fp32: leave out --bf16")
    if (swapped := after.swapped - before.swapped) > SWAPPED:
        reasons.append(
            f"the machine swapped {swapped / 2**20:,.0f} MiB: lower --per_device_train_batch_size"
            " (and raise --gradient_accumulation_steps), or close other programs"
        )

    # Threads that do not fit the cores, if nothing else explains it
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    threads = torch.get_num_threads() * processes
    physical = min(cores, psutil.cpu_count(logical=False) or cores)  # see `prepare_launch`
    fits = physical - processes < threads <= cores  # a remainder of the division stays idle
    if device == "cpu" and not fits and not reasons:
        advice = f"set OMP_NUM_THREADS={cores // processes or 1}"
        if limit := os.environ.get("OMP_NUM_THREADS"):
            advice = f"leave out OMP_NUM_THREADS={limit}"
        reasons.append(f"{threads} threads compute on {cores} cores: {advice}")

    # Another process on the card
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        held = total - free - torch.cuda.memory_reserved()
        if held > HELD:
            reasons.append(
                f"another process holds {held / 2**30:.1f} GiB of this card (see nvidia-smi):"
                " end it"
            )
    return reasons


def explain(before: Usage, after: Usage, device: str, precision: str) -> str:
    """The likely reasons as lines."""
    reasons = seen_reasons(before, after, device, precision) or [
        "neither another process nor an emulated precision, swapping or the number of threads is"
        " to be seen here; perhaps the processor is slowed down by heat, battery or power saving,"
        " or the steps are too small for the device: a larger --per_device_train_batch_size shows"
        " it"
    ]
    return "".join(f"\n  - {reason}" for reason in reasons)
