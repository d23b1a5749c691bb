"""`minimind replay`: compute the loss of a kept batch again, row by row and layer by layer."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import PreTrainedModel

from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.data.packing import IGNORED
from minimind.stage_directory import (
    holds_reward_model,
    is_reward_config,
    load_model,
    require_stage,
)
from minimind.tokenizer import load_tokenizer
from minimind.training.kept_batches import read_batch

INPUTS = ("input_ids", "attention_mask", "position_ids")
SHOWN = 5  # rows, tokens and tensors of each kind that are named


def replay(
    directory: str | Path, model: str | Path | None = None, precision: str | None = None
) -> dict:
    """Compute the loss of a kept batch again, as in training, and find where it is not finite.

    Returns "step", "recorded" (loss and gradient norm in the run), "precision", "rows" (their
    number), "loss" (sum over trained tokens / their number; null if not finite), "bad_rows"
    (process, micro-batch, row, tokens without a finite loss), "first_layer" (where in the forward
    pass the first non-finite value appears), "first_gradient" (the same in the backward pass),
    "bad_weights" and "bad_gradients" (names of parameters).

    Raises:
        UserError: the directory holds no kept batch, or there are no weights to compute with.
    """
    directory = Path(directory)
    record, processes = read_batch(directory)
    if model is None and record["weights"] is None:
        raise UserError(
            f"{directory} holds no weights: the run continued after this step. Name those to"
            " compute with, such as the run's directory or its last checkpoint: --model DIR."
        )
    path = Path(model) if model is not None else directory / record["weights"]
    scores = holds_reward_model(require_stage(path))
    network, tokenizer = load_model(path, scores=scores).train(), load_tokenizer(path)
    micro_batches = [
        ({"process": process, "micro_batch": number}, batch)
        for process, batches in processes.items()
        for number, batch in enumerate(batches)
    ]
    largest = max(int(batch["input_ids"].max()) for _, batch in micro_batches)
    if largest >= network.config.vocab_size:
        raise UserError(
            f"{directory} holds the token id {largest:,}, and the model in {path} has"
            f" {network.config.vocab_size:,} tokens. Name the weights of the same run with --model"
            " DIR."
        )
    precision = precision or ("bf16" if record["precision"] == "bf16" else "fp32")
    autocast = torch.autocast(network.device.type, torch.bfloat16, enabled=precision == "bf16")

    total, count, rows, bad_rows = 0.0, 0, 0, []
    first_layer = first_gradient = None
    for place, batch in micro_batches:
        with watch(network) as watched, autocast:
            losses, labels = _token_losses(network, batch)
            trained = int((labels != IGNORED).sum())
            loss = losses.sum() / max(trained, 1)
            if loss.requires_grad:
                loss.backward()
        total, count, rows = (
            total + float(losses.detach().sum()),
            count + trained,
            rows + len(labels),
        )
        first_layer = first_layer or (watched.first and {**place, **watched.first})
        gradient = watched.first_gradient
        first_gradient = first_gradient or (gradient and {**place, **gradient})
        bad_rows += [{**place, **row} for row in _bad_rows(losses, batch["input_ids"], tokenizer)]

    parameters = list(network.named_parameters())
    return {
        "directory": str(directory),
        "weights": str(path),
        "step": record["step"],
        "recorded": {"loss": record["loss"], "grad_norm": record["grad_norm"]},
        "precision": precision,
        "rows": rows,
        "loss": total / count if count and math.isfinite(total) else None,
        "bad_rows": bad_rows,
        "first_layer": first_layer,
        "first_gradient": first_gradient,
        "bad_weights": [name for name, p in parameters if not torch.isfinite(p).all()],
        "bad_gradients": [
            name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()
        ],
    }


def _token_losses(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every predicted token, 0 where none is trained, and the labels; both (rows,
    length - 1).

    Of a preference pair's batch the replies count: its loss is computed from their likelihoods. A
    reward model has one loss for a pair, which both its rows get here.
    """
    inputs = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
    if is_reward_config(model.config):
        chosen, rejected = model(**inputs, use_cache=False).logits.float().chunk(2)
        losses = -logsigmoid(chosen - rejected).repeat(2, 1)
        return losses, torch.zeros_like(losses, dtype=torch.long)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch.get("labels", batch["input_ids"])
    if "labels" not in batch and "completion_mask" in batch:
        labels = torch.where(batch["completion_mask"].bool(), labels, IGNORED)
    labels = labels[:, 1:].to(model.device)
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, labels


