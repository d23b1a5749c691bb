"""What a device can do: its peak, its memory, and the share of the peak that a small model is
assumed to reach.

torch is imported where something is measured, so that `minimind plan` refuses a name or a price at
once.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from minimind.common.errors import UserError

if TYPE_CHECKING:
    import torch

    from minimind.costs.step import Step

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peaks in FLOP/s of dense matrix products with fp32 accumulation; `utilisation` is the assumed
    MFU.

    A process holds more than its tensors: `reserved` bytes (context, code, libraries' workspaces),
    and `gaps`, the share that lies between them in the allocator's blocks.
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
    bf16: bool = True  # of a GPU: whether its half precision includes bf16, or is fp16 alone

    def peak(self, precision: str) -> float:
        """FLOP/s in "fp32", "bf16" or "fp16"."""
        return self.peak_fp32 if precision == "fp32" else self.peak_half

    @property
    def usable(self) -> float:
        """Bytes for a run's tensors."""
        return (self.memory - self.reserved) / (1 + self.gaps)

    def running(self, step: Step) -> Device:
        """This device with the gaps that such a step leaves."""
        return (
            replace(self, gaps=CPU_CHECKPOINTING_GAPS)
            if self.kind == "cpu" and step.checkpointing
            else self
        )

    def account(self, tensors: float) -> float:
        """What this device's own account says of so many bytes of tensors: on a CPU it is that of
        the process."""
        return tensors * (1 + self.gaps) if self.kind == "cpu" else tensors


# Bytes and share that a process takes beside its tensors, allowances of ours: a card's context and
# its allocator's gaps; on a CPU those that benchmarks/plan_memory.py finds in glibc, many more
# where layers are computed again.
CUDA_ALLOWANCES = (0.75 * GIB, 0.05)
CPU_ALLOWANCES = (1.5 * GIB, 0.22)
CPU_CHECKPOINTING_GAPS = 0.5


def _card(
    name: str,
    half: float,
    fp32: float,
    gib: float,
    bandwidth: float,
    source: str,
    bf16: bool = True,
) -> Device:
    """A card by its sheet: peaks in TFLOP/s, memory in GiB, bandwidth in GB/s.

    Its utilisation is an assumption of ours: what training reaches with layers of 512 to 1,024,
    which leave a card waiting for its memory the more, the more it could compute for each byte.
    """
    intensity = half * 1e3 / bandwidth  # FLOP for each byte
    utilisation = 0.40 if intensity < 100 else 0.35 if intensity < 200 else 0.25
    return Device(
        name,
        "cuda",
        half * 1e12,
        fp32 * 1e12,
        gib * GIB,
        utilisation,
        *CUDA_ALLOWANCES,
        source=source,
        bf16=bf16,
    )


# From the maker's documents: dense products (no sparsity) of bf16 or fp16 with fp32 accumulation,
# which of a GeForce are half as fast as with fp16 accumulation. Where a sheet names no such peak,
# it is the document's rate of an SM (512 FLOP a clock) x SMs x boost clock. `--device measured`
# replaces peak and utilisation.
GA102 = "NVIDIA Ampere GA102 whitepaper"
ADA = "NVIDIA Ada architecture whitepaper"
DEVICES = {
    "rtx3060": _card(
        "RTX 3060", 25.5, 12.7, 12, 360, f"{GA102}; GeForce RTX 3060 page: 28 SMs, 1.78 GHz"
    ),
    "rtx3080": _card("RTX 3080 10 GB", 59.5, 29.8, 10, 760, GA102),
    "rtx3090": _card("RTX 3090", 71, 35.6, 24, 936, GA102),
    "rtx4090": _card("RTX 4090", 165, 82.6, 24, 1008, ADA),
    "rtx4090d": _card(
        "RTX 4090 D", 147, 73.5, 24, 1008, f"{ADA}; GeForce RTX 4090 D page: 114 SMs, 2.52 GHz"
    ),
    "t4": _card("T4", 65, 8.1, 16, 320, "NVIDIA T4 datasheet", bf16=False),
    "v100": _card("V100 SXM2 32 GB", 125, 15.7, 32, 900, "NVIDIA V100 datasheet", bf16=False),
    "a10": _card("A10", 125, 31.2, 24, 600, "NVIDIA A10 datasheet"),
    "a100": _card("A100 SXM 80 GB", 312, 19.5, 80, 2039, "NVIDIA A100 datasheet"),
    "a800": _card(
        "A800 SXM 80 GB",
        312,
        19.5,
        80,
        2039,
        "NVIDIA A800 datasheet: an A100 with NVLink at 400 GB/s",
    ),
    "l20": _card("L20", 119.5, 59.8, 48, 864, "NVIDIA L20 product brief"),
    "h20": _card("H20 96 GB", 148, 44, 96, 4000, "NVIDIA H20 product brief"),
    "h100": _card("H100 SXM", 989, 67, 80, 3350, "NVIDIA H100 datasheet"),
    "h800": _card(
        "H800 SXM", 989, 67, 80, 3350, "NVIDIA H800 datasheet: an H100 with NVLink at 400 GB/s"
    ),
    "h200": _card("H200 SXM", 989, 67, 141e9 / GIB, 4800, "NVIDIA H200 datasheet"),
}
NAMES = (*DEVICES, "cpu", "measured")
# What a card's name has beside its model, as in "NVIDIA A100-SXM4-80GB". Other words stay: a Ti, a
# laptop's or a PCIe card is another one.
BESIDE = re.compile(r"nvidia|geforce|tesla|sxm\d?|\d+ ?gb|hbm\d?e?|[\s_-]")
CPU_UTILISATION = 0.5


