"""Time and memory of a trainer's steps, and the step as `costs` describes it."""

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from minimind.costs.devices import Device
from minimind.costs.step import Step, reference_kind
from minimind.data.row_lengths import row_lengths, shares

MEASURED_STEPS = 5
SAMPLED_ROWS = 2_000  # whose lengths are counted


class PeakMemory:
    """The highest memory use of this process's tensors from now on, in bytes.

    On a GPU it is the allocator's own record. On a CPU it is the growth of the resident memory, of
    which Linux keeps the highest value, plus the `tensors` (bytes) that already exist; None where
    the system keeps no such record.
    """

    def __init__(self, device: torch.device, tensors: int):
        self.device, self.tensors, self.before = device, tensors, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            # Freed memory would be used again unseen
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # reset the highest value
            self.before = self._resident("VmRSS")
        except (OSError, AttributeError, StopIteration):
            return

    def read(self) -> int | None:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self.before is None else self._resident("VmHWM") - self.before + self.tensors

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


class StepMeter(TrainerCallback):
    """Measures the seconds of each of the first `steps` steps and their peak of memory, then calls
    `finished` once."""

    def __init__(self, trainer: Trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if len(self.seconds) == 1:  # the first step loads code and creates the optimizer's states
            existing = sum(t.numel() * t.element_size() for t in self._lasting_tensors())
            self.peak = PeakMemory(args.device, existing)
        self.began = time.perf_counter()

    def _lasting_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that exist between two steps."""
        models = [self.trainer.model, getattr(self.trainer, "ref_model", None)]
        yield from {
            parameter for model in models if model is not None for parameter in model.parameters()
        }
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        for part in getattr(optimizer, "parts", [optimizer]):
            for state in part.state.values():
                yield from filter(torch.is_tensor, state.values())

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.seconds) >= self.steps:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        if len(self.seconds) == self.steps:
            self.finished(state)

    def results(self) -> dict[str, float]:
        """The number of steps, their median seconds without the first, which does more set-up than
        computation, and the peak in bytes."""
        seconds, peak = median(self.seconds[1:] or self.seconds), self.peak.read()
        return {"steps": len(self.seconds), "seconds_per_step": seconds, "peak_memory": peak}

    def finished(self, state) -> None:
        """Use the results."""


def step_of(trainer: Trainer, device: Device) -> tuple[Step, float]:
    """The step of a trainer, and the mean length of its rows as the batches hold them."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    unpaired = hasattr(trainer, "calculate_KL")  # KTO's
    adapter = isinstance(model, PeftModel)

    # Lengths: each batch is padded to its longest row, but for pairs that share rows
    dataset = trainer.train_dataset
    rows = dataset[:SAMPLED_ROWS] if hasattr(dataset, "__getitem__") else {}
    pairs = "rejected_ids" in rows
    shared_prompts = pairs  # see PreferenceTrainer and RewardStageTrainer
    if rows:
        found = row_lengths(rows, pairs, shared_prompts)
        lengths = [row.length for row in found]
    else:
        lengths = [getattr(args, "block_size", None) or args.max_length]
    size = args.per_device_train_batch_size
    padded = [max(lengths[start : start + size]) for start in range(0, len(lengths), size)]
    padded = fmean(lengths if shared_prompts else padded)

    # DeepSpeed
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin else {}
    optimizer_device, parameter_device = (
        zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")
    )

    return Step(
        batch_size=size,
        length=max(lengths),
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        device=device.kind,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        optimizer="muon" if getattr(args, "use_muon", False) else "adamw",
        checkpointing=bool(args.activation_checkpointing),
        attention=model.config._attn_implementation,
        masked=not hasattr(args, "block_size") or args.document_mask,
        pairs=pairs,
        shared_prompts=shared_prompts,
        **(shares(found) if shared_prompts and rows else {}),
        unpaired=unpaired and trainer.calculate_KL,
        reference=reference_kind(args, adapter, device.kind),
        weighted=getattr(trainer, "weighted", False),
        zero_stage=zero.get("stage", 0) if plugin else None,
        offload_optimizer=optimizer_device != "none",
        offload_parameters=parameter_device != "none",
    ), padded
