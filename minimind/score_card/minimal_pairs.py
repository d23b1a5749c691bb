"""Minimal pairs: does the model find the good sentence more probable than the bad one?

The layout of BLiMP (Warstadt et al., 2020, arXiv 1912.00582) and ZhoBLiMP.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.files import read_rows
from minimind.evaluation.scoring import Request, Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.score_card.tasks import Result
from minimind.tokenizer import text_encoder


class MinimalPair(NamedTuple):
    """Two texts that differ in one property, and the names that pairs are grouped by."""

    key: str
    good: str
    bad: str
    paradigm: str
    phenomenon: str


def read_pairs(files: Sequence[str], on_bad_rows: str | None = None) -> list[MinimalPair]:
    """Rows with `sentence_good` and `sentence_bad`; `UID` is the paradigm, `linguistics_term` the
    phenomenon, `pairID` the number in the paradigm.

    Raises:
        UserError: see `files.read_rows`; a text is missing, the two are equal, or a pair occurs
            twice.
    """
    keys: set[str] = set()

    def convert(row: Mapping[str, Any]) -> MinimalPair:
        texts = []
        for name in ("sentence_good", "sentence_bad"):
            text = row.get(name)
            if not isinstance(text, str) or not text.strip():
                raise BadRowError(f"found {text!r} as {name}, expected a text")
            texts.append(text)
        if texts[0] == texts[1]:
            raise BadRowError("found the same text twice, expected a good and a bad sentence")
        paradigm = str(row.get("UID") or "all pairs")
        key = f"{paradigm}/{row.get('pairID', len(keys))}"
        if key in keys:
            raise BadRowError(f"found {key} twice, expected one pair of a name")
        keys.add(key)
        return MinimalPair(key, *texts, paradigm, str(row.get("linguistics_term") or paradigm))

    return [row.data for row in read_rows(files, BadRows(on_bad_rows), convert, columns=Columns())]


class PairsTask:
    """Shares of pairs won by the good sentence, ties half: by the `sum` of the log-probabilities of
    the tokens and by their `mean`. Each sentence follows the end token, as a document in
    training."""

    name = "pairs"

    def __init__(self, pairs: Sequence[MinimalPair]):
        self.pairs = pairs

    def run(self, subject: Subject) -> Result:
        """See `Task`."""
        encode = text_encoder(subject.tokenizer)
        context = (subject.tokenizer.eos_token_id,)
        texts = [text for pair in self.pairs for text in (pair.good, pair.bad)]
        encoded = encode.encode_batch_fast(texts, add_special_tokens=False)
        requests = [Request(context, tuple(each.ids)) for each in encoded]
        scores = iter(subject.log_probabilities(requests, "minimal pairs"))

        # Who wins each pair
        groups: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for pair in self.pairs:
            good, bad = next(scores), next(scores)
            for name in ("all", pair.paradigm):
                groups[name]["sum"][pair.key] = won(good.sum(), bad.sum())
                groups[name]["mean"][pair.key] = won(good.mean(), bad.mean())

        section, measures = {}, {}
        for group, wins in groups.items():
            section[group] = {"n": len(wins["sum"])}
            for form in ("sum", "mean"):
                measure = Measure(wins[form], chance=0.5)
                measures[f"pairs/{group}/{form}"] = measure
                found = estimate(measure)
                section[group] |= {form: found["score"], f"{form}_interval": found["interval"]}
        return Result(measures, section)

    def texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {pair.key: (pair.good, pair.bad) for pair in self.pairs}

    def shuffled(self, generator: np.random.Generator) -> "PairsTask":
        """See `Task`: which sentence is the good one is drawn anew."""
        swaps = generator.random(len(self.pairs)) < 0.5
        pairs = zip(self.pairs, swaps, strict=True)
        return PairsTask(
            [pair._replace(good=pair.bad, bad=pair.good) if swap else pair for pair, swap in pairs]
        )


def won(good: float, bad: float) -> float:
    """1 if the good text scores higher, 0 if the bad one does, 1/2 for a tie."""
    return (1 + (good > bad) - (good < bad)) / 2
