"""Measures of a model: held-out loss, bits per byte, and exact answers to questions."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import BadRows
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.columns import Columns
from minimind.data.content import split_reasoning
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.files import read_documents, read_rows
from minimind.data.messages import Message
from minimind.data.packing import IGNORED, PackedCollator
from minimind.data.world import is_courteous, is_embedded, strip_courtesy
from minimind.tokenizer import text_encoder, token_byte_lengths
from minimind.tokenizer.cutting import Cutter
from minimind.tokenizer.encoding import DocumentEncoder

LOGITS = 2**26  # numbers that a batch of `loss_of` may have
# Metrics that are none
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
FORWARD = ("input_ids", "attention_mask", "position_ids")  # what a model needs of a batch


def held_out_metrics(trainer: Trainer) -> dict[str, dict[str, float]]:
    """The trainer's held-out metrics "before" its first step (needs `eval_on_start`) and "after"
    its last.

    Both are empty where no rows are held out. Under ZeRO-1 and 2 a trainer can evaluate only once
    training has begun, hence `eval_on_start` and no call of `evaluate` before `train`.
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
    """Mean loss in nats per predicted token -> bits per byte of the text, which compares models
    across tokenizers.

    Summed loss / (ln 2 x bytes of the predicted tokens); both numbers are in `counts`, see
    `documents.load_blocks`.
    """
    return loss * counts["targets"] / (math.log(2) * counts["target_bytes"])


def bits_per_nat(counts: dict) -> float | None:
    """What turns the loss of a batch into bits per byte: the mean over an epoch's targets; None if
    unknown.

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
    """Loss in nats of each trained token of the first held-out rows, (tokens,); of the main
    process's model alone.

    The rows go through the trainer's collator, so they must become input_ids and labels.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    size, chosen = (
        trainer.args.eval_batch_size,
        trainer.eval_dataset.select(range(min(rows, len(trainer.eval_dataset)))),
    )
    training, losses = model.training, [torch.empty(0)]
    model.eval()
    try:
        for start in range(0, len(chosen), size):
            batch = trainer.data_collator(
                [chosen[index] for index in range(start, min(start + size, len(chosen)))]
            )
            losses.append(label_losses(model, batch))
    finally:
        model.train(training)
    return torch.cat(losses)


