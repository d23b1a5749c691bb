"""Chat rows -> token ids with a loss mask, and a report of what that mask trains.

The mask is the template's: what stands between its generation tags (the assistant's words and the end token) is
trained, nothing else. The report is made from the finished ids and labels, without looking at the template, so that
it shows what the loss will see.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from rich.text import Text
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.data.conversations import Message, to_messages
from minimind.data.documents import HoldOut
from minimind.data.files import BadRowError, content_hash, expand, read_rows
from minimind.data.preferences import to_preference
from minimind.errors import UserError
from minimind.tokenizer import BOS_TOKEN

IGNORED = -100


class ChatRows(NamedTuple):
    """Rows for a trainer; `facts`: files, rows and truncated rows of both parts."""

    train: Dataset
    eval: Dataset | None
    facts: dict


def tokenize_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict:
    """Messages -> {"input_ids", "labels", "truncated"}; what is not trained has the label -100.

    A conversation longer than `max_length` keeps its first turns that fit, cut after a reply, so that each kept reply
    keeps its end token.

    Raises:
        BadRowError: not even the first reply fits, or the text contains a special token.
    """
    check_boundaries(messages, tokenizer)
    encoded = tokenizer.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    if truncated := len(ids) > max_length:
        ends = [i + 1 for i in range(max_length) if ids[i] == tokenizer.eos_token_id and mask[i]]
        if not ends:
            first = next(i + 1 for i in range(len(ids)) if ids[i] == tokenizer.eos_token_id and mask[i])
            raise BadRowError(
                f"found {first:,} tokens up to the end of the first reply, expected at most --max_length "
                f"{max_length:,}. Raise it, shorten the row"
            )
        ids, mask = ids[: ends[-1]], mask[: ends[-1]]
    labels = [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels, "truncated": truncated}


def check_boundaries(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises BadRowError where a message would blur the border between header and reply.

    A reply that begins with a line break shares a token with the break that ends its header: the model would be
    trained after another beginning than the one it sees when it generates. An end token inside a message ends it.
    """
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"][:1] in ("\n", "\r"):
            raise BadRowError(
                f"messages[{index}]: found a reply that begins with a line break, expected text. Remove it"
            )
        if found := next((token for token in tokenizer.all_special_tokens if token in message["content"]), None):
            raise BadRowError(
                f"messages[{index}]: found {found!r} inside the text, expected it only where the template puts it. "
                "Remove it"
            )


