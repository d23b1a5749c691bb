"""What a device can do: its peak, its memory, and the share of the peak that a small model is assumed to reach.

torch is imported where something is measured, so that `minimind plan` refuses a name or a price at once.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from minimind.errors import UserError

if TYPE_CHECKING:
    import torch

    from minimind.planning.costs import Step

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peaks in FLOP/s of dense matrix products with fp32 accumulation; `utilisation` is the assumed MFU.

    A process holds more than its tensors: `reserved` bytes (context, code, libraries' workspaces), and `gaps`, the
    share that lies between them in the allocator's blocks.
    """

    name: str
    kind: str
    peak_half: float
    peak_fp32: float
    memory: float
    utilisation: float
    reserved: float
    gaps: float
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s in "fp32", "bf16" or "fp16"."""
        return self.peak_fp32 if precision == "fp32" else self.peak_half

    @property
    def usable(self) -> float:
        """Bytes for a run's tensors."""
        return (self.memory - self.reserved) / (1 + self.gaps)

    def running(self, step: Step) -> Device:
        """This device with the gaps that such a step leaves."""
        return replace(self, gaps=CPU_CHECKPOINTING_GAPS) if self.kind == "cpu" and step.checkpointing else self

    def account(self, tensors: float) -> float:
        """What this device's own account says of so many bytes of tensors: on a CPU it is that of the process."""
        return tensors * (1 + self.gaps) if self.kind == "cpu" else tensors


# Bytes and share that a process takes beside its tensors, allowances of ours: a card's context and its allocator's
# gaps; on a CPU those that benchmarks/plan_memory.py finds in glibc, many more where layers are computed again.
CUDA_ALLOWANCES = (0.75 * GIB, 0.05)
CPU_ALLOWANCES = (1.5 * GIB, 0.22)
CPU_CHECKPOINTING_GAPS = 0.5


def _card(name: str, half: float, fp32: float, gib: float, utilisation: float, source: str) -> Device:
    return Device(name, "cuda", half * 1e12, fp32 * 1e12, gib * GIB, utilisation, *CUDA_ALLOWANCES, source)


# Peaks and memory from the makers' documents, without sparsity. The utilisations are assumptions: what training
# reaches with layers of 512 to 1,024, which the faster cards are too fast for. `--device measured` replaces them.
DEVICES = {
    "rtx3090": _card("RTX 3090", 71, 35.6, 24, 0.40, "NVIDIA Ampere GA102 whitepaper"),
    "rtx4090": _card("RTX 4090", 165, 82.6, 24, 0.35, "NVIDIA Ada architecture whitepaper"),
    "a100": _card("A100 SXM 80 GB", 312, 19.5, 80, 0.35, "NVIDIA A100 datasheet"),
    "h100": _card("H100 SXM", 989, 67, 80, 0.25, "NVIDIA H100 datasheet"),
    "h200": _card("H200 SXM", 989, 67, 141e9 / GIB, 0.25, "NVIDIA H200 datasheet"),
}
NAMES = (*DEVICES, "cpu", "measured")
CPU_UTILISATION = 0.5


def device_name(name: str) -> str:
    """A `--device` as the table has it; raises UserError."""
    key = name.lower().replace("-", "").replace("_", "").replace(" ", "")
    if key not in NAMES:
        raise UserError(f"--device {name}: expected one of {', '.join(NAMES)}.")
    return key


def find_device(name: str | None) -> Device:
    """The device of a `--device`: a row of the table, or this machine's, as is the default; raises UserError."""
    key = "measured" if name is None else device_name(name)
    if key in DEVICES:
        return DEVICES[key]
    return this_cpu() if key == "cpu" else this_device()


@cache
def this_device() -> Device:
    """The device that a run would take here: a card of the table by its name, another one or a CPU by measurement."""
    import torch

    if not torch.cuda.is_available():
        return this_cpu()
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    compact = name.lower().replace(" ", "")
    known = next((device for key, device in DEVICES.items() if key in compact), None)
    if known:
        return replace(known, name=name, memory=memory)
    peaks = {dtype: matmul_peak("cuda", dtype) for dtype in (torch.bfloat16, torch.float32)}
    return Device(name, "cuda", *peaks.values(), memory, 0.35, *CUDA_ALLOWANCES, "matrix products measured here")


@cache
def this_cpu() -> Device:
    """This machine without its cards; its peak is measured once, on as many threads as torch takes."""
    import torch

    from minimind.training.launch import bf16_is_fast

    peaks = [matmul_peak("cpu", dtype) for dtype in ((torch.bfloat16,) if bf16_is_fast() else ()) + (torch.float32,)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        f"CPU, {torch.get_num_threads()} threads",
        "cpu",
        peaks[0],
        peaks[-1],
        memory,
        CPU_UTILISATION,
        *CPU_ALLOWANCES,
        "matrix products measured here",
    )


def matmul_peak(device: str, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of the fastest of some large matrix products."""
    import torch

    size = 1024 if device == "cpu" else 8192
    own = torch.Generator(device)  # measured in the middle of a run, whose random numbers are not to be touched
    left, right = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))

    def once() -> float:
        began = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    fastest, until = once(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        fastest = min(fastest, once())
    return 2 * size**3 / fastest


PRICE = re.compile(r"(?P<sign>[$€¥£]?) ?(?P<amount>\d+(\.\d+)?) ?(?P<code>[A-Za-z]{3})?( ?/ ?h(our)?)?")


@dataclass(frozen=True)
class Price:
    """What a device costs for an hour, in some currency."""

    amount: float
    currency: str = ""

    def shown(self, hours: float) -> str:
        """The cost of some device hours."""
        number = f"{self.amount * hours:,.2f}"
        return self.currency + number if len(self.currency) == 1 else f"{number} {self.currency}".strip()


def parse_price(text: str) -> Price:
    """`8/h`, `8`, `$1.5/h`, `8 CNY/h` -> a price; raises UserError."""
    match = PRICE.fullmatch(text.strip())
    if match is None or (match["sign"] and match["code"]):
        raise UserError(f"--price {text}: expected an amount per device and hour, as 8/h, $1.50/h or 8 CNY/h.")
    return Price(float(match["amount"]), match["sign"] or (match["code"] or "").upper())
