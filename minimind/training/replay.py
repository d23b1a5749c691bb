"""`minimind replay`: the loss of a batch that a run has kept, computed again, row by row and layer
by layer."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.data.packing import IGNORED
from minimind.stage_directory import load_model
from minimind.tokenizer import load_tokenizer
from minimind.training.kept_batches import read_batch

INPUTS = ("input_ids", "attention_mask", "position_ids")
SHOWN = 5  # rows, tokens and tensors named of each kind


def replay(
    directory: str | Path, model: str | Path | None = None, precision: str | None = None
) -> dict:
    """Compute the loss of a kept batch again, as in training, and look where it is not finite.

    Returns "step", "recorded" (loss and gradient norm of the run), "precision", "rows" (how many),
    "loss" (summed over trained tokens / their number; null if not finite), "bad_rows" (process,
    micro-batch, row, tokens without a finite loss), "first_layer" (where in the forward pass the
    first value is not finite that came from finite ones), "first_gradient" (the same in the
    backward pass), "bad_weights" and "bad_gradients" (names of parameters).

    Raises:
        UserError: it is no kept batch, or there are no weights to compute with.
    """
    directory = Path(directory)
    record, processes = read_batch(directory)
    if model is None and record["weights"] is None:
        raise UserError(
            f"{directory} holds no weights: the run went on after this step. Name those to compute"
            " with, such as the run's directory or its last checkpoint: --model DIR."
        )
    path = Path(model) if model is not None else directory / record["weights"]
    network, tokenizer = load_model(path).train(), load_tokenizer(path)
    largest = max(
        int(batch["input_ids"].max()) for batches in processes.values() for batch in batches
    )
    if largest >= network.config.vocab_size:
        raise UserError(
            f"{directory} holds the token id {largest:,}, and the model in {path} has"
            f" {network.config.vocab_size:,} tokens. Name the weights of the same run with --model"
            " DIR."
        )
    precision = precision or ("bf16" if record["precision"] == "bf16" else "fp32")
    if precision == "bf16":
        autocast = torch.autocast(_device(network).type, torch.bfloat16)
    else:
        autocast = contextlib.nullcontext()

    losses, count, rows, bad_rows = 0.0, 0, 0, []
    first_layer = first_gradient = None
    for process, batches in processes.items():
        for number, batch in enumerate(batches):
            with watch(network) as watched, autocast:
                token_losses, labels = _token_losses(network, batch)
                total = token_losses.sum() / max(int((labels != IGNORED).sum()), 1)
                watched.look_at_gradients(total)
            where = {"process": process, "micro_batch": number}
            if watched.first:
                first_layer = first_layer or {**where, **watched.first}
            if watched.first_gradient:
                first_gradient = first_gradient or {**where, **watched.first_gradient}
            losses, count, rows = (
                losses + float(token_losses.detach().sum()),
                count + int((labels != IGNORED).sum()),
                rows + len(labels),
            )
            for row in range(len(labels)):
                bad = torch.nonzero(~torch.isfinite(token_losses[row])).flatten().tolist()
                if bad:
                    ids = batch["input_ids"][row]
                    tokens = [
                        {"position": at, "token": tokenizer.decode([int(ids[at])])}
                        for at in bad[:SHOWN]
                    ]
                    text = tokenizer.decode(ids[: bad[0] + 1].tolist())[-80:]
                    bad_rows.append(
                        {**where, "row": row, "bad_tokens": len(bad), "first": tokens, "text": text}
                    )
    return {
        "directory": str(directory),
        "weights": str(path),
        "step": record["step"],
        "recorded": {"loss": record["loss"], "grad_norm": record["grad_norm"]},
        "precision": precision,
        "rows": rows,
        "loss": losses / count if count and math.isfinite(losses) else None,
        "bad_rows": bad_rows,
        "first_layer": first_layer,
        "first_gradient": first_gradient,
        "bad_weights": [
            name for name, p in network.named_parameters() if not torch.isfinite(p).all()
        ],
        "bad_gradients": [
            name
            for name, p in network.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ],
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _token_losses(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every predicted token, 0 where none is trained, and the labels; both (rows,
    length - 1).

    Of a preference pair's batch the replies count: their likelihoods are what its loss is made of.
    """
    device = _device(model)
    inputs = {name: batch[name].to(device) for name in INPUTS if name in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    if "labels" in batch:
        labels = batch["labels"].to(device)
    elif "completion_mask" in batch:
        labels = torch.where(batch["completion_mask"].bool(), batch["input_ids"], IGNORED).to(
            device
        )
    else:
        labels = inputs["input_ids"]
    labels = labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, labels


class Watch:
    """Where in a forward and a backward pass the first value is not finite."""

    def __init__(self):
        self.first = self.first_gradient = None

    def after_module(self, name: str, inputs: tuple, output) -> None:
        """Called by torch after each module."""
        tensor = (
            output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        )
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

    def look_at_gradients(self, loss: torch.Tensor) -> None:
        """Run the backward pass."""
        if loss.requires_grad:
            loss.backward()


def _where(tensor: torch.Tensor) -> dict:
    """What of a tensor is not finite: how many values and, of (rows, length, hidden), the first
    [row, position]s."""
    bad = ~torch.isfinite(tensor)
    found = {"values": int(bad.sum()), "of": bad.numel()}
    if tensor.ndim == 3:
        found["places"] = torch.nonzero(bad.any(-1)).tolist()[:SHOWN]
    return found


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Look at every module of the model, in the order in which they finish, so the innermost is
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
    """The report for reading."""
    recorded = report["recorded"]
    loss = "not finite" if report["loss"] is None else f"{report['loss']:.4f}"
    say(
        f"{report['directory']}: step {report['step']}, {report['rows']} rows, weights"
        f" {report['weights']}"
    )
    say(f"  in the run   loss {recorded['loss']}, gradient norm {recorded['grad_norm']}")
    say(f"  again        loss {loss} ({report['precision']})")
    for names, words in (
        (report["bad_weights"], "weights"),
        (report["bad_gradients"], "gradients"),
    ):
        if names:
            listed = ", ".join(names[:SHOWN])
            if len(names) > SHOWN:
                listed = f"{listed} and {len(names) - SHOWN} more"
            say(f"  {words} that are not finite: {listed}")
    for key, words in (("first_layer", "forward pass"), ("first_gradient", "backward pass")):
        if first := report[key]:
            place = "".join(
                f"row {row}, position {at}, " for row, at in first.get("places", [])[:1]
            )
            say(
                f"  {words}: the first value that is not finite comes out of {first['layer']}"
                f" ({first['values']:,} of {first['of']:,} values; {place}micro-batch"
                f" {first['micro_batch']}, process {first['process']})"
            )
    for bad in report["bad_rows"][:SHOWN]:
        tokens = ", ".join(
            f"{token['position']} {json.dumps(token['token'], ensure_ascii=False)}"
            for token in bad["first"]
        )
        say(
            f"  row {bad['row']} of micro-batch {bad['micro_batch']}, process {bad['process']}:"
            f" {bad['bad_tokens']} tokens without a finite loss, after {tokens}"
        )
        say(f"    ... {bad['text']!r}")
    if len(report["bad_rows"]) > SHOWN:
        say(f"  and {len(report['bad_rows']) - SHOWN} more rows")
    if not (report["bad_rows"] or report["bad_gradients"] or report["bad_weights"]):
        say(
            "  Everything is finite here: the fault was not in these rows and weights alone. Try"
            " --precision bf16, or"
        )
        say("  look at what the run had besides: its device, its kernels, its memory.")
