"""The inspection of files, read and tokenised as a run would."""

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_summary import Reading
from minimind.data.chats import load_conversations, load_preferences
from minimind.data.columns import IGNORE_ALL, Columns
from minimind.data.conversations import to_conversation
from minimind.data.documents import load_blocks
from minimind.data.files import read_rows, to_document
from minimind.data.mixing import parse_sources
from minimind.data.preferences import to_preference
from minimind.data.template_choice import set_chat_template
from minimind.inspection.chats import has_roles, inspect_chats
from minimind.inspection.documents import inspect_documents
from minimind.inspection.findings import Findings
from minimind.inspection.inspection import Inspection
from minimind.inspection.row_checks import check_left_out
from minimind.inspection.texts import DocumentTexts

RECOGNISED = 20  # rows that are tried to recognise a stage


def recognise_stage(words: Sequence[str], columns: Columns | None = None) -> str:
    """The stage that the first usable row of some files is for: "dpo", "sft" or "pretrain"; raises
    UserError."""
    columns = columns or Columns()
    converters = {"dpo": to_preference, "sft": to_conversation, "pretrain": to_document}
    problems: dict[str, str] = {}
    for row in islice(read_rows(data_paths(words), "skip"), RECOGNISED):
        for stage, convert in converters.items():
            try:
                convert(columns.fields(row.data))
            except BadRowError as problem:
                problems.setdefault(stage, f"{row.where}: {problem}")
            else:
                return stage
    lines = "\n".join(f"  as {stage}: {problem}" for stage, problem in problems.items())
    raise UserError(
        f"the stage cannot be told from the first {RECOGNISED} rows:\n{lines}\nFix them, or name"
        " the --stage."
    )


def data_paths(words: Sequence[str]) -> list[str]:
    """Words of `--train_files` -> the paths in them."""
    return [path for source in parse_sources(words) for path in source.paths]


def inspect_files(
    stage: str,
    data_args: Any,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    chat_args: ChatArguments | None = None,
) -> Inspection:
    """Inspect files, read and tokenised as a run of the stage would; bad rows become findings.

    Raises:
        UserError: as the stage's loader.
    """
    policy, data_args = data_args.on_bad_rows, dataclasses.replace(data_args, on_bad_rows="skip")
    if stage == "pretrain":
        return _inspect_document_files(data_args, tokenizer, max_length, policy)
    chat_args = chat_args or ChatArguments()
    set_chat_template(tokenizer, chat_args.chat_template)
    load, options = load_preferences, {}
    if stage == "sft":
        load, options = load_conversations, {"roles": not has_roles(tokenizer)}
    rows = load(data_args, tokenizer, max_length, chat_args, **options)
    return inspect_chats(stage, rows, tokenizer, policy, chat_args.train_turns == "all")


def _inspect_document_files(
    data_args: Any, tokenizer: PreTrainedTokenizerFast, block_size: int, policy: str | None
) -> Inspection:
    def read(paths: Sequence[str]) -> DocumentTexts:
        return DocumentTexts(paths, tokenizer, data_args.boundary_markers, data_args.reading())

    texts = read(data_paths(data_args.train_files))
    held_out = read(data_args.eval_files) if data_args.eval_files else None
    findings, reading = Findings(), Reading()
    reading.bad.append(texts.bad)
    reading.columns.append(texts.columns)
    check_left_out(findings, reading, policy)

    # Unread columns are findings by now: the loader should not stop at them.
    unread = [*(data_args.unread_columns or ()), IGNORE_ALL]
    data_args = dataclasses.replace(data_args, unread_columns=unread)
    blocks = load_blocks(data_args, tokenizer, block_size)
    facts = blocks.facts["train"]
    return inspect_documents(blocks.train, facts, texts, tokenizer, held_out, findings)
