"""A run that another number of processes continues, with the same rows in every step and the same
weights and optimizer state.

The rows of step k are those at [k * rows, (k + 1) * rows) of a permutation that the seed decides,
however many processes share them (dataloaders.py). So a checkpoint fits any number of processes
that divides its rows per step: micro-batch and accumulation are recomputed (`check_world_size`),
and ZeRO's shards, of which each process wrote one, go through DeepSpeed's universal checkpoint
(`prepare_checkpoint`).
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainingArguments

from minimind.common.errors import UserError, reason
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.training.saving import REMEDY, disk_fault, not_written, reports_disk_errors

# DeepSpeed's converter handles weights, first and second moment
CONVERTIBLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "muon")
# DeepSpeed's program, which each of its processes is a fork of. It loads the shards as a resumed
# run does: without running code that a file asks for.
CONVERTER = """
from runpy import run_module
from minimind.common.launch import refuse_code_in_pickles
from minimind.training.elastic import name_momentum_as_moments
refuse_code_in_pickles()
name_momentum_as_moments()
run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class RowSplit:
    """How the rows of an optimizer step are divided."""

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    @property
    def rows(self) -> int:
        """Rows per optimizer step, of all processes."""
        return self.processes * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def __str__(self) -> str:
        noun = "processes" if self.processes > 1 else "process"
        return (
            f"{self.rows:,} rows ({self.per_device_train_batch_size} x"
            f" {self.gradient_accumulation_steps} accumulation x {self.processes} {noun})"
        )

    def shared_by(self, processes: int) -> "RowSplit | None":
        """The same rows for another number of processes with no larger micro-batch; None where they
        cannot be divided."""
        share, rest = divmod(self.rows, processes)
        if rest:
            return None
        sizes = range(min(share, self.per_device_train_batch_size), 0, -1)
        micro_batch = next(size for size in sizes if share % size == 0)
        return RowSplit(processes, micro_batch, share // micro_batch)


def saved_processes(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each leaves the state of its random numbers."""
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1


def check_world_size(saved: dict, now: dict, args: TrainingArguments) -> None:
    """Set micro-batch and accumulation so that a step takes as many rows as when the run began.

    All processes call it, before there is a Trainer, when another number of processes than wrote a
    checkpoint continues from it.

    Args:
        saved: the definition of the run, with "processes", "per_device_train_batch_size" and
            "gradient_accumulation_steps" of its first start.
        now: the definition of this command's run.
        args: the training arguments; `resume_from_checkpoint` is the path of the checkpoint.

    Raises:
        UserError: the rows or the optimizer state cannot be divided.
    """
    first = RowSplit(*(saved[name] for name in RowSplit.__dataclass_fields__))
    checkpoint, processes = Path(args.resume_from_checkpoint), now["processes"]
    wrote = saved_processes(checkpoint)
    uses_muon = getattr(args, "use_muon", False)
    optimizer = "muon" if uses_muon else getattr(args.optim, "value", args.optim)
    if args.deepspeed and wrote != processes and optimizer not in CONVERTIBLE_OPTIMIZERS:
        raise UserError(
            f"{checkpoint} was written by {wrote} processes, this command starts {processes}, and"
            f" under DeepSpeed the optimizer state of {optimizer} cannot be redistributed (that"
            f" of {CONVERTIBLE_OPTIMIZERS[0]} can). Start {wrote} processes."
        )
    split = first.shared_by(processes)
    if split is None:
        *fitting, last = [str(n) for n in range(1, first.rows + 1) if first.rows % n == 0]
        raise UserError(
            f"{checkpoint} is of a run with {first} per step, which {processes} processes cannot"
            f" share evenly. Start {', '.join(fitting)} or {last} processes, or start over in"
            " another --output_dir."
        )
    if is_main_process():
        say(f"the run began with {first} per step, and continues with {split}")
    args.per_device_train_batch_size = split.per_device_train_batch_size
    args.gradient_accumulation_steps = split.gradient_accumulation_steps
    if args.deepspeed:  # these were copied when the arguments were read
        config = args.hf_deepspeed_config.config
        config["train_micro_batch_size_per_gpu"] = split.per_device_train_batch_size
        config["gradient_accumulation_steps"] = split.gradient_accumulation_steps
        config.pop("train_batch_size", None)  # the product, which DeepSpeed works out


def prepare_checkpoint(trainer: Trainer) -> Path | None:
    """Make the shards of another number of processes loadable; all processes call it.

    Returns the hidden directory of the converted checkpoint, to which it sets
    `trainer.args.resume_from_checkpoint`, or None where nothing needs to be converted. The
    checkpoint itself stays as it is.

    Raises:
        UserError: DeepSpeed's converter failed.
    """
    args = trainer.args
    if not (args.resume_from_checkpoint and trainer.is_deepspeed_enabled):
        return None
    checkpoint = Path(args.resume_from_checkpoint)
    if saved_processes(checkpoint) == args.world_size:
        return None
    converted = Path(args.output_dir) / f".universal-{checkpoint.name}"
    if is_main_process():
        with reports_disk_errors(checkpoint.parent):
            _convert(checkpoint, converted)
    if dist.is_initialized():
        dist.barrier()
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    config.setdefault("checkpoint", {})["load_universal"] = True
    args.resume_from_checkpoint = str(converted)
    return converted


class RemoveConvertedCallback(TrainerCallback):
    """Removes the converted checkpoint after the first step."""

    def __init__(self, trainer: Trainer, directory: Path):
        self.trainer, self.directory = trainer, directory

    def on_train_begin(self, args, state, control, **kwargs):
        # The checkpoints of this run are ordinary ones, and load as such (the best at the end)
        self.trainer.model_wrapped._config.load_universal_checkpoint = False

    def on_step_end(self, args, state, control, **kwargs):
        # This step is done, so all processes have read their part
        if is_main_process() and self.directory.exists():
            shutil.rmtree(self.directory, ignore_errors=True)


def name_momentum_as_moments() -> None:
    """Let DeepSpeed's converter see Muon's momentum as AdamW's moments, the only states that it
    takes from a shard; `MuonWithAdamW` gives it its name again.

    Both can go when the converter follows the optimizer's own names (deepspeed#8608, open).
    """
    from deepspeed.checkpoint.deepspeed_checkpoint import DeepSpeedCheckpoint

    load = DeepSpeedCheckpoint.get_zero_checkpoint_state

    def load_renamed(self, *args, **kwargs):
        shard = load(self, *args, **kwargs)
        for state in shard["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            if "momentum_buffer" in state:
                state["exp_avg"] = state["exp_avg_sq"] = state["momentum_buffer"]
        return shard

    DeepSpeedCheckpoint.get_zero_checkpoint_state = load_renamed


def _convert(checkpoint: Path, target: Path) -> None:
    """Write the shards in DeepSpeed's universal form, beside links to all of the checkpoint."""
    shards = max(
        checkpoint.glob("global_step*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0)
    )
    partial = target.with_name(f"{target.name}.partial")
    for directory in target.parent.glob(".universal-checkpoint-*"):  # a killed run leaves its own
        shutil.rmtree(directory, ignore_errors=True)
    partial.mkdir()
    for entry in checkpoint.iterdir():
        (partial / entry.name).symlink_to(entry.resolve())
    folders = ["--input_folder", partial / shards.name]
    folders += ["--output_folder", partial / f"{shards.name}_universal"]
    command = [sys.executable, "-c", CONVERTER, *folders, "--inject_missing_state"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for this package
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        fault = disk_fault(partial)
        shutil.rmtree(partial, ignore_errors=True)
        if fault:
            raise UserError(
                f"{not_written(target, fault)}. {REMEDY}, then run the same command again."
            )
        error = RuntimeError(process.stderr.strip())
        words = (reason(error).splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"{checkpoint} was written by {saved_processes(checkpoint)} processes and DeepSpeed"
            f" cannot convert it for another number: {words}. Start {saved_processes(checkpoint)}"
            " processes."
        )
    partial.replace(target)
