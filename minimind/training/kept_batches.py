"""Batches that a run keeps of steps that are not finite, for `minimind replay`: written and read.

bad_batch-STEP/
    rank-0.safetensors ...    the micro-batches of each process
    model/                    the weights they met, a stage directory; of the last step alone
    batch.json                the record; written last
"""

import os
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from minimind.common.errors import UserError, decoration
from minimind.common.files import read_json, write_json
from minimind.common.launch import is_main_process
from minimind.training.saving import Writing, save_model

# The fields of batch.json that are read, and the tensors of a batch with a value for each token.
FIELDS = {"step": int, "micro_batches": int, "precision": str, "weights": str | None}
FIELDS |= dict.fromkeys(("loss", "grad_norm"), str | int | float | None)
PER_TOKEN = ("labels", "attention_mask", "position_ids", "completion_mask")
EXPECTED = "Expected the bad_batch-STEP of a run, with batch.json and rank-N.safetensors inside."


def save_batch(
    trainer: Trainer,
    directory: Path,
    step: int,
    batches: list[dict],
    loss: float,
    grad_norm: float,
    with_weights: bool,
) -> None:
    """Keep the micro-batches of a step and, if requested, the weights; all processes call it."""
    args, rank = trainer.args, trainer.args.process_index
    tensors = {
        # A clone, since safetensors refuses tensors that share memory
        f"{number}/{name}": value.detach().cpu().clone().contiguous()
        for number, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    writing = Writing(directory, 0)
    with writing.part():
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f".rank-{rank}.partial"
        save_file(tensors, partial)
        partial.replace(directory / f"rank-{rank}.safetensors")
    if with_weights:
        with writing.part():
            save_model(trainer, directory / "model")
            if is_main_process():
                trainer.processing_class.save_pretrained(directory / "model")
    with decoration("keeping a batch"):
        writing.check()  # waits for all: a launcher ends all processes as soon as one has ended
        if is_main_process():
            record = {
                "step": step,
                "loss": repr(loss),  # JSON has no nan
                "grad_norm": repr(grad_norm),
                "micro_batches": len(batches),
                "processes": args.world_size,
                "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
                "weights": "model" if with_weights else None,
            }
            write_json(directory / "batch.json", record)


def read_batch(directory: Path) -> tuple[dict, dict[int, list[dict]]]:
    """A kept batch: its record, and the micro-batches of each process.

    Raises:
        UserError: the directory holds no kept batch, or a damaged one.
    """
    if not os.path.lexists(directory / "batch.json"):
        raise UserError(f"{directory} is no kept batch: there is no batch.json. {EXPECTED}")
    record = read_json(directory / "batch.json", EXPECTED, fields=FIELDS)
    processes = {}
    for path in sorted(directory.glob("rank-*.safetensors")):
        process, batches = _read_process(path)
        if len(batches) != record["micro_batches"]:
            raise UserError(
                f"{path} holds {len(batches)} micro-batches, batch.json says"
                f" {record['micro_batches']}."
            )
        processes[process] = batches
    if not processes:
        raise UserError(f"{directory} holds no batch. {EXPECTED}")
    return record, processes


def _read_process(path: Path) -> tuple[int, list[dict]]:
    """A process's number and micro-batches; raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a regular file. {EXPECTED}")
    batches: dict[int, dict] = defaultdict(dict)
    try:
        process = int(path.stem.removeprefix("rank-"))
        for key, value in load_file(path).items():
            number, _, name = key.partition("/")
            batches[int(number)][name] = value
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. {EXPECTED}") from error
    for batch in batches.values():
        ids = batch.get("input_ids")
        if (
            ids is None
            or ids.ndim != 2
            or ids.is_floating_point()
            or any(ids.shape != batch[name].shape for name in PER_TOKEN if name in batch)
        ):
            raise UserError(f"{path} holds no rows of token ids. {EXPECTED}")
    return process, [batches[number] for number in sorted(batches)]
