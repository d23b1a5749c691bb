"""Boundaries of documents and turns of chats that are spelled out as text, such as `<|im_end|>`.

Left as text each of them is several tokens, neither the end of a document nor a word. Only what
cannot be anything else is taken for a boundary: `<s>` may be HTML, and an article on tokenizers may
name `<|endoftext|>` in quotes.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from minimind.common.errors import BadRowError, UserError

POLICIES = ("split", "keep", "error")
ROLES = "(?:system|developer|user|assistant|model|tool|ipython|observation)"
NEVER = "(?!)"


class Family(NamedTuple):
    """Markers that belong together, as patterns: the beginning and end of a document, and of a turn
    (the role included).

    `separates`: they may be anywhere between two documents, not only where a text begins or ends.
    `html`: they are tags too, and taken for markers only where nothing is outside of them.
    """

    opens: str
    closes: str
    turn: str = NEVER
    turn_end: str = NEVER
    separates: bool = False
    html: bool = False


FAMILIES = (
    # ChatML, MiniMind
    Family(r"<\|im_start\|>", r"<\|im_end\|>", rf"<\|im_start\|>{ROLES}\n", r"<\|im_end\|>"),
    # Llama 1 and 2, Mistral, older MiniMind
    Family(r"<s>", r"</s>", r"\[INST\]", r"\[/INST\]|</s>", html=True),
    # Llama 3
    Family(
        *(r"<\|begin_of_text\|>", r"<\|end_of_text\|>"),
        *(rf"<\|start_header_id\|>{ROLES}<\|end_header_id\|>", r"<\|eo[tm]_id\|>"),
        separates=True,
    ),
    # Gemma
    Family(r"<bos>", r"<eos>", rf"<start_of_turn>{ROLES}\n", r"<end_of_turn>"),
    # DeepSeek
    Family(
        *(r"<｜begin▁of▁sentence｜>", r"<｜end▁of▁sentence｜>", r"<｜(?:User|Assistant)｜>"),
        separates=True,
    ),
    # GPT-2, Qwen
    Family(r"<\|startoftext\|>", r"<\|endoftext\|>", separates=True),
    Family(r"<\|bos\|>", r"<\|eos\|>", separates=True),
    Family(r"\[BOS\]", r"\[EOS\]"),
    Family(NEVER, r"<\|?eo[dt]\|?>", separates=True),
    # Phi, GLM, Zephyr
    Family(NEVER, NEVER, rf"<\|{ROLES}\|>", r"<\|end\|>"),
)
BEGINNINGS = "|".join(family.opens for family in FAMILIES) + r"|<\|endoftext\|>|\[gMASK\]|<sop>"
ANY = re.compile("|".join(p for family in FAMILIES for p in family[:4] if p != NEVER))
# A marker in quotes is a mention. Straight quotes count where the first cannot end a quotation.
QUOTED = r"`{0}`|“{0}”|‘{0}’|「{0}」|(?<![^\s(=,:\[{{])(?:\"{0}\"|'{0}')"


def split_documents(text: str) -> list[str]:
    """Split a text into the documents between the markers in it.

    A chat with its turns spelled out is one document, its words joined by newlines.
    """
    if not ANY.search(text):
        return [text]
    documents = [text]
    for family in FAMILIES:
        documents = [piece for document in documents for piece in _split(document, family)]
    return documents


def _split(text: str, family: Family) -> list[str]:
    marker = f"(?:{family.opens}|{family.closes})"
    if _first_turn(text, family):
        pieces = re.split(f"{family.turn}|{family.turn_end}|{marker}|{BEGINNINGS}", text)
        return ["\n".join(piece.strip() for piece in pieces if piece.strip())]
    pieces = [text]
    if _are_boundaries(text, family):
        matches = re.finditer(f"{QUOTED.format(marker)}|(?P<marker>{marker})", text)
        if edges := [match.span() for match in matches if match["marker"]]:
            starts, ends = [0, *(end for _, end in edges)], [*(s for s, _ in edges), len(text)]
            pieces = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return [piece for piece in pieces if piece.strip()]


def _first_turn(text: str, family: Family) -> str | None:
    """The marker of a turn with which a text begins, after markers of its beginning."""
    match = re.match(rf"\s*(?:(?:{BEGINNINGS})\s*)*({family.turn})", text)
    return match and match[1].strip()


def _are_boundaries(text: str, family: Family) -> bool:
    """Whether the markers of a family are where documents begin and end."""
    if family.separates:
        return True
    if re.search(family.turn, text):
        return False
    opens, closes, text = f"(?:{family.opens})", f"(?:{family.closes})", text.strip()
    if family.html and re.search(r"<s\s", text):
        return False
    if family.html and not re.search(opens, text):  # a tag is closed only where it was opened
        return bool(re.search(f"{closes}$", text))
    inside = re.sub(rf"^{opens}|{closes}$|{closes}\s*{opens}", "", text)
    return inside != text and not (family.html and re.search(f"{opens}|{closes}", inside))


def rendered_turn(texts: Iterable[str]) -> str | None:
    """The marker with which one of some texts begins as a turn or ends as a reply, if any."""
    for text in filter(ANY.search, texts):
        for family in FAMILIES:
            if marker := _first_turn(text, family):
                return marker
            match = re.search(rf"({family.turn_end}|{family.closes})\s*$", text)
            if match and not (family.html and re.search(r"<s[\s>]", text)):
                return match[1]
    return None


class Boundaries:
    """How a reading treats markers, one of POLICIES, and what it found: `rows` by their first
    marker, the `documents` that they were split into, and how many of the rows are `chats`."""

    def __init__(self, policy: str = "split"):
        if policy not in POLICIES:
            raise UserError(f"--boundary_markers {policy}: expected {', '.join(POLICIES)}.")
        self.policy = policy
        self.rows: Counter[str] = Counter()
        self.documents = self.chats = 0

    def split(self, text: str) -> list[str]:
        """The documents in a row's text; raises BadRowError if there are none, or by policy."""
        documents = split_documents(text)
        if documents == [text]:
            return documents
        marker = ANY.search(text).group()
        if self.policy == "error":
            raise BadRowError(
                f"found the boundary marker {marker!r} spelled out in the text, expected none"
            )
        if not documents and self.policy == "split":
            raise BadRowError(
                f"found nothing but boundary markers such as {marker!r}, expected text"
            )
        self.rows[marker] += 1
        self.documents += len(documents)
        self.chats += any(_first_turn(text, family) for family in FAMILIES)
        return [text] if self.policy == "keep" else documents

    def __str__(self) -> str:
        rows, markers = f"{self.rows.total():,} rows", ", ".join(map(repr, self.rows))
        if self.policy == "keep":
            return f"kept the boundary markers of {rows} as text: {markers}"
        chats = f"; {self.chats:,} rows are chats, reduced to their words" if self.chats else ""
        return f"split {rows} at {markers} into {self.documents:,} documents{chats}"