def label_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A collated batch -> loss in nats of each of its labels, (labels,), on the CPU."""
    inputs = {key: value.to(model.device) for key, value in batch.items() if key in FORWARD}
    targets = batch["labels"][:, 1:].flatten().to(model.device)
    with torch.inference_mode():
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        return cross_entropy(logits, targets, reduction="none")[targets != IGNORED].cpu()


def token_loss_distribution(losses: torch.Tensor, bars: int = 32, top: float = 16.0) -> dict:
    """Losses in nats (tokens,) -> a histogram and its mean, median, 90th and 99th percentile.

    `edges` are equal steps from 0 to `top`; the last bar holds all beyond.
    """
    counts = torch.histc(losses.clamp(max=top), bins=bars, min=0, max=top)
    quantiles = torch.quantile(
        losses[: 2**24].double(), torch.tensor([0.5, 0.9, 0.99], dtype=torch.double)
    )
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
    return complete(
        model,
        tokenizer,
        encode_prompts(prompts, ChatEncoder(tokenizer)),
        max_new_tokens,
        batch_size,
    )


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
            chosen,
            tokenizer.batch_decode(output[:, length:], skip_special_tokens=True),
            strict=True,
        ):
            replies[index] = new
    return replies


def read_questions(
    files: Sequence[str],
    on_bad_rows: str | BadRows | None = None,
    encoder: ChatEncoder | None = None,
    columns: Columns | None = None,
) -> list[dict]:
    """Conversations whose last reply is the reference -> their rows with "messages" and, if given,
    "tools".

    Without them a row's other fields are whatever its owner wrote. With an `encoder`, what its
    template cannot ask is a bad row. Raises UserError as `files.read_rows`.
    """

    def convert(data: Mapping) -> dict:
        conversation = to_conversation(data)
        if encoder is not None:
            (asked,) = encoder.encode([prompt_of(conversation._asdict())], prompt=True)
            if isinstance(asked, BadRowError):
                raise asked
        return {**data, "messages": conversation.messages} | (
            {"tools": conversation.tools} if conversation.tools else {}
        )

    return [row.data for row in read_rows(files, on_bad_rows, convert, columns=columns)]


def prompt_of(question: dict) -> Conversation:
    """All of a conversation before its last reply."""
    return Conversation(question["messages"][:-1], question.get("tools"))


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[dict],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> dict:
    """Ask the last question of each conversation, greedily, and compare with the reference.

    Returns the number of `questions`; `exact_match`, the share of replies equal to the reference,
    of the embedded corpus without its courtesy on both sides; `courteous`, where there are rows of
    that corpus, the share of their replies that end with it in the question's language;
    `exact_match_by`, the first share for each kind and language that the questions name.
    """
    prompts = [prompt_of(question) for question in questions]
    replies = [
        split_reasoning(reply)[1]
        for reply in answer(model, tokenizer, prompts, max_new_tokens, batch_size)
    ]
    exact, courteous, groups = [], [], defaultdict(list)
    for question, reply in zip(questions, replies, strict=True):
        own = is_embedded(question)
        strip = strip_courtesy if own else str.strip
        exact.append(strip(reply) == strip(question["messages"][-1]["content"]))
        courteous += [is_courteous(reply, question["language"])] if own else []
        for name in {
            name for key in ("kind", "language") if isinstance(name := question.get(key), str)
        }:
            groups[name].append(exact[-1])
    return {
        "questions": len(questions),
        "exact_match": round(fmean(exact), 4),
        **({"courteous": round(fmean(courteous), 4)} if courteous else {}),
        "exact_match_by": {name: round(fmean(matches), 4) for name, matches in groups.items()},
    }


# The held-out loss of files


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[str],
    stage: str | None = None,
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> dict:
    """What a model makes of some files: loss and bits per byte, and of conversations (stage "sft")
    the `score` too.

    The loss of a conversation is that of its trained replies; `without_loss` counts those that have
    none. A document (stage "pretrain") follows an end token and ends with one; a longer one than
    `max_length` is cut, each part after the last token of the one before.

    Raises:
        UserError: see `files.read_rows` and `Columns.stop`; or the files hold preference pairs, or
            nothing can be told of the stage.
    """
    from minimind.inspection import recognise_stage

    columns = columns or Columns()
    stage = stage or recognise_stage(files, columns)
    if stage == "dpo":
        raise UserError(f"{files[0]}: found preference pairs, expected conversations or documents.")
    max_length, bad = min(max_length, model.config.max_position_embeddings), BadRows(on_bad_rows)
    if stage == "pretrain":
        check = Cutter(text_encoder(tokenizer)).check
        texts = list(read_documents(files, bad, columns=columns, check=check))
        columns.stop()
        result = {"documents": len(texts)}
        rows = document_rows(texts, tokenizer, max_length)
    else:
        encoder = ChatEncoder(tokenizer)
        questions = read_questions(files, bad, encoder, columns)
        columns.stop()
        result = (
            score(model, tokenizer, questions, max_new_tokens, batch_size) if max_new_tokens else {}
        )
        rows = reply_rows(questions, encoder, max_length)
        result["without_loss"] = sum(not each for each in rows)
        rows = [row for each in rows for row in each]
    return {**result, **loss_of(model, tokenizer, rows, batch_size), "bad_rows": bad.count}


def document_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[dict]:
    """Documents -> rows of ids and labels; all but the first id of a row have one."""
    encoder, rows = DocumentEncoder(tokenizer, fast=False), []
    for text in texts:
        ids = np.append([tokenizer.eos_token_id], encoder([text])).astype(np.int32)
        parts = [
            ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)
        ]
        rows += [{"input_ids": part, "labels": part} for part in parts]
    return rows


def reply_rows(
    questions: Sequence[dict], encoder: ChatEncoder, max_length: int
) -> list[list[dict]]:
    """Conversations -> the rows of each, with labels on its trained replies; none where nothing
    fits into a row, or the template does not mark the replies."""
    conversations = [
        Conversation(question["messages"], question.get("tools")) for question in questions
    ]
    results = tokenize_conversations(
        conversations, encoder, max_length, ChatArguments(weighted_loss=False)
    )
    return [[] if isinstance(result, BadRowError) else result.rows for result in results]


def loss_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict], batch_size: int
) -> dict:
    """Rows of input_ids and labels -> the number of `tokens` with a label, their mean `loss` in
    nats, `perplexity` and `bits_per_byte` of their text; without any, none of the last three."""
    most = LOGITS // model.config.vocab_size
    # Little padding, the worst first
    order = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    bytes_of = torch.tensor(token_byte_lengths(tokenizer))
    collate = PackedCollator(tokenizer.pad_token_id or 0)
    nats = tokens = size = 0
    with tqdm(total=len(order), unit=" rows", desc="loss", disable=None) as progress:
        while order:
            count = max(1, min(batch_size, most // len(order[0]["input_ids"])))
            chosen, order = order[:count], order[count:]
            batch = collate(chosen)
            losses = label_losses(model, batch)
            targets = batch["labels"][:, 1:]
            nats += losses.double().sum().item()
            tokens += len(losses)
            size += int(bytes_of[targets[targets != IGNORED]].sum())
            progress.update(len(chosen))
    if not tokens:
        return {"tokens": 0}
    loss = nats / tokens
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 100))}
    if size:
        figures["bits_per_byte"] = bits_per_byte(loss, {"targets": tokens, "target_bytes": size})
    return {"tokens": tokens} | {name: round(value, 6) for name, value in figures.items()}
