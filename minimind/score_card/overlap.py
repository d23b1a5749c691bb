"""Overlap of a text with references: ROUGE, and BLEU and chrF by sacrebleu."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from minimind.common.errors import UserError, install
from minimind.data.units import is_chinese, units_of


def ngrams(units: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n units occurs."""
    return Counter(zip(*(units[start:] for start in range(n)), strict=False))


def f1(matches: int, found: int, expected: int) -> float:
    """The harmonic mean of precision and recall, 0 without matches."""
    return 2 * matches / (found + expected) if matches else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by one addition for each unit of `second` (Hyyrö, 2004, on a row of bits)."""
    places: dict[str, int] = {}
    for place, unit in enumerate(first):
        places[unit] = places.get(unit, 0) | 1 << place
    row = full = (1 << len(first)) - 1
    for unit in second:
        matches = row & places.get(unit, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004), the best over the references.

    A unit is a word in lower case, or one Chinese character; there is no stemming.
    """
    own, best = units_of(text.lower()), {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}
    for reference in references:
        other = units_of(reference.lower())
        scores = {"rouge_l": f1(longest_common_subsequence(own, other), len(own), len(other))}
        for n in (1, 2):
            found, expected = ngrams(own, n), ngrams(other, n)
            matches = (found & expected).total()
            scores[f"rouge_{n}"] = f1(matches, found.total(), expected.total())
        best = {name: max(best[name], scores[name]) for name in best}
    return best


def require_sacrebleu() -> None:
    """Raise UserError where sacrebleu is not installed."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise UserError(
            "--replies with references computes BLEU and chrF with the package sacrebleu, which is"
            f" not installed: {install('evaluate')}. Or give prompts without references."
        )


def corpus_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`chrf` of a corpus, `bleu_zh` of the texts with Chinese references and `bleu_en` of the
    others, from 0 to 100, by sacrebleu (BLEU with its tokens "zh" and "13a")."""
    from sacrebleu.metrics import BLEU, CHRF

    pairs = list(zip(texts, references, strict=True))
    chinese = [is_chinese(each[0], len(units_of(each[0]))) for each in references]
    scores = {"chrf": corpus_score(CHRF(), pairs)}
    for name, tokens, wanted in (("bleu_en", "13a", False), ("bleu_zh", "zh", True)):
        chosen = [pair for pair, found in zip(pairs, chinese, strict=True) if found == wanted]
        if chosen:
            scores[name] = corpus_score(BLEU(tokenize=tokens), chosen)
    return scores


def corpus_score(metric: Any, pairs: Sequence[tuple[str, Sequence[str]]]) -> float:
    """The score of texts and their references, of which an item may have fewer than another."""
    texts, references = zip(*pairs, strict=True)
    return metric.corpus_score(texts, [*zip_longest(*references)]).score
