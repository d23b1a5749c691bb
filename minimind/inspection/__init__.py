"""What a run will train on, counted from the finished rows of token ids and labels.

Nothing here asks the chat template: roles are read off the ids, so that a wrong mask shows instead
of explaining itself. Whatever is worth a word is a *finding*, with a severity:

    error     a run with these options would learn something wrong, or would stop
    warning   it would run, and be worse for it
    info      good to know
"""

import dataclasses
from collections.abc import Sequence
from itertools import islice

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_summary import Reading
from minimind.data.chats import ChatRows, load_conversations, load_preferences
from minimind.data.columns import IGNORE_ALL, Columns
from minimind.data.conversations import to_conversation
from minimind.data.documents import load_blocks
from minimind.data.files import read_rows, to_document
from minimind.data.loss_mask import preference_labels
from minimind.data.mixing import parse_sources
from minimind.data.preferences import to_preference
from minimind.data.template_choice import set_chat_template
from minimind.inspection.findings import (
    CUT_SHARE,
    LEFT_OUT,
    Findings,
    check_boundaries,
    check_copies,
    check_cuts,
    check_dialogues,
    check_left_out,
    check_mask,
    check_pairs,
    check_rendered,
    check_replies,
    check_structure,
    check_text,
    check_tokenizer,
)
from minimind.inspection.tokens import (
    Documents,
    Messages,
    Replies,
    Texts,
    Tokens,
    count_roles,
    describe_lengths,
    document_lengths,
    percentiles,
    ratio,
)
from minimind.tokenizer import BOS_TOKEN, text_bytes

# Of the tokens: more than this parts of characters and the tokenizer does not fit
PARTS_SHARE = 0.1
RECOGNISED = 20  # rows in which a stage is looked for
REPLIES = ("chosen", "rejected")  # the order of a pair's two rows


class Inspection:
    """Rows, what was read off them, and the report, a dict fit for JSON (docs/inspect.md names its
    fields)."""

    def __init__(self, stage: str, tokens: Tokens, messages: Messages, report: dict):
        self.stage, self.tokens, self.messages, self.report = stage, tokens, messages, report

    def row(self, number: int) -> dict:
        """One row as {"where", "input_ids", "labels"}; of pairs also "reply", which of the two it
        is."""
        span = slice(self.tokens.starts[number], self.tokens.starts[number + 1])
        reply = {"reply": REPLIES[number % 2]} if self.stage == "dpo" else {}
        ids, labels = (values[span].tolist() for values in (self.tokens.ids, self.tokens.labels))
        return {"where": self.tokens.where[number], **reply, "input_ids": ids, "labels": labels}

    def find(self, where: str) -> list[int]:
        """The rows at a place, "file:line", or the end of one, ":12"; raises UserError where there
        is none."""
        found = [number for number, place in enumerate(self.tokens.where) if place == where]
        found = found or [
            number for number, place in enumerate(self.tokens.where) if place.endswith(where)
        ]
        if not found:
            known = f"{self.tokens.where[0]} to {self.tokens.where[-1]}"
            raise UserError(
                f"--row {where}: found no such row among {known}. It may be left out: see the"
                " findings."
            )
        return found

    def title(self, number: int) -> str:
        """The place of a row, and which reply of a pair it is."""
        return self.tokens.where[number] + (
            f" ({REPLIES[number % 2]})" if self.stage == "dpo" else ""
        )

    def errors(self) -> list[dict]:
        """The findings that stop a run."""
        return [finding for finding in self.report["findings"] if finding["severity"] == "error"]

    def stop(self, on_findings: str) -> None:
        """Raises UserError if there are errors and they are not to be taken as warnings."""
        if on_findings != "error" or not (told := self.errors()):
            return
        if any(finding["name"] == "rows_lost" for finding in told):
            told += [
                f
                for f in self.report["findings"]
                if f["name"] in LEFT_OUT and f["severity"] != "error"
            ]
        listed = "".join(
            f"\n  {finding['name']}: {finding['text']}. {finding['advice']}"
            + "".join(f"\n    {place}" for place in finding["places"])
            for finding in told
        )
        raise UserError(
            f"the inspection of the data found errors:{listed}\nTo train it still: --on_findings"
            " warn."
        )


