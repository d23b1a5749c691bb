r"""Cut a long text into pieces whose ids, one after the other, are those of the entire text.

Encoding takes 100 to 350 bytes of memory per character in the library, and up to 50 in tiktoken
within one word. A long text is therefore encoded piece by piece, cut where the tokenizer's rule
begins a new word in any context:

*   before a space that follows something else, or between a letter (Latin or Chinese) and white
    space, a digit or a mark other than an apostrophe. No rule of byte-level BPE looks beyond such a
    border: each matches from left to right, and by the kinds of neighbouring characters.
*   At each cut the library confirms this for the tokenizer at hand, on the characters around it.

A tokenizer that splits in another way, or not at all, encodes a text only in one piece.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer

from minimind.common.errors import BadRowError

PIECE = 2**18  # characters of a piece, if there is a border
LONGEST = 2**20  # characters without a border: 350 MB of memory in the library
LONGEST_WHOLE = 2**22  # characters of a text that a tokenizer encodes only in one piece
AROUND = 64  # characters on each side of a border that are encoded to confirm it
TRIED = 8  # borders at one place
BORDER = re.compile(
    r"(?<=\S)(?= )|(?<=[A-Za-z\u4e00-\u9fff])(?=[\n\t!-&(-@\[-`{-~，。、：；！？（）《》“”])"
)
SPLITS = {"Split", "Digits", "Punctuation", "ByteLevel"}
# Patterns that look back, or for the ends of a text
FAR_SIGHTED = re.compile(r"\(\?<|\\[AbBGzZ]|(?<!\[)\^|\$")


class Cutter:
    """Cuts the texts of one tokenizer; can be called from several threads at once."""

    def __init__(self, library: Tokenizer):
        self.library = library
        rule = json.loads(library.to_str())["pre_tokenizer"] or {"type": None}
        steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
        local = all(step["type"] in SPLITS and not step.get("add_prefix_space") for step in steps)
        splits = any(step["type"] != "ByteLevel" or step["use_regex"] for step in steps)
        patterns = [step["pattern"].get("Regex", "") for step in steps if "pattern" in step]
        self.cuts = local and splits and not any(map(FAR_SIGHTED.search, patterns))
        self.longest = LONGEST if self.cuts else LONGEST_WHOLE

    def __call__(self, text: str) -> Iterator[str]:
        """The pieces of a text; raises BadRowError for one that is too long to encode."""
        start = 0
        while len(text) - start > PIECE and (end := self._border(text, start)):
            yield text[start:end]
            start = end
        if len(text) - start > self.longest:
            kind = "without a space or another border between words" if self.cuts else "in one text"
            raise BadRowError(
                f"found more than {self.longest:,} characters {kind}, from character {start:,} on,"
                " which this tokenizer encodes only in one piece. Break it into shorter texts"
            )
        yield text[start:]

    def check(self, text: str) -> None:
        """Raises BadRowError for a text that cannot be cut into pieces that are short enough."""
        if len(text) > PIECE:
            for _ in self(text):
                pass

    def _border(self, text: str, start: int) -> int | None:
        """The last border of a piece that begins at `start`, or the first after it, or None."""
        if not self.cuts:
            return None
        end = start + PIECE
        for size in (2**10, 2**14, PIECE - 1):  # most texts have one at once
            places = [match.start() for match in BORDER.finditer(text, end - size, end)]
            if (border := self._first(text, reversed(places[-TRIED:]))) is not None:
                return border
        later = (match.start() for match in BORDER.finditer(text, end, start + self.longest))
        return self._first(text, islice(later, TRIED))

    def _first(self, text: str, places: Iterator[int]) -> int | None:
        return next((place for place in places if self._is_border(text, place)), None)

    def _is_border(self, text: str, place: int) -> bool:
        left, right = text[max(0, place - AROUND) : place], text[place : place + AROUND]
        words, ids = zip(*map(self._words_and_ids, (left, right, left + right)), strict=True)
        return words[0] + words[1] == words[2] and ids[0] + ids[1] == ids[2]

    def _words_and_ids(self, text: str) -> tuple[list[str], list[int]]:
        normalizer = self.library.normalizer
        normal = normalizer.normalize_str(text) if normalizer else text
        words = self.library.pre_tokenizer.pre_tokenize_str(normal)
        return [word for word, _ in words], self.library.encode(text, add_special_tokens=False).ids
