"""The inspection of conversations and preference pairs."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from minimind.data.chats import ChatRows
from minimind.data.loss_mask import preference_labels
from minimind.inspection import mask_checks, row_checks, text_checks
from minimind.inspection.findings import Findings
from minimind.inspection.inspection import REPLIES, Inspection
from minimind.inspection.lengths import describe_lengths, percentiles
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

    findings = Findings()
    row_checks.check_left_out(findings, rows.reading, on_bad_rows)
    text_checks.check_rendered(findings, rows.reading)
    return inspect_rows(
        stage,
        flat(rows.train, rows.where),
        tokenizer,
        findings=findings,
        held_out=rows.eval and flat(rows.eval, rows.reading.held_out),
        lengths_before=np.repeat(rows.lengths, size),
        lengths_read=np.array(rows.reading.lengths),
        every_reply=every_reply,
    )


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
) -> Inspection:
    """Inspect finished rows of "sft", or of "dpo" (chosen, rejected, chosen, ...).

    Args:
        stage: "sft" or "dpo".
        tokens: the rows.
        tokenizer: their tokenizer.
        findings: those of earlier checks.
        held_out: the held-out rows.
        lengths_before: see `check_cuts`.
        lengths_read: the lengths of all that was read, also of what was left out as too long.
        every_reply: whether all replies should be trained.
    """
    findings = Findings() if findings is None else findings
    size = len(REPLIES) if stage == "dpo" else 1
    messages = Messages(tokens, tokenizer)
    replies = Replies(tokens, messages)
    before = tokens.lengths if lengths_before is None else lengths_before
    read = tokens.lengths.reshape(-1, size).max(1) if lengths_read is None else lengths_read

    mask_checks.check_tokenizer(findings, tokenizer)
    every_reply = every_reply and stage == "sft"
    mask_checks.check_mask(findings, tokens, messages, replies, tokenizer, every_reply)
    mask_checks.check_structure(findings, tokens, messages, tokenizer)
    text_checks.check_text(findings, tokens, messages, tokenizer)
    text_checks.check_dialogues(findings, tokens, messages, tokenizer)
    mask_checks.check_replies(findings, tokens, replies)
    cut, lost = row_checks.check_cuts(findings, tokens, before, size)
    row_checks.check_copies(findings, tokens, held_out, size)

    trained = np.diff(tokens.trained_before[tokens.starts])
    unit = "pair (its longer side)" if stage == "dpo" else "conversation"
    lengths = describe_lengths(read, unit)
    if stage == "dpo":
        row_checks.check_pairs(findings, tokens)
        for start, name in enumerate(REPLIES):
            side = trained[start::2]
            mean = round(float(side.mean()), 1)
            lengths[name] = {"mean": mean, "percentiles": percentiles(side)}
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
        "findings": findings.in_order(),
    }
    return Inspection(stage, tokens, messages, report)