def inspect_rows(
    stage: str,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerFast,
    *,
    found: Findings | None = None,
    held_out: Tokens | None = None,
    lengths_before: np.ndarray | None = None,
    lengths_read: np.ndarray | None = None,
    every_reply: bool = True,
) -> Inspection:
    """Finished rows of "sft", or of "dpo" (chosen, rejected, chosen, ...), -> their report.

    Args:
        found: what was found before.
        held_out: the held-out rows.
        lengths_before: see `check_cuts`.
        lengths_read: the lengths of all that was read, also of what was left out as too long.
        every_reply: whether the options ask to train all replies.
    """
    found = Findings() if found is None else found
    size = len(REPLIES) if stage == "dpo" else 1
    check_tokenizer(found, tokenizer)
    messages = Messages(tokens, tokenizer)
    replies = Replies(tokens, messages)
    check_mask(found, tokens, messages, replies, tokenizer, every_reply and stage == "sft")
    check_structure(found, tokens, messages, tokenizer)
    check_text(found, tokens, messages, tokenizer)
    check_dialogues(found, tokens, messages, tokenizer)
    check_replies(found, tokens, replies)
    cut, lost = check_cuts(
        found, tokens, tokens.lengths if lengths_before is None else lengths_before, size
    )
    check_copies(found, tokens, held_out, size)
    trained = np.diff(tokens.trained_before[tokens.starts])
    lengths = describe_lengths(
        tokens.lengths.reshape(-1, size).max(1) if lengths_read is None else lengths_read,
        "pair (its longer side)" if stage == "dpo" else "conversation",
    )
    if stage == "dpo":
        check_pairs(found, tokens)
        for start, name in enumerate(REPLIES):
            of_reply = trained[start::2]
            lengths[name] = {
                "mean": round(float(of_reply.mean()), 1),
                "percentiles": percentiles(of_reply),
            }
    report = {
        "stage": stage,
        "rows": len(tokens) // size,
        "rows_without_trained_token": int((trained == 0).sum()),
        "truncated_rows": cut,
        "truncated_tokens": lost,
        "replies": len(replies.row),
        "replies_trained": int((replies.trained > 0).sum()),
        "replies_with_end_trained": int(replies.end_trained.sum()),
        "tokens": len(tokens.ids),
        "trained_tokens": int(trained.sum()),
        "trained_share": ratio(trained.sum(), len(tokens.ids)),
        "roles": count_roles(tokens, messages),
        "lengths": lengths,
        "findings": found.in_order(),
    }
    return Inspection(stage, tokens, messages, report)


def inspect_chats(
    stage: str, rows: ChatRows, tokenizer, on_bad_rows: str | None = None, every_reply: bool = True
) -> Inspection:
    """What `load_conversations` ("sft") or `load_preferences` ("dpo") gives -> its report, see
    `inspect_rows`."""
    size = len(REPLIES) if stage == "dpo" else 1

    def flat(part: Dataset, where: Sequence[str]) -> Tokens:
        return Tokens(
            preference_labels(part) if stage == "dpo" else part, np.repeat(where, size).tolist()
        )

    found = Findings()
    check_left_out(found, rows.reading, on_bad_rows)
    check_rendered(found, rows.reading)
    return inspect_rows(
        stage,
        flat(rows.train, rows.where),
        tokenizer,
        found=found,
        held_out=rows.eval and flat(rows.eval, rows.reading.held_out),
        lengths_before=np.repeat(rows.lengths, size),
        lengths_read=np.array(rows.reading.lengths),
        every_reply=every_reply,
    )


