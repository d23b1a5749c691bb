"""Losses of a model: held-out metrics of a trainer, bits per byte, the loss of each token."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from minimind.data.packing import IGNORED, PackedCollator
from minimind.stage_directory import virtual_tokens
from minimind.tokenizer import token_byte_lengths

MAX_LOGITS = 2**26  # of one batch of `row_metrics`
INPUTS = ("input_ids", "attention_mask", "position_ids")  # the entries of a batch for the model
# What `Trainer.evaluate` returns besides metrics
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


# Of a trainer


def held_out_metrics(trainer: Trainer) -> dict[str, dict[str, float]]:
    """The trainer's held-out metrics "before" its first step (needs `eval_on_start`) and "after"
    its last; both are empty without held-out rows.

    "before" comes from the log: under ZeRO-1 and 2 a trainer cannot evaluate before it trains.
    """
    if trainer.eval_dataset is None:
        return {"before": {}, "after": {}}
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    before, last = (logged[0], logged[-1]) if logged else ({}, {})
    # What was measured of these very weights is not measured again
    measured = last.get("step") == trainer.state.global_step
    is_last = measured and not trainer.args.load_best_model_at_end
    after = last if is_last else trainer.evaluate()
    return {
        moment: {
            name: round(float(value), 6)
            for key, value in metrics.items()
            if key.startswith("eval_") and (name := key.removeprefix("eval_")) not in TIMES
        }
        for moment, metrics in (("before", before), ("after", after))
    }


def language_model_metrics(trainer: Trainer, counts: dict) -> dict[str, dict[str, float]]:
    """`held_out_metrics` with perplexity per token and bits per byte."""
    metrics = held_out_metrics(trainer)
    for values in filter(None, metrics.values()):
        values["perplexity"] = round(perplexity(values["loss"]), 4)
        values["bits_per_byte"] = round(bits_per_byte(values["loss"], counts), 6)
    return metrics


def token_losses(trainer: Trainer, rows: int = 64) -> list[torch.Tensor]:
    """Loss in nats of each trained token of the first held-out rows, (tokens,) for each row, on the
    main process.

    The trainer's collator must turn the rows into input_ids and labels.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    dataset, size = trainer.eval_dataset, trainer.args.eval_batch_size
    rows = min(rows, len(dataset))
    training, losses = model.training, []
    model.eval()
    try:
        for start in range(0, rows, size):
            chosen = [dataset[index] for index in range(start, min(start + size, rows))]
            batch = trainer.data_collator(chosen)
            counts = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
            losses += label_losses(model, batch).split(counts)
    finally:
        model.train(training)
    return losses


# Units


def perplexity(loss: float) -> float:
    """Mean loss in nats per token -> perplexity, which stays finite."""
    return math.exp(min(loss, 100))


def bits_per_byte(loss: float, counts: dict) -> float:
    """Mean loss in nats per predicted token -> bits per byte of text, which compares models across
    tokenizers.

    Total loss / (ln 2 * bytes of the predicted tokens). `counts` has the number of "targets" and of
    "target_bytes", see `documents.load_blocks`.
    """
    return loss * counts["targets"] / (math.log(2) * counts["target_bytes"])


def bits_per_nat(counts: dict) -> float | None:
    """The factor from the loss of a batch to bits per byte, the mean over an epoch's targets; None
    if unknown.

    Each source has the weight of its rows in an epoch; see `documents.load_blocks`.
    """
    if "target_bytes" not in counts:
        return None
    sources = counts.get("sources", [{**counts, "rows_per_epoch": counts["blocks"]}])
    epoch = {
        name: sum(source[name] * source["rows_per_epoch"] / source["blocks"] for source in sources)
        for name in ("targets", "target_bytes")
    }
    return bits_per_byte(1, epoch)


# Of rows


def label_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A collated batch -> loss in nats of each of its labels, (labels,), on the CPU."""
    inputs = {key: value.to(model.device) for key, value in batch.items() if key in INPUTS}
    if virtual_tokens(model):  # then each row is one text, and peft computes the positions
        inputs.pop("position_ids", None)
    targets = batch["labels"][:, 1:].flatten().to(model.device)
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] :]
        logits = logits[:, :-1].flatten(0, 1).float()
        return cross_entropy(logits, targets, reduction="none")[targets != IGNORED].cpu()


def token_loss_distribution(losses: torch.Tensor, bars: int = 32, top: float = 16.0) -> dict:
    """Losses in nats (tokens,) -> a histogram and its mean, median, 90th and 99th percentile.

    `edges` are equal steps from 0 to `top`; the last bar also counts all losses beyond.
    """
    counts = torch.histc(losses.clamp(max=top), bins=bars, min=0, max=top)
    shares = torch.tensor([0.5, 0.9, 0.99], dtype=torch.double)
    quantiles = torch.quantile(losses[: 2**24].double(), shares).tolist()  # its limit
    return {
        "tokens": len(losses),
        "mean": round(losses.double().mean().item(), 6),
        **{
            name: round(value, 6)
            for name, value in zip(("median", "p90", "p99"), quantiles, strict=True)
        },
        "edges": [index * top / bars for index in range(bars + 1)],
        "counts": counts.long().tolist(),
    }


class RowLoss(NamedTuple):
    """The loss in `nats` of the labels of a row, how many `tokens` they are, and their `bytes`."""

    nats: float
    tokens: int
    bytes: int


def row_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict], batch_size: int
) -> list[RowLoss]:
    """The loss of each of some rows of input_ids and labels."""
    byte_lengths = torch.tensor(token_byte_lengths(tokenizer))
    collate = PackedCollator(tokenizer.pad_token_id or 0)
    limit = MAX_LOGITS // model.config.vocab_size
    # Little padding, and the largest batch first
    waiting = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    found: dict[int, RowLoss] = {}
    with tqdm(total=len(rows), unit=" rows", desc="loss", disable=None) as progress:
        while waiting:
            count = max(1, min(batch_size, limit // len(rows[waiting[0]]["input_ids"])))
            chosen, waiting = waiting[:count], waiting[count:]
            batch = collate([rows[index] for index in chosen])
            targets = batch["labels"][:, 1:]
            counts = (targets != IGNORED).sum(1).tolist()
            losses = label_losses(model, batch).double().split(counts)
            for index, own, row in zip(chosen, losses, targets, strict=True):
                size = int(byte_lengths[row[row != IGNORED]].sum())
                found[index] = RowLoss(own.sum().item(), len(own), size)
            progress.update(len(chosen))
    return [found[index] for index in range(len(rows))]


def row_metrics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict], batch_size: int
) -> dict:
    """`loss_metrics` of rows of input_ids and labels."""
    return loss_metrics(row_losses(model, tokenizer, rows, batch_size))


def loss_metrics(losses: Sequence[RowLoss]) -> dict:
    """The number of `tokens` with a label, their mean `loss` in nats, `perplexity` and
    `bits_per_byte`; without labels, only `tokens`."""
    nats, tokens, size = (
        (sum(column) for column in zip(*losses, strict=True)) if losses else (0,) * 3
    )
    if not tokens:
        return {"tokens": 0}
    loss = nats / tokens
    metrics = {"loss": loss, "perplexity": perplexity(loss)}
    if size:
        metrics["bits_per_byte"] = bits_per_byte(loss, {"targets": tokens, "target_bytes": size})
    return {"tokens": tokens} | {name: round(value, 6) for name, value in metrics.items()}
