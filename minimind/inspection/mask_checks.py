"""Checks of what is trained in each row: the labels, the replies, and the tokens around them.

Nothing here reads the chat template. Roles are read off the ids, so that a wrong mask shows instead
of explaining itself.
"""

import numpy as np
from transformers import PreTrainedTokenizerFast

from minimind.inspection.findings import Findings
from minimind.inspection.messages import OTHER, Messages, Replies
from minimind.inspection.tokens import Tokens

SHORT_REPLY = 2  # tokens without the end token: a reply of at most so many is worth a look
TAGS = "Check the generation tags of the chat template."


def check_tokenizer(findings: Findings, tokenizer: PreTrainedTokenizerFast) -> None:
    """Find what makes a tokenizer unfit for training."""
    if tokenizer.eos_token_id is None:
        text, advice = "the tokenizer has no end token (eos_token)", "Set one, or no reply can end."
        findings.add("no_end_token", "error", 1, text, advice)
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        text = f"pad_token and eos_token are both {tokenizer.eos_token!r}"
        advice = (
            "Padding is masked by its position here. A trainer that masks by the token would mask"
            " every end too."
        )
        findings.add("padding_is_end_token", "info", 1, text, advice)


def check_mask(
    findings: Findings,
    tokens: Tokens,
    messages: Messages,
    replies: Replies,
    tokenizer: PreTrainedTokenizerFast,
    every_reply: bool = True,
    cut: np.ndarray | None = None,
) -> None:
    """Find wrong labels.

    `every_reply`: whether all replies should be trained (never of pairs). `cut` (rows,): where a
    reply has no end, since it was cut or since that of its pair was.
    """
    if not tokens.trained.any():
        text = "no token has a label: nothing would be learnt"
        findings.add("nothing_trained", "error", len(tokens), text, TAGS)
        return
    trained_in_row = _check_labels(findings, tokens, messages)
    _check_ends(findings, tokens, replies, tokenizer.eos_token, cut)

    # Replies of which a part, or nothing, is trained.
    is_trained = replies.trained > 0
    partly = is_trained & replies.end_trained & ~replies.complete & ~replies.border
    text = f"{partly.sum():,} of {is_trained.sum():,} trained replies have words without a label"
    advice = (
        "Correct if only a part should be learnt (an answer without its reasoning); otherwise"
        " check the template."
    )
    places = tokens.places(replies.row[partly])
    findings.add("replies_partly_trained", "warning", partly.sum(), text, advice, places)
    if every_reply:
        context = ~is_trained & (trained_in_row[replies.row] > 0)
        text = f"{context.sum():,} of {len(is_trained):,} replies are context only"
        advice = "Correct if the options or the rows choose the turns to train."
        places = tokens.places(replies.row[context])
        findings.add("replies_not_trained", "info", context.sum(), text, advice, places)


def _check_labels(findings: Findings, tokens: Tokens, messages: Messages) -> np.ndarray:
    """Find labels that are missing or at the wrong token; returns the number in each row."""
    trained_before = tokens.trained_before
    trained_in_row = np.diff(trained_before[tokens.starts])
    empty = np.flatnonzero(trained_in_row == 0)
    text = f"{len(empty):,} of {len(tokens):,} rows have no trained token"
    advice = "They cost time and teach nothing. Leave them out, or check their roles."
    places = tokens.places(empty)
    findings.add("rows_without_trained_token", "warning", len(empty), text, advice, places)

    wrong = np.flatnonzero(tokens.trained & (tokens.labels != tokens.ids))
    text = f"{len(wrong):,} labels differ from the token at their own position"
    advice = (
        "The model shifts the labels itself: a label is the token beside it, not the next one, or"
        " it is -100."
    )
    places = tokens.places(tokens.row_of(wrong))
    findings.add("labels_differ", "error", len(wrong), text, advice, places)

    foreign = trained_before[messages.end] - trained_before[messages.start]
    foreign[messages.reply | (messages.roles == OTHER)] = 0
    names = ", ".join(np.unique(messages.roles[foreign > 0]))
    text = f"{foreign.sum():,} tokens of {names} have a label; only the assistant's may"
    places = tokens.places(messages.row[foreign > 0])
    findings.add("other_roles_trained", "error", foreign.sum(), text, TAGS, places)
    return trained_in_row


def _check_ends(
    findings: Findings, tokens: Tokens, replies: Replies, end: str, cut: np.ndarray | None
) -> None:
    """Find trained replies without a trained end token, and labels beyond the words of a reply."""
    is_trained = replies.trained > 0
    if cut is not None:
        is_trained &= ~cut[replies.row]
    count = is_trained.sum()
    missing = is_trained & ~replies.end_trained
    places = tokens.places(replies.row[missing])
    if missing.all() or (is_trained.any() and not replies.end_trained.any()):
        text = f"no reply's end token {end!r} has a label: the model would never learn to stop"
        findings.add("end_never_trained", "error", missing.sum(), text, TAGS, places)
    else:
        text = f"{missing.sum():,} of {count:,} trained replies end without a trained {end!r}"
        advice = (
            "Cut conversations after a reply, not within, or the model learns to stop less often."
        )
        findings.add("end_not_trained", "warning", missing.sum(), text, advice, places)

    border = replies.border
    text = (
        f"in {border.sum():,} of {count:,} trained replies the header or what follows the end has a"
        " label"
    )
    advice = (
        f"The mask is shifted, or its tags are too wide: the template writes these tokens. {TAGS}"
    )
    places = tokens.places(replies.row[border])
    findings.add("border_trained", "error", border.sum(), text, advice, places)


def check_replies(findings: Findings, tokens: Tokens, replies: Replies) -> None:
    """Find replies that are empty or very short."""
    is_trained = replies.trained > 0
    empty = is_trained & (replies.words == 0)
    text = f"{empty.sum():,} trained replies have no word before their end token"
    advice = "The model would learn to say nothing. Remove them."
    places = tokens.places(replies.row[empty])
    findings.add("empty_replies", "warning", empty.sum(), text, advice, places)

    short = is_trained & (replies.words > 0) & (replies.words <= SHORT_REPLY)
    count = is_trained.sum()
    text = f"{short.sum():,} of {count:,} trained replies have at most {SHORT_REPLY} tokens"
    places = tokens.places(replies.row[short])
    findings.add(
        "short_replies", "info", short.sum(), text, "Check whether they are answers.", places
    )


def check_structure(
    findings: Findings, tokens: Tokens, messages: Messages, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Find control tokens where no template puts them: a text that was taken for structure."""
    if not messages.is_chatml:
        return
    ids, of_token = tokens.ids, messages.of_token
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id

    # A second end within a message, padding, and headers without a role.
    stop = messages.stop[of_token]
    stray = (ids == end) & (stop >= 0) & (np.arange(len(ids)) > stop)
    stray |= ids == (-1 if pad in (None, end) else pad)
    stray |= (messages.roles == OTHER)[of_token]

    # Two messages of one role in a row.
    same = (messages.role[1:] == messages.role[:-1]) & (messages.row[1:] == messages.row[:-1])
    same &= np.isin(messages.roles[1:], ("system", "user", "assistant"))

    rows = np.concatenate([tokens.row_of(np.flatnonzero(stray)), messages.row[1:][same]])
    count = len(np.unique(rows))
    text = (
        f"in {count:,} rows control tokens stand where no template puts them, or a role speaks"
        " twice running"
    )
    advice = (
        "Text was taken for control tokens: whoever wrote it chose the roles. Tokenise text without"
        " special tokens."
    )
    findings.add("control_tokens_in_text", "error", count, text, advice, tokens.places(rows))