def check_preference(pair: dict, tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict:
    """Return the pair unchanged; raises BadRowError where TRL would cut off the end of a reply in silence."""
    for name in ("chosen", "rejected"):
        check_boundaries(pair["prompt"] + pair[name], tokenizer)
        length = len(tokenizer.apply_chat_template(pair["prompt"] + pair[name], return_dict=True)["input_ids"])
        if length > max_length:
            raise BadRowError(
                f"found {length:,} tokens of prompt and {name} reply, expected at most --max_length {max_length:,}. "
                "Raise it, shorten the row"
            )
    return pair


def load_conversations(data_args, tokenizer: PreTrainedTokenizerFast, max_length: int) -> ChatRows:
    """Conversations in the files of `data_args` -> rows with input_ids and labels; raises UserError."""

    def convert(data: dict) -> tuple[str, dict]:
        messages = to_messages(data)
        return str(messages), tokenize_conversation(messages, tokenizer, max_length)

    return _load(data_args, convert)


def load_preferences(data_args, tokenizer: PreTrainedTokenizerFast, max_length: int) -> ChatRows:
    """Preference pairs in the files of `data_args` -> rows with prompt, chosen and rejected; raises UserError."""

    def convert(data: dict) -> tuple[str, dict]:
        pair = to_preference(data)
        return str(pair["prompt"]), check_preference(pair, tokenizer, max_length)

    return _load(data_args, convert)


def _load(data_args, convert) -> ChatRows:
    files = expand(data_args.train_files)
    rows = read_rows(files, data_args.on_bad_rows, convert)
    rows = [row.data for row in tqdm(rows, unit=" rows", desc="tokenising", disable=None)]
    if data_args.eval_files:
        held_out_files = expand(data_args.eval_files)
        held_out = [row.data[1] for row in read_rows(held_out_files, data_args.on_bad_rows, convert)]
        held_out, train = held_out[: data_args.max_eval_rows], [row for _, row in rows]
    else:
        hold_out = HoldOut(data_args.eval_ratio, data_args.max_eval_rows)
        train = [certain for key, row in rows for certain in hold_out.offer(key, row)]
        held_out_files, held_out = [], hold_out.chosen()
    if not train:
        raise UserError(f"{', '.join(map(str, files))}: every row is held out. Lower --eval_ratio or give more rows.")
    facts = {
        "train": {"files": list(map(str, files)), "hash": content_hash(files), "rows": len(train)},
        "eval": {
            "files": list(map(str, held_out_files)),
            "hash": content_hash(held_out_files) if held_out_files else None,
            "rows": len(held_out),
        },
    }
    if "truncated" in train[0]:
        facts["train"]["truncated"] = sum(row.pop("truncated") for row in train)
        facts["eval"]["truncated"] = sum(row.pop("truncated") for row in held_out)
    return ChatRows(Dataset.from_list(train), Dataset.from_list(held_out) if held_out else None, facts)


def preference_labels(rows: Iterable[dict]) -> list[dict]:
    """TRL's prompt_ids, chosen_ids, rejected_ids -> one row of input_ids and labels for each reply."""
    return [
        {"input_ids": row["prompt_ids"] + row[name], "labels": [IGNORED] * len(row["prompt_ids"]) + row[name]}
        for row in rows
        for name in ("chosen_ids", "rejected_ids")
    ]


def mask_report(rows: Iterable[dict], tokenizer: PreTrainedTokenizerFast) -> dict:
    """Count what rows of input_ids and labels train, by role.

    `replies` are the assistant messages, `replies_with_end_trained` those whose end token has a loss. Tokens outside
    ChatML messages (another template's) count under the role "other".

    Raises:
        UserError: nothing is trained, no reply's end is trained, or words of another role than the assistant are.
    """
    start_id, eos_id = tokenizer.convert_tokens_to_ids(BOS_TOKEN), tokenizer.eos_token_id
    tokens, trained = Counter(), Counter()
    report = {"rows": 0, "rows_without_trained_token": 0, "replies": 0, "replies_with_end_trained": 0}
    for row in rows:
        role = "other"
        row_trained = 0
        for position, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            if token == start_id:
                header = tokenizer.decode(row["input_ids"][position + 1 : position + 12])
                role = header.split("\n")[0]
            tokens[role] += 1
            trained[role] += label != IGNORED
            row_trained += label != IGNORED
            if token == eos_id and role in ("assistant", "other"):
                report["replies"] += role == "assistant"
                report["replies_with_end_trained"] += label == eos_id
        report["rows"] += 1
        report["rows_without_trained_token"] += not row_trained
    report["tokens"], report["trained_tokens"] = tokens.total(), trained.total()
    report["trained_share"] = round(trained.total() / max(tokens.total(), 1), 4)
    report["roles"] = {
        role: {"tokens": n, "trained_tokens": trained[role], "trained_share": round(trained[role] / n, 4)}
        for role, n in sorted(tokens.items())
    }
    foreign = [role for role in trained if trained[role] and role not in ("assistant", "other")]
    if not report["trained_tokens"]:
        problem = "no token has a loss, so nothing would be learnt"
    elif not report["replies_with_end_trained"]:
        problem = f"no reply's end token {tokenizer.eos_token!r} has a loss, so the model would never learn to stop"
    elif foreign:
        problem = f"words of {', '.join(foreign)} have a loss; only the assistant's may"
    else:
        return report
    raise UserError(f"the loss mask is wrong: {problem}. Check the generation tags of the chat template.")


def print_mask_report(report: dict, example: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    """Show the report and one row, its trained tokens in green."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"loss mask: {report['trained_tokens']:,} of {report['tokens']:,} tokens trained "
        f"({report['trained_share']:.1%}); the end token of {report['replies_with_end_trained']:,} of "
        f"{report['replies']:,} replies; {report['rows_without_trained_token']:,} rows without a trained token"
    )
    for role, counts in report["roles"].items():
        console.print(f"  {role:<10} {counts['trained_tokens']:>10,} of {counts['tokens']:>10,} trained")
    text = Text("  for example ")
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))[:120]
    for trained, run in groupby(
        pairs, key=lambda pair: pair[1] != IGNORED
    ):  # whole runs: a token may be half a character
        text.append(tokenizer.decode([token for token, _ in run]).replace("\n", "\\n"), "green" if trained else "dim")
    console.print(text)


class PackedCollator:
    """Rows of whole conversations (input_ids, labels, seq_lengths) -> a batch in which they cannot see each other.

    Isolation comes from `position_ids` that restart, and from giving no attention mask; it holds on every attention
    back-end. Identical to TRL's padding-free collator except: the rows stay rows, since one row of batch x length
    tokens would need a mask of that size squared.

        input_ids    a a a b b pad        position_ids 0 1 2 0 1 0
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "labels": torch.full((len(rows), length), IGNORED),
            "position_ids": torch.zeros((len(rows), length), dtype=torch.long),
        }
        for index, row in enumerate(rows):
            used = len(row["input_ids"])
            batch["input_ids"][index, :used] = torch.tensor(row["input_ids"])
            batch["labels"][index, :used] = torch.tensor(row["labels"])
            positions = [torch.arange(n) for n in (*row["seq_lengths"], length - used)]
            batch["position_ids"][index] = torch.cat(positions)
        return batch