def device_name(name: str) -> str:
    """A `--device`, with or without "RTX", as the table has it; raises UserError."""
    key = BESIDE.sub("", name.lower())
    found = next((each for each in (key, f"rtx{key}") if each in NAMES), None)
    if found is None:
        raise UserError(f"--device {name}: expected one of {', '.join(NAMES)}.")
    return found


def find_device(name: str | None) -> Device:
    """The device of a `--device`: a row of the table, or this machine's, as is the default; raises
    UserError."""
    key = "measured" if name is None else device_name(name)
    if key in DEVICES:
        return DEVICES[key]
    return this_cpu() if key == "cpu" else this_device()


def this_device() -> Device:
    """The device that a run would take here: a card of the table by its name, another one or a CPU
    by measurement."""
    import torch

    return this_card() if torch.cuda.is_available() else this_cpu()


FASTEST: dict[tuple[str, torch.dtype], float] = {}  # what this process has measured so far: FLOP/s


def find_card(name: str) -> Device | None:
    """The row of the table for a card's name, with or without "RTX"; None where it has none."""
    key = BESIDE.sub("", name.lower())
    return DEVICES.get(key) or DEVICES.get(f"rtx{key}")


@cache
def this_card() -> Device:
    """This machine's first card; its peak is measured once, where it is not in the table."""
    import torch

    from minimind.common.launch import bf16_is_fast

    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if known := find_card(name):
        return replace(known, name=name, memory=memory)
    bf16 = bf16_is_fast()
    peaks = [
        matmul_peak("cuda", dtype)
        for dtype in (torch.bfloat16 if bf16 else torch.float16, torch.float32)
    ]
    source = "matrix products measured here"
    return Device(name, "cuda", *peaks, memory, 0.35, *CUDA_ALLOWANCES, source, bf16)


def this_cpu() -> Device:
    """This machine without its cards; its peak is the best measured so far, on as many threads as
    torch takes."""
    import torch

    from minimind.common.launch import bf16_is_fast

    native = [torch.bfloat16] if bf16_is_fast("cpu") else []
    peaks = [
        FASTEST.get(("cpu", dtype)) or matmul_peak("cpu", dtype)
        for dtype in (*native, torch.float32)
    ]
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
    """FLOP/s of the fastest large matrix product of this call and all before it: a busy machine
    shows less."""
    import torch

    size = 1024 if device == "cpu" else 8192
    # Measured in the middle of a run, whose random numbers are not to be touched
    own = torch.Generator(device)
    left, right = (
        torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2)
    )

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
    FASTEST[device, dtype] = max(2 * size**3 / fastest, FASTEST.get((device, dtype), 0.0))
    return FASTEST[device, dtype]


def measure_again(precision: str) -> None:
    """Give the CPU another chance to show its peak; that of a card stays."""
    import torch

    from minimind.common.launch import bf16_is_fast

    if not torch.cuda.is_available():
        half = precision != "fp32" and bf16_is_fast("cpu")
        matmul_peak("cpu", torch.bfloat16 if half else torch.float32, seconds=0.05)


SIGNS = "$€¥£￥"
PRICE = re.compile(
    rf"(?P<sign>[{SIGNS}]?) ?(?P<amount>\d+(\.\d+)?) ?(?P<unit>[A-Za-z]{{3}}|元)?( ?/"
    r" ?(h|hr|hour|小时|时))?"
)


@dataclass(frozen=True)
class Price:
    """What a device costs for an hour, in some currency."""

    amount: float
    currency: str = ""

    def shown(self, hours: float) -> str:
        """The cost of some device hours."""
        number = f"{self.amount * hours:,.2f}"
        return self.currency + number if self.currency in SIGNS else f"{number} {self.currency}"


def parse_price(text: str) -> Price:
    """`8/h`, `8`, `$1.5/h`, `8 CNY/h`, `2元/小时` -> a price; raises UserError."""
    match = PRICE.fullmatch(text.strip())
    if match is None or (match["sign"] and match["unit"]):
        raise UserError(
            f"--price {text}: expected an amount per device and hour, as 8/h, $1.50/h, 8 CNY/h or"
            " 8元/h."
        )
    return Price(
        float(match["amount"]), match["sign"].replace("￥", "¥") or (match["unit"] or "").upper()
    )
