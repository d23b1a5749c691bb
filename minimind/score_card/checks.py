"""Rules that a program can check in a reply: facts, numbers, formats, lengths, language.

In the spirit of IFEval (Zhou et al., 2023, arXiv 2311.07911): each rule is strict and needs no
judge. A Chinese character counts as one word.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.units import is_chinese, units_of
from minimind.evaluation.judges import to_pattern

# Not within a word of Latin letters, and without the minus of "3-4"
NUMBER = re.compile(
    r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII
)
FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
BULLET = re.compile(r"^\s*[-*•·]\s+\S", re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？…]+")
COMMAS = (",", "，")
FINAL = ".。!?,;:"  # punctuation that may follow an answer; in full width too, see `normalised`


class Rule(NamedTuple):
    """`read` checks a row's value for the rule (raises BadRowError); `holds` tells whether a reply
    follows it."""

    read: Callable[[Any], Any]
    holds: Callable[[str, Any], bool]


# Values


def a_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"found {shown(value)}, expected a text")
    return value


def texts(value: Any) -> list[str]:
    """One text or a list of them; numbers become texts."""
    values = value if isinstance(value, list) and value else [value]
    is_number = [isinstance(each, int | float) and not isinstance(each, bool) for each in values]
    return [a_text(str(v) if n else v) for v, n in zip(values, is_number, strict=True)]


def a_number(value: Any) -> Decimal:
    """A finite number, also as a text."""
    text = str(value).strip() if not isinstance(value, bool) else ""
    if not NUMBER.fullmatch(text):
        raise BadRowError(f"found {shown(value)}, expected a number")
    return numbers_in(text)[0]


def a_count(value: Any) -> int:
    number = a_number(value)
    if number < 0 or number != int(number):
        raise BadRowError(f"found {shown(value)}, expected a whole number, 0 or more")
    return int(number)


def yes(value: Any) -> bool:
    if value is not True:
        raise BadRowError(f"found {shown(value)}, expected true, or no such rule")
    return True


def a_language(value: Any) -> str:
    if value not in ("en", "zh"):
        raise BadRowError(f"found {shown(value)}, expected en or zh")
    return value


def a_regex(value: Any) -> str:
    return to_pattern(a_text(value)).pattern


# Replies


def normalised(text: str) -> str:
    """A text for comparison: Unicode's NFKC (full width as half width), white space as single
    spaces, and without punctuation at its end.

    >>> normalised(" Ｐaris ！ ")
    'Paris'
    """
    return " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(f"{FINAL} ")


def numbers_in(text: str) -> list[Decimal]:
    """The numbers in a text, also with commas between thousands.

    >>> numbers_in("3-4 is -1, not 1,000.50.")
    [Decimal('3'), Decimal('4'), Decimal('-1'), Decimal('1000.50')]
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    return [Decimal(each.replace(",", "")) for each in NUMBER.findall(text)]


def is_answer(reply: str, accepted: list[str]) -> bool:
    return normalised(reply) in map(normalised, accepted)


def last_number_is(reply: str, number: Decimal) -> bool:
    return numbers_in(reply)[-1:] == [number]


def is_json(reply: str, _: bool) -> bool:
    """Whether a reply is one JSON value, alone or in a code block."""
    text = reply.strip()
    fenced = FENCE.fullmatch(text)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def is_in(language: str, reply: str) -> bool:
    """Whether a reply has words, and they are Chinese characters for "zh", others for "en"."""
    units = len(units_of(reply))
    return units > 0 and is_chinese(reply, units) == (language == "zh")


def folded(text: str) -> str:
    """A text for the search of words: NFKC, without the difference of capitals."""
    return unicodedata.normalize("NFKC", text).casefold()


def words(reply: str) -> int:
    return len(units_of(reply))


def sentences(reply: str) -> int:
    return sum(bool(units_of(each)) for each in SENTENCE_END.split(reply))


def paragraphs(reply: str) -> int:
    return sum(bool(each.strip()) for each in re.split(r"\n\s*\n", reply))


RULES: Mapping[str, Rule] = {
    # Facts and numbers
    "answer": Rule(texts, is_answer),
    "number": Rule(a_number, last_number_is),
    "regex": Rule(a_regex, lambda reply, pattern: bool(re.search(pattern, reply))),
    "contains": Rule(texts, lambda reply, each: all(folded(t) in folded(reply) for t in each)),
    "excludes": Rule(texts, lambda reply, each: not any(folded(t) in folded(reply) for t in each)),
    # Lengths
    "min_words": Rule(a_count, lambda reply, count: words(reply) >= count),
    "max_words": Rule(a_count, lambda reply, count: words(reply) <= count),
    "min_characters": Rule(a_count, lambda reply, count: len(reply) >= count),
    "max_characters": Rule(a_count, lambda reply, count: len(reply) <= count),
    "min_sentences": Rule(a_count, lambda reply, count: sentences(reply) >= count),
    "max_sentences": Rule(a_count, lambda reply, count: sentences(reply) <= count),
    "paragraphs": Rule(a_count, lambda reply, count: paragraphs(reply) == count),
    "bullets": Rule(a_count, lambda reply, count: len(BULLET.findall(reply)) == count),
    # Forms
    "language": Rule(a_language, lambda reply, language: is_in(language, reply)),
    "starts_with": Rule(a_text, lambda reply, text: reply.startswith(text.strip())),
    "ends_with": Rule(a_text, lambda reply, text: reply.endswith(text.strip())),
    "json": Rule(yes, is_json),
    "no_commas": Rule(yes, lambda reply, _: not any(comma in reply for comma in COMMAS)),
    "lowercase": Rule(yes, lambda reply, _: reply == reply.lower()),
    "uppercase": Rule(yes, lambda reply, _: reply == reply.upper()),
}


def read_rules(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The names of rules and their checked values; raises BadRowError."""
    if not values:
        raise BadRowError(f"found no rule, expected some of {', '.join(RULES)}")
    checked = []
    for name, value in values.items():
        if name not in RULES:
            raise BadRowError(f"rules: found {shown(name)}, expected some of {', '.join(RULES)}")
        try:
            checked.append((name, RULES[name].read(value)))
        except BadRowError as problem:
            raise BadRowError(f"{name}: {problem}") from None
    return tuple(checked)


def follows(reply: str, name: str, value: Any) -> bool:
    """Whether a reply, without white space at its ends, follows one rule; an empty one follows
    none."""
    return bool(reply.strip()) and RULES[name].holds(reply.strip(), value)
