"""Conversations to inspect, and what the tests of inspection share."""

import json

from datasets import Dataset
from example_chats import tokenize_conversation
from pipeline import run_cli

from minimind.inspection import inspect_rows
from minimind.inspection.tokens import Tokens

PAD, START, END = 0, 1, 2


def chat(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    chat("the fox?", "jumps over the dog"),
    chat("the fox?", "jumps", "再来", "跑回家！🦊", "a\n\nb", "user\nhome."),
    chat("狐狸", "assistant\nx", system="be quick"),
    chat("", "user"),
]


def tokenized(conversations, tokenizer, max_length=4096):
    rows = [tokenize_conversation(messages, tokenizer, max_length) for messages in conversations]
    return [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]


def tokens_of(rows, where=None):
    return Tokens(Dataset.from_list(rows), where)


def inspected(rows, tokenizer, stage="sft", where=None, held_out=None, **options):
    held_out = held_out and tokens_of(held_out)
    tokens = tokens_of(rows, where)
    return inspect_rows(stage, tokens, tokenizer, held_out=held_out, **options).report


def names(report, severity=None):
    return [f["name"] for f in report["findings"] if severity in (None, f["severity"])]


def finding(report, name):
    (found,) = [found for found in report["findings"] if found["name"] == name]
    return found


def inspect(capsys, *argv, code=0):
    """`minimind inspect ... --json` -> its object, printed alone."""
    try:
        run_cli("inspect", *argv, "--json")
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    report = json.loads(capsys.readouterr().out)
    assert ended == code, report["findings"]
    return report


def rows_of(*conversations):
    return [{"messages": messages} for messages in conversations]
