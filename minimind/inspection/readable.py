"""Tokens as readable text, for the terminal and the page."""

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from minimind.data.packing import IGNORED
from minimind.inspection.inspection import Inspection
from minimind.tokenizer import text_bytes

# The colour of each role in the terminal, and its hue on the page; other roles share the last.
ROLE_COLOURS = {
    "system": ("magenta", 290),
    "user": ("blue", 215),
    "assistant": ("green", 140),
    "tool": ("cyan", 185),
    "document": ("green", 140),
    "": ("yellow", 40),
}


def role_colour(role: str) -> tuple[str, int]:
    """The colour of a role in the terminal, and its hue on the page."""
    return ROLE_COLOURS.get(role, ROLE_COLOURS[""])


class ReadableToken(NamedTuple):
    """One token as it is shown."""

    text: str
    token_id: int
    label: int
    role: str
    special: bool

    @property
    def trained(self) -> bool:
        """Whether it has a label."""
        return self.label != IGNORED


class ReadableRows:
    """The rows of an inspection as tokens that can be read one by one.

    A line break is shown as "⏎", a part of a character as its bytes (<0xE4>), other control
    characters escaped.
    """

    def __init__(self, inspection: Inspection, tokenizer: PreTrainedTokenizerFast):
        self.inspection = inspection
        pieces = text_bytes(tokenizer)
        self.special = {token_id for token_id, raw in enumerate(pieces) if not raw}
        self.texts = [
            readable(raw or tokenizer.convert_ids_to_tokens(token_id).encode())
            for token_id, raw in enumerate(pieces)
        ]

    def __getitem__(self, number: int) -> Iterator[ReadableToken]:
        """The tokens of one row."""
        tokens, messages = self.inspection.tokens, self.inspection.messages
        span = slice(tokens.starts[number], tokens.starts[number + 1])
        roles = messages.roles[messages.of_token[span]].tolist()
        ids, labels = tokens.ids[span].tolist(), tokens.labels[span].tolist()
        for token_id, label, role in zip(ids, labels, roles, strict=True):
            special = token_id in self.special
            yield ReadableToken(self.texts[token_id], token_id, label, role, special)


def readable(raw: bytes) -> str:
    """A token's bytes as printable text."""
    try:
        text = raw.decode().replace("\n", "⏎")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in raw)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
