"""Our own evaluation set: minimal pairs in English and Chinese from templates, without a download.

A template is a sentence with slots and alternatives:

    "The ({n[0]}|{n[1]}) <is|are> {adj}."    n = ("dog", "dogs"), adj = "hungry"

`{adj}` and `{n[0]}` are filled with words. `(a|b)` is the context and `<x|y>` what is tested: x is
right after a, and y after b. So a template gives two pairs at once,

    The dog is hungry.    *The dog are hungry.
    The dogs are hungry.  *The dogs is hungry.

in which each word is as often right as wrong: a model that only knows how frequent words are (or
prefers short sentences) wins exactly one of the two. A template without a context tests the order
of words, `<x|y>` with y the same words in a wrong order, where such a model finds a tie.
"""

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from minimind.common.files import write_json_lines
from minimind.score_card import own_set_en, own_set_zh
from minimind.score_card.minimal_pairs import MinimalPair

# Language -> phenomenon -> paradigm
PARADIGMS: dict[str, dict[str, dict[str, dict]]] = {
    "en": own_set_en.PARADIGMS,
    "zh": own_set_zh.PARADIGMS,
}
PAIRS = 40  # of a paradigm
MAX_TRIES = 20  # drawings for each wanted pair: those that repeat a pair are left out

CONTEXT, TESTED = re.compile(r"\(([^|)]*)\|([^)]*)\)"), re.compile(r"<([^|>]*)\|([^>]*)>")
Word = str | tuple[str, ...]


def own_pairs(
    languages: Sequence[str] = ("en", "zh"), count: int = PAIRS, seed: int = 0
) -> list[MinimalPair]:
    """At most `count` different pairs of each paradigm (fewer where its words give no more), the
    same on every machine and under every version of Python."""
    pairs = []
    for language in languages:
        for phenomenon, paradigms in PARADIGMS[language].items():
            for name, paradigm in paradigms.items():
                uid = f"{language}_{name}"
                groups = (uid, f"{language} {phenomenon}", f"own set, {language}")
                for number, (good, bad) in enumerate(draw(paradigm, count, f"{seed} {uid}")):
                    pairs.append(MinimalPair(f"{uid}/{number}", good, bad, *groups))
    return pairs


def write_pairs(pairs: Iterable[MinimalPair], path: Path) -> None:
    """Write pairs of `own_pairs` in the layout that `read_pairs` reads (BLiMP's), one JSON object
    on a line.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [
        {
            "sentence_good": pair.good,
            "sentence_bad": pair.bad,
            "UID": pair.paradigm,
            "linguistics_term": pair.phenomenon,
            "pairID": pair.key.rpartition("/")[2],
            "language": pair.file[-2:],
        }
        for pair in pairs
    ]
    write_json_lines(path, rows)


def draw(paradigm: dict, count: int, seed: str) -> list[tuple[str, str]]:
    """Different (good, bad) sentences of a paradigm, `count` at most; its templates take turns."""
    # Python promises the same numbers in all versions for `random()` alone, not for `choice`
    generator = random.Random(seed)
    words = [(names.split(), parse_words(text)) for names, text in paradigm["words"].items()]
    templates = paradigm["templates"]
    pairs: dict[tuple[str, str], None] = {}
    for number in range(MAX_TRIES * count):
        values: dict[str, Word] = {}
        for names, choices in words:
            drawn: list[Word] = []
            while len(drawn) < len(names):
                word = choices[int(generator.random() * len(choices))]
                if all(differ(word, other) for other in drawn):
                    drawn.append(word)
            values |= zip(names, drawn, strict=True)
        twins = expand(templates[number % len(templates)].format(**values))
        if len(pairs) + len(twins) <= count and not any(twin in pairs for twin in twins):
            pairs |= dict.fromkeys(twins)
        if len(pairs) == count:
            break
    return list(pairs)


def parse_words(text: str) -> list[Word]:
    """Words of a comma-separated list; those with several fields ("dog/dogs") are tuples."""
    words = [word.strip() for word in text.split(",")]
    return [tuple(word.split("/")) if "/" in word else word for word in words]


def differ(word: Word, other: Word) -> bool:
    """Whether no field of a word is the same in another: words drawn together, such as `a b`, are
    right in each other's place nowhere."""
    if isinstance(word, str):
        return word != other
    return all(mine != theirs for mine, theirs in zip(word, other, strict=True))


def expand(text: str) -> list[tuple[str, str]]:
    """The (good, bad) sentences of a filled template: two with a context, one without."""

    def sentence(context: int, tested: int) -> str:
        found = CONTEXT.sub(lambda match: match[1 + context], text)
        found = TESTED.sub(lambda match: match[1 + tested], found)
        return found[0].upper() + found[1:]

    if "(" not in text:
        return [(sentence(0, 0), sentence(0, 1))]
    return [(sentence(0, 0), sentence(0, 1)), (sentence(1, 1), sentence(1, 0))]
