"""A run that another number of processes continues: the same rows in every step, the same weights
and optimizer state.

The rows of step k are those at [k * rows, (k + 1) * rows) of a permutation that the seed decides,
however many processes share them. So a checkpoint fits any number of processes that divides its
rows per step: micro-batch and accumulation are computed anew (`check_world_size`), and ZeRO's
shards, which belong to the number of processes that wrote them, go through DeepSpeed's universal
checkpoint (`prepare_checkpoint`).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from minimind.common.errors import UserError, reason
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.training.saving import REMEDY, disk_fault, not_written, reports_disk_errors

# What DeepSpeed's converter knows: weights, first and second moment.
CONVERTIBLE_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# DeepSpeed's program, which loads what it converts as a resumed run does: without the code that a
# file asks for.
CONVERTER = """
from runpy import run_module
from minimind.common.launch import refuse_code_in_pickles
refuse_code_in_pickles()
run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Batch:
    """How one optimizer step is shared out."""

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

    def shared_by(self, processes: int) -> "Batch | None":
        """The same rows with another number of processes and no larger micro-batch; None where they
        do not divide."""
        share, rest = divmod(self.rows, processes)
        if rest:
            return None
        sizes = range(min(share, self.per_device_train_batch_size), 0, -1)
        micro_batch = next(size for size in sizes if share % size == 0)
        return Batch(processes, micro_batch, share // micro_batch)


def saved_processes(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each leaves the state of its random numbers."""
    return len(list(checkpoint.glob("rng_state_*.pth"))) or 1


def check_world_size(saved: dict, now: dict, args: TrainingArguments) -> None:
    """Set micro-batch and accumulation so that a step takes the rows it took in the run's first
    start.

    Called in every process, before there is a Trainer, when a checkpoint is continued by another
    number of processes than wrote it.

    Args:
        saved: the run's definition (`definition_of`), with "processes",
            "per_device_train_batch_size" and "gradient_accumulation_steps" of its first start.
        now: the definition of this command.
        args: the training arguments; `resume_from_checkpoint` is the path of the checkpoint.

    Raises:
        UserError: the rows cannot be shared out evenly, or the optimizer state cannot be.
    """
    first = Batch(*(saved[name] for name in Batch.__dataclass_fields__))
    checkpoint, processes = Path(args.resume_from_checkpoint), now["processes"]
    wrote = saved_processes(checkpoint)
    optimizer = (
        "muon" if getattr(args, "use_muon", False) else getattr(args.optim, "value", args.optim)
    )
    if args.deepspeed and wrote != processes and optimizer not in CONVERTIBLE_OPTIMIZERS:
        raise UserError(
            f"{checkpoint} was written by {wrote} processes, this command starts {processes}, and"
            f" under DeepSpeed the optimizer state of {optimizer} cannot be shared out anew (that"
            f" of {CONVERTIBLE_OPTIMIZERS[0]} can). Start {wrote} processes."
        )
    batch = first.shared_by(processes)
    if batch is None:
        *fitting, last = [
            str(count) for count in range(1, first.rows + 1) if first.rows % count == 0
        ]
        raise UserError(
            f"{checkpoint} is of a run with {first} per step, which {processes} processes cannot"
            f" share evenly. Start {', '.join(fitting)} or {last} processes, or begin anew in"
            " another --output_dir."
        )
    if is_main_process():
        say(f"the run began with {first} per step, and goes on with {batch}")
    args.per_device_train_batch_size = batch.per_device_train_batch_size
    args.gradient_accumulation_steps = batch.gradient_accumulation_steps
    if args.deepspeed:  # these were copied when the arguments were read
        config = args.hf_deepspeed_config.config
        config["train_micro_batch_size_per_gpu"] = batch.per_device_train_batch_size
        config["gradient_accumulation_steps"] = batch.gradient_accumulation_steps
        config.pop("train_batch_size", None)  # the product, which DeepSpeed works out


class SharedBatches(BatchSamplerShard):
    """Identical to accelerate's except: the rows left over at the end of an epoch are divided among
    the processes, where accelerate fills each up to a whole micro-batch with rows from the epoch's
    beginning.

    So every step takes the rows that one process takes. (Of fewer rows than processes some take the
    first one too.)
    """

    def __iter__(self) -> Iterator[list[int]]:
        batches = []
        for batch in self.batch_sampler:
            batches.append(batch)
            if len(batches) == self.num_processes and len(batch) == self.batch_size:
                yield batches[self.process_index]
                batches = []
        rows = [row for batch in batches for row in batch]
        if rows and not self.drop_last:
            ends = [
                len(rows) * (self.process_index + offset) // self.num_processes for offset in (0, 1)
            ]
            yield rows[slice(*ends)] or rows[:1]


def share_last_rows(trainer: Trainer) -> None:
    """Let the training data of `trainer` end as `SharedBatches` says; nothing changes for one
    process."""
    build = trainer.get_train_dataloader

    def build_shared():
        loader = build()
        shard = getattr(loader, "batch_sampler", None)
        if (
            type(shard) is BatchSamplerShard
            and type(shard.batch_sampler) is BatchSampler
            and not shard.split_batches
        ):
            shard.__class__ = SharedBatches  # a DataLoader lets nobody exchange its sampler
        return loader

    trainer.get_train_dataloader = build_shared


def prepare_checkpoint(trainer: Trainer) -> None:
    """Make the shards of another number of processes loadable: call it on all of them, just before
    `train`.

    It converts into a hidden directory of the run's own, the checkpoint stays as it is, and points
    `trainer.args.resume_from_checkpoint` there. The directory goes after the first step.

    Raises:
        UserError: DeepSpeed's converter failed.
    """
    args = trainer.args
    if not (args.resume_from_checkpoint and trainer.is_deepspeed_enabled):
        return
    checkpoint = Path(args.resume_from_checkpoint)
    if saved_processes(checkpoint) == args.world_size:
        return
    converted = Path(args.output_dir) / f".universal-{checkpoint.name}"
    if is_main_process():
        with reports_disk_errors(checkpoint.parent):
            _convert(checkpoint, converted)
    if dist.is_initialized():
        dist.barrier()
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})[
        "load_universal"
    ] = True
    args.resume_from_checkpoint = str(converted)
    trainer.add_callback(_RemoveConverted(trainer, converted))


class _RemoveConverted(TrainerCallback):
    def __init__(self, trainer: Trainer, directory: Path):
        self.trainer, self.directory = trainer, directory

    def on_train_begin(self, args, state, control, **kwargs):
        # Checkpoints written from now on are ordinary ones, and load as such (the best model at the
        # end).
        self.trainer.model_wrapped._config.load_universal_checkpoint = False

    def on_step_end(self, args, state, control, **kwargs):
        # All have read their part: this step is done
        if is_main_process() and self.directory.exists():
            shutil.rmtree(self.directory, ignore_errors=True)


def _convert(checkpoint: Path, target: Path) -> None:
    """Links to everything in `checkpoint`, and its shards in DeepSpeed's universal form."""
    shards = max(
        checkpoint.glob("global_step*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0)
    )
    partial = target.with_name(f"{target.name}.partial")
    for directory in target.parent.glob(".universal-checkpoint-*"):  # a killed run leaves its own
        shutil.rmtree(directory, ignore_errors=True)
    partial.mkdir()
    for entry in checkpoint.iterdir():
        (partial / entry.name).symlink_to(entry.resolve())
    words = [
        "--input_folder",
        partial / shards.name,
        "--output_folder",
        partial / f"{shards.name}_universal",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    # This package may not be installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", CONVERTER, *words, "--inject_missing_state"],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        fault = disk_fault(partial)
        shutil.rmtree(partial, ignore_errors=True)
        if fault:
            raise UserError(
                f"{not_written(target, fault)}. {REMEDY}, then run the same command again."
            )
        said = done.stderr.strip()
        words = (reason(RuntimeError(said)).splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"{checkpoint} was written by {saved_processes(checkpoint)} processes and DeepSpeed"
            f" cannot convert it for another number: {words}. Start {saved_processes(checkpoint)}"
            " processes."
        )
    partial.replace(target)