def has_roles(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of the chat template's conversations tell the roles, so that no loader has
    to."""
    return BOS_TOKEN in tokenizer.chat_template


def inspect_documents(
    blocks: Dataset,
    facts: dict,
    texts: Texts,
    tokenizer,
    held_out: Texts | None = None,
    found: Findings | None = None,
) -> Inspection:
    """Blocks of `documents.load_blocks`, its counts of them and the texts they were made from ->
    their report."""
    found = Findings() if found is None else found
    check_tokenizer(found, tokenizer)
    tokens = Tokens(blocks, [f"block {number}" for number in range(1, len(blocks) + 1)])
    documents = Documents(tokens, tokenizer)
    ends = int(documents.of_token.sum())
    # At most each dropped token ended a document
    if ends < facts["documents"] - facts["dropped_tokens"]:
        text = f"{facts['documents']:,} documents, but only {ends:,} end tokens between them"
        advice = (
            f"Each document must be followed by {tokenizer.eos_token!r}, or the model learns to"
            " run on."
        )
        found.add("documents_not_separated", "error", facts["documents"] - ends, text, advice)
    partial = np.array([not _is_text(piece) for piece in text_bytes(tokenizer)])
    parts = int(partial[tokens.ids].sum())
    if ratio(parts, len(tokens.ids)) > PARTS_SHARE:
        text = f"{ratio(parts, len(tokens.ids)):.1%} of the tokens are parts of a character"
        advice = (
            "The tokenizer knows few of these characters: one trained on such text, or a larger"
            " one, takes fewer."
        )
        found.add("split_characters", "warning", parts, text, advice)
    dropped = ratio(facts["dropped_tokens"], facts["tokens"])
    text = f"{facts['dropped_tokens']:,} tokens ({dropped:.1%}) at the end do not fill a block"
    advice = "They are left out. With so little text, take a smaller --block_size."
    found.add(
        "dropped_tail",
        "warning",
        facts["dropped_tokens"] if dropped > CUT_SHARE else 0,
        text,
        advice,
    )
    copies = len(texts.copies)
    text = (
        f"{copies:,} of {texts.count:,} documents ({ratio(copies, texts.count):.1%}) are copies of"
        " an earlier one"
    )
    places = (f"{where} (as {original})" for where, original in texts.copies)
    found.add(
        "duplicate_rows",
        "warning",
        copies,
        text,
        "Remove them, or they weigh more than others.",
        places,
    )
    if held_out:
        both = [
            (where, texts.first[digest])
            for digest, where in held_out.first.items()
            if digest in texts.first
        ]
        text = f"{len(both):,} of {held_out.count:,} held-out documents are trained on too"
        places = (f"{where} (as {original})" for where, original in both)
        advice = "The held-out loss would flatter. Remove them from one side."
        found.add("held_out_rows_trained", "warning", len(both), text, advice, places)
    check_boundaries(found, texts)
    text = f"special tokens are spelled out in {len(texts.marked):,} documents"
    advice = (
        "They are tokenised as plain text and control nothing. Look whether the rows are attacks or"
        " mishaps."
    )
    found.add("special_tokens_in_text", "warning", len(texts.marked), text, advice, texts.marked)
    trained = int(tokens.trained.sum())
    report = {
        "stage": "pretrain",
        "rows": len(tokens),
        "documents": facts["documents"],
        "bytes": texts.bytes,
        "bytes_per_token": round(texts.bytes / max(facts["tokens"] - facts["documents"], 1), 3),
        "end_tokens": ends,
        "dropped_tokens": facts["dropped_tokens"],
        "dropped_share": dropped,
        "partial_character_share": ratio(parts, len(tokens.ids)),
        "tokens": len(tokens.ids),
        "trained_tokens": trained,
        "trained_share": ratio(trained, len(tokens.ids)),
        "roles": count_roles(tokens, documents),
        "lengths": describe_lengths(document_lengths(tokens, tokenizer), of="document"),
        "findings": found.in_order(),
    }
    return Inspection("pretrain", tokens, documents, report)


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


# Files.


def recognise_stage(words: Sequence[str], columns: Columns | None = None) -> str:
    """What the first usable row of some files is for: "dpo", "sft" or "pretrain"; raises
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
    found = "\n".join(f"  as {stage}: {problem}" for stage, problem in problems.items())
    raise UserError(
        f"the stage cannot be told from the first {RECOGNISED} rows:\n{found}\nMend them, or name"
        " the --stage."
    )


def data_paths(words: Sequence[str]) -> list[str]:
    """Words of `--train_files` -> the paths in them."""
    return [path for source in parse_sources(words) for path in source.paths]


def inspect_files(
    stage: str, data_args, tokenizer, max_length: int, chat_args: ChatArguments | None = None
) -> Inspection:
    """Files, read and tokenised as a run of the stage does it -> their report; bad rows are
    findings.

    Raises:
        UserError: as the stage's loader.
    """
    policy, data_args = data_args.on_bad_rows, dataclasses.replace(data_args, on_bad_rows="skip")
    if stage == "pretrain":
        markers = data_args.boundary_markers
        texts = Texts(data_paths(data_args.train_files), tokenizer, markers, data_args.reading())
        held_out = (
            Texts(data_args.eval_files, tokenizer, markers, data_args.reading())
            if data_args.eval_files
            else None
        )
        found = Findings()
        reading = Reading()
        reading.bad.append(texts.bad)
        reading.columns.append(texts.columns)
        check_left_out(found, reading, policy)
        told = dataclasses.replace(
            data_args, unread_columns=[*(data_args.unread_columns or ()), IGNORE_ALL]
        )
        blocks = load_blocks(told, tokenizer, max_length)
        return inspect_documents(
            blocks.train, blocks.facts["train"], texts, tokenizer, held_out, found
        )
    chat_args = chat_args or ChatArguments()
    set_chat_template(tokenizer, chat_args.chat_template)
    if stage == "dpo":
        rows = load_preferences(data_args, tokenizer, max_length, chat_args)
    else:
        rows = load_conversations(
            data_args, tokenizer, max_length, chat_args, roles=not has_roles(tokenizer)
        )
    return inspect_chats(stage, rows, tokenizer, policy, chat_args.train_turns == "all")
