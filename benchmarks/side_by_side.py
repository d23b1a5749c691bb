"""Timing of alternatives in turn, so that a machine whose speed drifts gives the same ratios."""

import platform
import statistics
import time
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The GPU's name, or the processor's kind and the threads in use."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{DEVICE} ({platform.machine()}, {torch.get_num_threads()} threads)"


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, work queued on the device included."""
    began = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def side_by_side(
    alternatives: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """name -> (median seconds, median of the ratios to the first alternative, round by round), one
    warm-up aside."""
    for function in alternatives.values():
        seconds(function)
    times = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, function in alternatives.items():
            times[name].append(seconds(function))
    first = next(iter(times.values()))
    return {
        name: (
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, first, strict=True)),
        )
        for name, own in times.items()
    }
