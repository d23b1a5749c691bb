"""The inspection of conversations and preference pairs."""

from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minimind.data.chats import ChatRows
from minimind.data.loss_mask import preference_labels
from minimind.inspection import mask_checks, row_checks, text_checks
from minimind.inspection.findings import Findings
from minimind.inspection.inspection import REPLIES, Inspection
from minimind.inspection.lengths import PARTS, describe, describe_lengths
from minimind.inspection.messages import Messages, Replies, count_roles
from minimind.inspection.tokens import Tokens, ratio
from minimind.tokenizer import BOS_TOKEN


def has_roles(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of the chat template's conversations show the roles, so that the loader need
    not record them."""
    return BOS_TOKEN in tokenizer.chat_template


def inspect_chats(
    stage: str,
    rows: ChatRows,
    tokenizer: PreTrainedTokenizerFast,
    on_bad_rows: str | None = None,
    every_reply: bool = True,
) -> Inspection:
    """Inspect the rows of `load_conversations` ("sft") or `load_preferences` ("dpo"); see
    `inspect_rows`."""
    size = len(REPLIES) if stage == "dpo" else 1

    def flat(part: Dataset, where: Sequence[str]) -> Tokens:
        part = Dataset.from_list(preference_labels(part)) if stage == "dpo" else part
        return Tokens(part, np.repeat(where, size).tolist())

    before = np.array(rows.lengths).reshape(len(rows.lengths), -1)
    cut = None
    findings = Findings()
    row_checks.check_left_out(findings, rows.reading, on_bad_rows)
    if stage == "dpo":
        row_checks.check_pair_cuts(findings, rows.reading)
        cut = np.repeat((reply_lengths(rows.train) < before[:, 1:]).any(1), size)
        before = before[:, :1] + before[:, 1:]
    text_checks.check_rendered(findings, rows.reading)
    return inspect_rows(
        stage,
        flat(rows.train, rows.where),
        tokenizer,
        findings=findings,
        held_out=rows.eval and flat(rows.eval, rows.reading.held_out),
        lengths_before=before.reshape(-1),
        lengths_read=np.array(rows.reading.lengths),
        cut=cut,
        every_reply=every_reply,
    )


def reply_lengths(pairs: Dataset) -> np.ndarray:
    """The tokens of the replies of preference pairs: shape (pairs, 2)."""
    columns = [
        [pc.list_value_length(table[f"{name}_ids"]).to_numpy() for name in REPLIES]
        for table in pairs.with_format("arrow").iter(batch_size=1000)
    ]
    return np.concatenate([np.stack(each, axis=1) for each in columns])


def inspect_rows(
    stage: str,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerFast,
    *,
    findings: Findings | None = None,
    held_out: Tokens | None = None,
    lengths_before: np.ndarray | None = None,
    lengths_read: np.ndarray | None = None,
    every_reply: bool = True,
    cut: np.ndarray | None = None,
) -> Inspection:
    """Inspect finished rows of "sft", or of "dpo" (chosen, rejected, chosen, ...).

    Args:
        stage: "sft" or "dpo".
        tokens: the rows.
        tokenizer: their tokenizer.
        findings: those of earlier checks.
        held_out: the held-out rows.
        lengths_before: see `check_cuts`.
        lengths_read: the lengths of all that was read, also of what was left out as too long:
            (conversations, 1), or (pairs, 3) of prompt, chosen and rejected.
        every_reply: whether all replies should be trained.
        cut: (rows,) true where a reply of the pair was cut, so that none has an end.
    """
    findings = Findings() if findings is None else findings
    size = len(REPLIES) if stage == "dpo" else 1
    messages = Messages(tokens, tokenizer)
    replies = Replies(tokens, messages)
    before = tokens.lengths if lengths_before is None else lengths_before
    trained = np.diff(tokens.trained_before[tokens.starts])

    mask_checks.check_tokenizer(findings, tokenizer)
    every_reply = every_reply and stage == "sft"
    mask_checks.check_mask(findings, tokens, messages, replies, tokenizer, every_reply, cut)
    mask_checks.check_structure(findings, tokens, messages, tokenizer)
    text_checks.check_text(findings, tokens, messages, tokenizer)
    text_checks.check_dialogues(findings, tokens, messages, tokenizer)
    mask_checks.check_replies(findings, tokens, replies)
    truncated, lost = row_checks.check_cuts(findings, tokens, before, size)
    row_checks.check_copies(findings, tokens, held_out, size)

    if stage == "dpo":
        row_checks.check_pairs(findings, tokens)
        parts = lengths_read
        if parts is None:
            columns = (tokens.lengths - trained)[::2], trained[::2], trained[1::2]
            parts = np.stack(columns, axis=1)
        lengths = describe_lengths(parts[:, 0] + parts[:, 1:].max(1), "pair (its longer side)")
        lengths |= {name: describe(part) for name, part in zip(PARTS, parts.T, strict=True)}
    else:
        read = tokens.lengths if lengths_read is None else lengths_read[:, 0]
        lengths = describe_lengths(read, "conversation")
    report = {
        "stage": stage,
        "rows": len(tokens) // size,
        "rows_without_trained_token": int((trained == 0).sum()),
        "truncated_rows": truncated,
        "truncated_tokens": lost,
        "replies": len(replies.row),
        "replies_trained": int((replies.trained > 0).sum()),
        "replies_with_end_trained": int(replies.end_trained.sum()),
        "tokens": len(tokens.ids),
        "trained_tokens": int(trained.sum()),
        "trained_share": ratio(trained.sum(), len(tokens.ids)),
        "roles": count_roles(tokens, messages),
        "lengths": lengths,
        "findings": findings.in_order(),
    }
    return Inspection(stage, tokens, messages, report)