def _bad_rows(losses: torch.Tensor, input_ids: torch.Tensor, tokenizer) -> Iterator[dict]:
    """The rows with a token whose loss is not finite, and the text before it."""
    for row, (ids, row_losses) in enumerate(zip(input_ids, losses, strict=True)):
        bad = torch.nonzero(~torch.isfinite(row_losses)).flatten().tolist()
        if bad:
            first = [
                {"position": at, "token": tokenizer.decode([int(ids[at])])} for at in bad[:SHOWN]
            ]
            text = tokenizer.decode(ids[: bad[0] + 1].tolist())[-80:]
            yield {"row": row, "bad_tokens": len(bad), "first": first, "text": text}


class Watch:
    """Where in a forward and a backward pass the first value is not finite."""

    def __init__(self):
        self.first = self.first_gradient = None

    def after_module(self, name: str, inputs: tuple, output) -> None:
        """Called by torch after each module."""
        tensor = getattr(output, "last_hidden_state", output)
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.on_gradient(name, gradient))
        if self.first is None and not torch.isfinite(tensor).all():
            self.first = {"layer": name, **_where(tensor)}

    def on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Called by torch with the gradient of each module's output."""
        if self.first_gradient is None and not torch.isfinite(gradient).all():
            self.first_gradient = {"layer": name, **_where(gradient)}


def _where(tensor: torch.Tensor) -> dict:
    """What is not finite in a tensor: the number of values and, in (rows, length, hidden), the
    first [row, position]s."""
    bad = ~torch.isfinite(tensor)
    place = {"values": int(bad.sum()), "of": bad.numel()}
    if tensor.ndim == 3:
        place["places"] = torch.nonzero(bad.any(-1)).tolist()[:SHOWN]
    return place


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Watch every module of the model in the order in which they finish, so that the innermost is
    named."""
    watched = Watch()
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, output, name=name: watched.after_module(name, inputs, output)
        )
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def print_replay(report: dict) -> None:
    """Print the report."""
    # What was computed
    recorded = report["recorded"]
    loss = "not finite" if report["loss"] is None else f"{report['loss']:.4f}"
    say(
        f"{report['directory']}: step {report['step']}, {report['rows']} rows, weights"
        f" {report['weights']}"
    )
    say(f"  in the run   loss {recorded['loss']}, gradient norm {recorded['grad_norm']}")
    say(f"  again        loss {loss} ({report['precision']})")

    # Tensors and layers that are not finite
    bad_weights, bad_gradients = report["bad_weights"], report["bad_gradients"]
    for names, kind in ((bad_weights, "weights"), (bad_gradients, "gradients")):
        if names:
            listed = ", ".join(names[:SHOWN])
            if len(names) > SHOWN:
                listed = f"{listed} and {len(names) - SHOWN} more"
            say(f"  {kind} that are not finite: {listed}")
    for key, words in (("first_layer", "forward pass"), ("first_gradient", "backward pass")):
        if first := report[key]:
            places = first.get("places", [])[:1]
            place = "".join(f"row {row}, position {at}, " for row, at in places)
            say(
                f"  {words}: the first value that is not finite comes out of {first['layer']}"
                f" ({first['values']:,} of {first['of']:,} values; {place}micro-batch"
                f" {first['micro_batch']}, process {first['process']})"
            )

    # Rows
    bad_rows = report["bad_rows"]
    for bad in bad_rows[:SHOWN]:
        tokens = ", ".join(
            f"{token['position']} {json.dumps(token['token'], ensure_ascii=False)}"
            for token in bad["first"]
        )
        say(
            f"  row {bad['row']} of micro-batch {bad['micro_batch']}, process {bad['process']}:"
            f" {bad['bad_tokens']} tokens without a finite loss, after {tokens}"
        )
        say(f"    ... {bad['text']!r}")
    if len(bad_rows) > SHOWN:
        say(f"  and {len(bad_rows) - SHOWN} more rows")
    if not (bad_rows or bad_gradients or bad_weights):
        say(
            "  Everything is finite here: the fault was not in these rows and weights alone. Try"
            " --precision bf16, or"
        )
        say("  look at what else the run had: its device, its kernels, its memory.")
