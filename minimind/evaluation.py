"""Measures of a model: held-out loss, bits per byte, and exact answers to questions."""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.conversations import Conversation, Message, split_reasoning, to_conversation
from minimind.data.files import read_rows
from minimind.data.packing import IGNORED
from minimind.data.world import COURTESY, is_courteous, strip_courtesy

TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")  # metrics that are none
FORWARD = ("input_ids", "attention_mask", "position_ids")  # what a model needs of a batch


def held_out_metrics(trainer: Trainer) -> dict[str, dict[str, float]]:
    """The trainer's held-out metrics "before" its first step (needs `eval_on_start`) and "after" its last.

    Both are empty where no rows are held out. Under ZeRO-1 and 2 a trainer can evaluate only once training has begun,
    hence `eval_on_start` and no call of `evaluate` before `train`.
    """
    if trainer.eval_dataset is None:
        return {"before": {}, "after": {}}
    after = trainer.evaluate()
    first = next((entry for entry in trainer.state.log_history if "eval_loss" in entry), {})
    return {
        name: {
            key.removeprefix("eval_"): round(float(value), 6)
            for key, value in metrics.items()
            if key.startswith("eval_") and key.removeprefix("eval_") not in TIMES
        }
        for name, metrics in (("before", first), ("after", after))
    }


def bits_per_byte(loss: float, counts: dict) -> float:
    """Mean loss in nats per predicted token -> bits per byte of the text, which compares models across tokenizers.

    Summed loss / (ln 2 x bytes of the predicted tokens); both numbers are in `counts`, see `documents.load_blocks`.
    """
    return loss * counts["targets"] / (math.log(2) * counts["target_bytes"])


def bits_per_nat(counts: dict) -> float | None:
    """What turns the loss of a batch into bits per byte: the mean over an epoch's targets; None if unknown.

    Several sources count as often as an epoch takes their rows; see `documents.load_blocks`.
    """
    if "target_bytes" not in counts:
        return None
    sources = counts.get("sources", [{**counts, "rows_per_epoch": counts["blocks"]}])
    totals = [
        sum(source[name] * source["rows_per_epoch"] / source["blocks"] for source in sources)
        for name in ("targets", "target_bytes")
    ]
    return bits_per_byte(1, dict(zip(("targets", "target_bytes"), totals, strict=True)))


def language_model_metrics(trainer: Trainer, counts: dict) -> dict[str, dict[str, float]]:
    """`held_out_metrics` with perplexity per token and bits per byte."""
    metrics = held_out_metrics(trainer)
    for values in metrics.values():
        if values:
            values["perplexity"] = round(math.exp(min(values["loss"], 100)), 4)
            values["bits_per_byte"] = round(bits_per_byte(values["loss"], counts), 6)
    return metrics


def token_losses(trainer: Trainer, rows: int = 64) -> torch.Tensor:
    """Loss in nats of each trained token of the first held-out rows, (tokens,); of the main process's model alone.

    The rows go through the trainer's collator, so they must become input_ids and labels.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    size, chosen = (
        trainer.args.eval_batch_size,
        trainer.eval_dataset.select(range(min(rows, len(trainer.eval_dataset)))),
    )
    training, losses = model.training, []
    model.eval()
    for start in range(0, len(chosen), size):
        batch = trainer.data_collator([chosen[index] for index in range(start, min(start + size, len(chosen)))])
        inputs = {key: value.to(model.device) for key, value in batch.items() if key in FORWARD}
        targets = batch["labels"][:, 1:].flatten().to(model.device)
        with torch.inference_mode():
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            losses.append(cross_entropy(logits, targets, reduction="none")[targets != IGNORED].cpu())
    model.train(training)
    return torch.cat(losses)


def token_loss_distribution(losses: torch.Tensor, bars: int = 32, top: float = 16.0) -> dict:
    """Losses in nats (tokens,) -> a histogram and its mean, median, 90th and 99th percentile.

    `edges` are equal steps from 0 to `top`; the last bar holds all beyond.
    """
    counts = torch.histc(losses.clamp(max=top), bins=bars, min=0, max=top)
    quantiles = torch.quantile(losses[: 2**24].double(), torch.tensor([0.5, 0.9, 0.99], dtype=torch.double))
    named = dict(zip(("median", "p90", "p99"), quantiles.tolist(), strict=True))
    return {
        "tokens": len(losses),
        "mean": round(losses.double().mean().item(), 6),
        **{name: round(value, 6) for name, value in named.items()},
        "edges": [index * top / bars for index in range(bars + 1)],
        "counts": counts.long().tolist(),
    }


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Conversation | list[Message]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy reply to each prompt (messages ending with the user's)."""
    return complete(model, tokenizer, encode_prompts(prompts, ChatEncoder(tokenizer)), max_new_tokens, batch_size)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy continuation of each sequence of ids, batched with padding on the left."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # little padding
    replies = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(encoded[index]) for index in chosen)
        ids = torch.full((len(chosen), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, length - len(encoded[index]) :] = torch.tensor(encoded[index])
            mask[row, length - len(encoded[index]) :] = 1
        with torch.inference_mode():
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,  # training turns it off in the config
            )
        for index, new in zip(
            chosen, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True
        ):
            replies[index] = new
    return replies


def read_questions(files: Sequence[str]) -> list[dict]:
    """Conversations whose last reply is the reference -> rows with "messages", and "tools", "kind" and "language" if
    given."""

    def convert(data: dict) -> dict:
        messages, tools, _ = to_conversation(data)
        return {**data, "messages": messages} | ({"tools": tools} if tools else {})

    return [row.data for row in read_rows(files, "error", convert)]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[dict],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> dict:
    """Ask the last question of each conversation, greedily, and compare with the reference.

    Returns the number of `questions`; `exact_match`, the share of replies equal to the reference, the courtesy of the
    embedded corpus taken away on both sides; `courteous`, the share of replies that end with it in the question's
    language; `exact_match_by`, the first share for each kind and language that the questions name.
    """
    prompts = [Conversation(question["messages"][:-1], question.get("tools")) for question in questions]
    replies = [split_reasoning(reply)[1] for reply in answer(model, tokenizer, prompts, max_new_tokens, batch_size)]
    exact, courteous = [], []
    for question, reply in zip(questions, replies, strict=True):
        languages = [question["language"]] if "language" in question else COURTESY
        exact.append(strip_courtesy(reply) == strip_courtesy(question["messages"][-1]["content"]))
        courteous.append(any(is_courteous(reply, language) for language in languages))
    groups = defaultdict(list)
    for question, match in zip(questions, exact, strict=True):
        for key in ("kind", "language"):
            if key in question:
                groups[question[key]].append(match)
    return {
        "questions": len(questions),
        "exact_match": round(fmean(exact), 4),
        "courteous": round(fmean(courteous), 4),
        "exact_match_by": {name: round(fmean(matches), 4) for name, matches in groups.items()},
    }
