"""Checks of the model against its tokenizer, its base and the rows."""

import math

import numpy as np
import torch
from peft import PeftModel

from minimind.doctor.registry import Case, check
from minimind.stage_directory import read_stage

FEW = 0.02  # of all embeddings: so few look untrained by no coincidence


@check("model", "tokenizer")
def vocabulary(case: Case) -> tuple:
    size, tokens = case.base.config.vocab_size, len(case.tokenizer)
    if (unused := size - tokens) > 0.1 * size:
        found = f"{unused:,} of {size:,} embeddings have no token"
        fix = "Leave vocab_size out of the model's JSON."
        return "warning", found, "a model as wide as its tokenizer", fix
    return "ok", f"{tokens:,} tokens, {size:,} embeddings"


@check("weights")
def tied_weights(case: Case) -> tuple:
    model = case.base
    if case.spec.scores:
        return "ok", "a reward model has no head that could be tied"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    same = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    if same:
        return "ok", "embeddings and head are one"
    if not model.config.tie_word_embeddings:
        return "ok", "embeddings and head are two, as configured"
    if isinstance(case.model, PeftModel) and _saved_modules(case.model):
        found = "embeddings and head are apart (modules_to_save)"
        return "warning", found, "one matrix", "Intended? Then leave it."
    expected = "one: tie_word_embeddings is true"
    fix = (
        "Call model.tie_weights() after changing either; the saved file would hold only one of"
        " the two."
    )
    return "error", "embeddings and head are two matrices", expected, fix


@check("weights", "tokenizer", "args")
def untrained_tokens(case: Case) -> tuple:
    if case.lora is None and not isinstance(case.model, PeftModel):
        return "ok", "no adapter: every embedding is trained"
    trained = getattr(case.lora, "lora_modules_to_save", None) or []
    if isinstance(case.model, PeftModel):
        trained = _saved_modules(case.model)
    if any("embed" in name for name in trained):
        return "ok", "embeddings are trained beside the adapter"

    # The special tokens of the rows, or all of them, and how their embeddings look
    embeddings = case.base.get_input_embeddings().weight.detach().float()
    special = {i for i in case.tokenizer.added_tokens_decoder if i < len(embeddings)}
    used = {int(token) for ids in case.sampled_ids() for token in np.unique(ids)}
    wanted = sorted((special & used if used else special) - {case.tokenizer.pad_token_id})
    fresh = at_initialisation(embeddings, case.base.config.initializer_range)
    names = [case.tokenizer.convert_ids_to_tokens(token) for token in wanted if fresh[token]]
    share = float(fresh.float().mean())

    fix = "Train the whole model first, or add lora_modules_to_save: [embed_tokens]."
    if share > 0.5:
        found = f"{share:.0%} of the embeddings look as at random start"
        return "warning", found, "a base that is trained", fix
    if names:
        found = f"the embeddings of {', '.join(names)} look as at random start"
        expected = "trained ones: LoRA leaves embeddings as they are"
        return "error" if share < FEW else "warning", found, expected, fix
    if case.parent is not None and read_stage(case.parent).get("stage") == "pretrain":
        found = (
            f"{case.parent} was only pretrained: the tokens of the chat template were never in its"
            " texts"
        )
        return "warning", found, "a base that has seen its chat template", fix
    return "ok", f"{len(wanted)} special tokens have trained embeddings"


def _saved_modules(model: PeftModel) -> list[str]:
    """The modules that are trained beside the adapter; kinds with virtual tokens have none."""
    return getattr(model.active_peft_config, "modules_to_save", None) or []


def at_initialisation(rows: torch.Tensor, std: float) -> torch.Tensor:
    """Which embeddings (tokens, hidden) look untrained. Returns (tokens,) bool.

    Those that look as if drawn from a normal distribution with `std`, that are zero, or that are
    the same as another (new tokens that were all set to one mean). The norm of a drawn row is
    std x sqrt(hidden), give or take std / sqrt(2), and its cosine with the mean of all is 0, give
    or take 1 / sqrt(hidden). Training changes the norm, and moves embeddings in a common direction.
    """
    norms, size = rows.norm(dim=1), rows.shape[1]
    drawn = (norms - std * math.sqrt(size)).abs() < 4 * std / math.sqrt(2)
    drawn &= torch.cosine_similarity(rows, rows.mean(0, keepdim=True)).abs() < 4 / math.sqrt(size)
    keys = torch.stack([norms, *rows[:, :3].T], 1)
    _, which, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    return drawn | (norms == 0) | (counts[which] > 1)
