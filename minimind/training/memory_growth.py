"""A notice where the memory of a run grows from log to log."""

import os
from collections import deque
from statistics import median

import psutil
import torch

from minimind.common.launch import notice
from minimind.training.callback_handler import Decoration

SAMPLES = 30  # logs that are compared
GROWTH, GROWN_BYTES = 0.1, 200e6  # a notice is worth this share of the memory, and these bytes


class MemoryCallback(Decoration):
    """Gives notice where the memory of the process, or of its GPU, has grown steadily."""

    def __init__(self):
        self.samples: dict[str, deque] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        values = {"memory of the process": process_bytes()}
        if args.device.type == "cuda":
            values["memory allocated on the GPU"] = torch.cuda.memory_allocated(args.device)
        for name, value in values.items():
            samples = self.samples.setdefault(name, deque(maxlen=SAMPLES))
            samples.append((state.global_step, value))
            if len(samples) == SAMPLES and (grown := growth(samples)):
                steps = samples[-1][0] - samples[0][0]
                notice(
                    f"step {state.global_step}: the {name} has grown by {grown / 1e6:,.0f} MB in"
                    f" {steps:,} steps, to {value / 1e6:,.0f} MB"
                )
                samples.clear()


def process_bytes() -> int:
    """Memory that this process holds for itself, without files that it only reads, such as the rows
    of a dataset."""
    info = psutil.Process(os.getpid()).memory_info()
    return info.rss - getattr(info, "shared", 0)


def growth(samples) -> float:
    """Bytes by which samples of (step, bytes) grew from their first third to their last.

    It is 0 unless the growth is large and the second third lies clearly between the two: a leak
    grows all the time, a cache that fills does not.
    """
    third = len(samples) // 3
    values = [value for _, value in samples]
    first, second, last = (
        median(values[start : start + third]) for start in (0, third, len(values) - third)
    )
    grown = last - first
    steady = first + grown / 4 < second < last - grown / 4
    return grown if steady and grown > max(GROWTH * first, GROWN_BYTES) else 0.0
