"""Checks of what the words of rows hold: control tokens, dialogues and boundaries spelled out."""

import re

import numpy as np
from transformers import PreTrainedTokenizerFast

from minimind.data.chat_summary import Reading
from minimind.data.dialogues import VOICES
from minimind.inspection.findings import Findings
from minimind.inspection.messages import NO_TEXT, Messages
from minimind.inspection.texts import DocumentTexts, special_tokens
from minimind.inspection.tokens import Tokens
from minimind.tokenizer import text_bytes

# Of the rows: more than this share with turns spelled out, and a template wrote the file.
RENDERED_SHARE = 0.5
# Of the rows: more than this share of flat dialogues, and a run stops.
FLAT_SHARE = 0.2
SEARCHED = 1 << 20  # tokens turned into text at a time
HARMLESS = (
    "They are tokenised as plain text and control nothing. Check whether the rows are attacks or"
    " mishaps."
)


def search_text(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, pattern: re.Pattern[bytes]
) -> np.ndarray:
    """The positions of the tokens in whose text a match of `pattern` begins; no match spans special
    tokens."""
    pieces = [piece or NO_TEXT for piece in text_bytes(tokenizer)]
    sizes = np.array([len(piece) for piece in pieces])
    offsets, text = np.cumsum(sizes) - sizes, np.frombuffer(b"".join(pieces), np.uint8)
    positions = []
    row = 0
    # Complete rows at a time, so that memory is bounded and no match is cut.
    while row < len(tokens):
        next_row = max(int(np.searchsorted(tokens.starts, tokens.starts[row] + SEARCHED)), row + 1)
        begin, end = tokens.starts[row], tokens.starts[min(next_row, len(tokens))]
        ids, row = tokens.ids[begin:end], next_row
        size = sizes[ids]
        starts = np.cumsum(size) - size
        index = np.repeat(offsets[ids] - starts, size) + np.arange(size.sum())
        matches = [match.start() for match in pattern.finditer(text[index].tobytes())]
        matches = np.array(matches, np.int64)
        positions.append(begin + np.searchsorted(starts, matches, side="right") - 1)
    return np.concatenate(positions)


def check_text(
    findings: Findings, tokens: Tokens, messages: Messages, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Find special tokens spelled out in text, by role."""
    names = [name.encode() for name in special_tokens(tokenizer)]
    positions = search_text(tokens, tokenizer, re.compile(b"|".join(map(re.escape, names))))
    roles = messages.roles[messages.of_token[positions]]
    for role in np.unique(roles):
        rows = np.unique(tokens.row_of(positions[roles == role]))
        text = f"special tokens are spelled out in the {role} text of {len(rows):,} rows"
        places = tokens.places(rows)
        findings.add("special_tokens_in_text", "warning", len(rows), text, HARMLESS, places)
        findings[-1]["role"] = str(role)


def check_dialogues(
    findings: Findings, tokens: Tokens, messages: Messages, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Find users' messages that hold both voices of a dialogue, spelled out in one string."""
    both = np.ones(len(messages), bool)
    for voices in VOICES.values():
        pattern = re.compile(rf"\n[ \t]*(?:{voices})[ \t]*[:：]".encode(), re.IGNORECASE)
        has_voice = np.zeros(len(messages), bool)
        has_voice[messages.of_token[search_text(tokens, tokenizer, pattern)]] = True
        both &= has_voice
    rows = np.unique(messages.row[both & (messages.roles == "user")])
    count, total = len(rows), len(tokens)
    text = f"in {count:,} of {total:,} rows a user's message holds both voices of a dialogue"
    advice = (
        "Split it into messages. A prompt that begins with 'Human:' or 'User:' is split without"
        " asking."
    )
    severity = "error" if count > FLAT_SHARE * total else "warning"
    findings.add("flat_dialogues", severity, count, text, advice, tokens.places(rows))


def check_rendered(findings: Findings, reading: Reading) -> None:
    """Find chats whose turns are spelled out in the words of a message, as a chat template writes
    them."""
    count, total = reading.counts["rendered"], len(reading.lengths)
    text = (
        f"in {count:,} of {total:,} rows the words hold turns that are rendered already, such as"
        f" {reading.marker!r}"
    )
    advice = (
        'They would be trained as plain text within a turn. Give each turn as {"role", "content"}'
        ' in "messages", without the markers; the chat template writes them.'
    )
    severity = "error" if count > RENDERED_SHARE * total else "warning"
    places = reading.places.get("rendered", ())
    findings.add("rendered_chats", severity, count, text, advice, places)


def check_boundaries(findings: Findings, texts: DocumentTexts) -> None:
    """Find boundaries of documents that are spelled out in their text."""
    if texts.boundaries.policy == "split":
        severity = "info"
        advice = "Each is a document of its own now. --boundary_markers keep trains them as text."
    else:
        severity = "warning"
        advice = (
            "Each is several tokens, no end and no word. --boundary_markers split cuts the rows"
            " there."
        )
    count, text = len(texts.split), str(texts.boundaries)
    findings.add("boundary_markers", severity, count, text, advice, texts.split)


def check_special_tokens(findings: Findings, texts: DocumentTexts) -> None:
    """Find special tokens that are spelled out in documents."""
    count = len(texts.marked)
    text = f"special tokens are spelled out in {count:,} documents"
    findings.add("special_tokens_in_text", "warning", count, text, HARMLESS, texts.marked)
