"""This machine as a device: by the table, or by a measurement of its peak."""

import os
import time
from dataclasses import replace
from functools import cache

import torch

from minimind.common.launch import bf16_is_fast
from minimind.costs.devices import (
    CPU_ALLOWANCES,
    CPU_UTILISATION,
    CUDA_ALLOWANCES,
    DEVICES,
    Device,
    device_name,
    find_card,
)

SOURCE = "matrix products measured here"
FASTEST: dict[tuple[str, torch.dtype], float] = {}  # what this process has measured so far: FLOP/s


def find_device(name: str | None) -> Device:
    """The device of a `--device`: a row of the table, or this machine's, which is the default;
    raises UserError."""
    key = "measured" if name is None else device_name(name)
    if key in DEVICES:
        return DEVICES[key]
    return this_cpu() if key == "cpu" else this_device()


def this_device() -> Device:
    """The device that a run would use here: the first card, else the CPU."""
    return this_card() if torch.cuda.is_available() else this_cpu()


@cache
def this_card() -> Device:
    """This machine's first card; its peak is measured once if the card is not in the table."""
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if card := find_card(name):
        return replace(card, name=name, memory=memory)
    bf16 = bf16_is_fast()
    dtypes = (torch.bfloat16 if bf16 else torch.float16, torch.float32)
    peaks = [matmul_peak("cuda", dtype) for dtype in dtypes]
    return Device(name, "cuda", *peaks, memory, 0.35, *CUDA_ALLOWANCES, SOURCE, bf16)


def this_cpu() -> Device:
    """This machine without its cards; its peak is the best measured so far, on as many threads as
    torch uses."""
    dtypes = [torch.bfloat16, torch.float32] if bf16_is_fast("cpu") else [torch.float32]
    peaks = [FASTEST.get(("cpu", dtype)) or matmul_peak("cpu", dtype) for dtype in dtypes]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name, limits = f"CPU, {torch.get_num_threads()} threads", (CPU_UTILISATION, *CPU_ALLOWANCES)
    return Device(name, "cpu", peaks[0], peaks[-1], memory, *limits, SOURCE)


def matmul_peak(device: str, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of the fastest large matrix product of this call and all before it.

    All before it count since a busy machine shows less than it can do.
    """
    size = 1024 if device == "cpu" else 8192
    # A generator of its own: this also runs within training, whose random numbers must not change
    own = torch.Generator(device)
    left, right = (
        torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2)
    )

    def time_product() -> float:
        began = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    time_product()
    fastest, until = time_product(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        fastest = min(fastest, time_product())
    FASTEST[device, dtype] = max(2 * size**3 / fastest, FASTEST.get((device, dtype), 0.0))
    return FASTEST[device, dtype]


def measure_again(precision: str) -> None:
    """Measure the CPU's peak once more, which may have been busy before; a card's stays."""
    if not torch.cuda.is_available():
        half = precision != "fp32" and bf16_is_fast("cpu")
        matmul_peak("cpu", torch.bfloat16 if half else torch.float32, seconds=0.05)
