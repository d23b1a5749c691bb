"""What a device can do: its peak, its memory, and the share of the peak that a small model is
assumed to reach.

Imports neither torch nor transformers, so that `minimind plan` refuses a wrong `--device` at once.
"""

import re
from dataclasses import dataclass, replace

from minimind.common.errors import UserError
from minimind.costs.units import GIB


@dataclass(frozen=True)
class Device:
    """Peaks in FLOP/s of dense matrix products with fp32 accumulation; `utilisation` is the assumed
    MFU.

    A process takes more memory than its tensors do: `reserved` bytes (context, code, the libraries'
    workspaces), and `gaps`, the share that is lost between tensors in the allocator's blocks.
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

    def with_gaps(self, checkpointing: bool) -> "Device":
        """This device with the gaps that steps with or without checkpointing leave."""
        if self.kind == "cpu" and checkpointing:
            return replace(self, gaps=CPU_CHECKPOINTING_GAPS)
        return self

    def account(self, tensors: float) -> float:
        """The memory in use that this device reports for so many bytes of tensors; on a CPU that of
        the process."""
        return tensors * (1 + self.gaps) if self.kind == "cpu" else tensors


# Bytes and share that a process takes beside its tensors. The values are our allowances: for a card
# its context and its allocator's gaps; for a CPU what benchmarks/plan_memory.py finds in glibc,
# which leaves many more gaps where layers are computed again.
CUDA_ALLOWANCES = (0.75 * GIB, 0.05)
CPU_ALLOWANCES = (1.5 * GIB, 0.22)
CPU_CHECKPOINTING_GAPS = 0.5


def _card(
    name: str, half: float, fp32: float, gib: float, bandwidth: float, source: str, bf16=True
) -> Device:
    """A card by its data sheet: peaks in TFLOP/s, memory in GiB, bandwidth in GB/s.

    Its utilisation is our assumption for layers of 512 to 1,024: the more a card can compute for
    each byte that it reads, the longer it waits for its memory.
    """
    intensity = half * 1e3 / bandwidth  # FLOP for each byte
    utilisation = 0.40 if intensity < 100 else 0.35 if intensity < 200 else 0.25
    peaks = (half * 1e12, fp32 * 1e12)
    return Device(name, "cuda", *peaks, gib * GIB, utilisation, *CUDA_ALLOWANCES, source, bf16)


# From the makers' documents: dense products (no sparsity) of bf16 or fp16 with fp32 accumulation,
# which on a GeForce are half as fast as with fp16 accumulation. If a data sheet has no such peak,
# it is the document's rate of an SM (512 FLOP a clock) x SMs x boost clock. `--device measured`
# replaces peak and utilisation.
GA102, ADA = "NVIDIA Ampere GA102 whitepaper", "NVIDIA Ada architecture whitepaper"
RTX3060 = f"{GA102}; GeForce RTX 3060 page: 28 SMs, 1.78 GHz"
RTX4090D = f"{ADA}; GeForce RTX 4090 D page: 114 SMs, 2.52 GHz"
A800 = "NVIDIA A800 datasheet: an A100 with NVLink at 400 GB/s"
H800 = "NVIDIA H800 datasheet: an H100 with NVLink at 400 GB/s"
DEVICES = {
    "rtx3060": _card("RTX 3060", 25.5, 12.7, 12, 360, RTX3060),
    "rtx3080": _card("RTX 3080 10 GB", 59.5, 29.8, 10, 760, GA102),
    "rtx3090": _card("RTX 3090", 71, 35.6, 24, 936, GA102),
    "rtx4090": _card("RTX 4090", 165, 82.6, 24, 1008, ADA),
    "rtx4090d": _card("RTX 4090 D", 147, 73.5, 24, 1008, RTX4090D),
    "t4": _card("T4", 65, 8.1, 16, 320, "NVIDIA T4 datasheet", bf16=False),
    "v100": _card("V100 SXM2 32 GB", 125, 15.7, 32, 900, "NVIDIA V100 datasheet", bf16=False),
    "a10": _card("A10", 125, 31.2, 24, 600, "NVIDIA A10 datasheet"),
    "a100": _card("A100 SXM 80 GB", 312, 19.5, 80, 2039, "NVIDIA A100 datasheet"),
    "a800": _card("A800 SXM 80 GB", 312, 19.5, 80, 2039, A800),
    "l20": _card("L20", 119.5, 59.8, 48, 864, "NVIDIA L20 product brief"),
    "h20": _card("H20 96 GB", 148, 44, 96, 4000, "NVIDIA H20 product brief"),
    "h100": _card("H100 SXM", 989, 67, 80, 3350, "NVIDIA H100 datasheet"),
    "h800": _card("H800 SXM", 989, 67, 80, 3350, H800),
    "h200": _card("H200 SXM", 989, 67, 141e9 / GIB, 4800, "NVIDIA H200 datasheet"),
}
NAMES = (*DEVICES, "cpu", "measured")
# What a card's name may have beside its model, as in "NVIDIA A100-SXM4-80GB". Other words count: a
# Ti, a laptop's or a PCIe card is another one.
BESIDE = re.compile(r"nvidia|geforce|tesla|sxm\d?|\d+ ?gb|hbm\d?e?|[\s_-]")
CPU_UTILISATION = 0.5


def device_name(name: str) -> str:
    """A `--device`, with or without "RTX", as the table has it; raises UserError."""
    key = BESIDE.sub("", name.lower())
    for candidate in (key, f"rtx{key}"):
        if candidate in NAMES:
            return candidate
    raise UserError(f"--device {name}: expected one of {', '.join(NAMES)}.")


def find_card(name: str) -> Device | None:
    """The row of the table for a card's name, with or without "RTX"; None if there is none."""
    key = BESIDE.sub("", name.lower())
    return DEVICES.get(key) or DEVICES.get(f"rtx{key}")
