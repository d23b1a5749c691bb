"""Minimal pairs: does the model find the good sentence more probable than the bad one?

The layout of BLiMP (Warstadt et al., 2020, arXiv 1912.00582) and ZhoBLiMP (Liu et al., 2024, arXiv
2411.06096).
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import check_text, shown
from minimind.data.columns import Columns
from minimind.data.files import read_rows
from minimind.data.sources import expand
from minimind.evaluation.scoring import Request, Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.score_card.report import VERDICTS
from minimind.score_card.tasks import TaskResult
from minimind.tokenizer import text_encoder

ALL = "all"  # the group of all pairs
TIE = 1e-6  # nats; the same numbers added in another order differ by less


class MinimalPair(NamedTuple):
    """Two texts that differ in one property, and the names that pairs are grouped by, if they have
    them."""

    key: str
    good: str
    bad: str
    paradigm: str | None
    phenomenon: str | None
    file: str


def read_pairs(files: Sequence[str], on_bad_rows: str | None = None) -> list[MinimalPair]:
    """Rows with `sentence_good` and `sentence_bad`.

    `UID` or `paradigm` is the paradigm, or else the file's name where one of the `files` is a
    directory; `linguistics_term` or `phenomenon` is the phenomenon, `pairID` the number in the
    paradigm.

    Raises:
        UserError: see `files.read_rows`; a text is missing, the two are equal, or a pair occurs
            twice.
    """
    pairs: dict[str, MinimalPair] = {}
    for given in files:
        found = expand([given])
        for file in found:
            stem = Path(str(file)).stem if len(found) > 1 else None
            convert = partial(to_pair, pairs, str(given), stem)
            for row in read_rows([file], on_bad_rows, convert, columns=Columns()):
                pairs[row.data.key] = row.data
    return list(pairs.values())


def to_pair(
    earlier: Collection[str], file: str, paradigm: str | None, row: Mapping[str, Any]
) -> MinimalPair:
    """The pair of a row, whose key is none of the `earlier` ones; raises BadRowError."""
    texts = []
    for name in ("sentence_good", "sentence_bad"):
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            found = shown(text) if name in row else "nothing"
            raise BadRowError(f"{name}: found {found}, expected a text")
        check_text(text, name)
        texts.append(text)
    if texts[0] == texts[1]:
        raise BadRowError(
            "found the same text as sentence_good and sentence_bad, expected two that differ"
        )
    paradigm = row.get("uid") or row.get("paradigm") or paradigm
    phenomenon = row.get("linguistics_term") or row.get("phenomenon")
    if paradigm == ALL:
        raise BadRowError("UID: found 'all', which stands for all pairs")
    number = row.get("pairid")
    key = f"{paradigm or file}/{len(earlier) if number is None else number}"
    if key in earlier:
        raise BadRowError(f"found the pair {key} again, expected each once")
    names = (name and str(name) for name in (paradigm, phenomenon))
    return MinimalPair(key, *texts, *names, file)


class PairsTask:
    """Shares of pairs won by the good sentence, ties half: by the `sum` of the log-probabilities of
    the tokens, which stands for the task, and by their `mean`. Each sentence follows the end token,
    as a document in training.

    The sum favours the shorter sentence, the mean a longer one. So each group of pairs also has
    `same_length`, its share of pairs whose sentences have equally many tokens, and `good_longer`,
    the share of its other pairs whose good sentence has more.
    """

    name = "pairs"

    def __init__(self, pairs: Sequence[MinimalPair]):
        self.pairs = list(pairs)

    def groups(self) -> dict[tuple[str, str], list[str]]:
        """(section of the card's JSON, name) -> the keys of the pairs in this group, all of them
        first."""
        groups = {("pairs", ALL): [pair.key for pair in self.pairs]}
        fields = {"phenomena": "phenomenon", "pairs": "paradigm"}
        if len({pair.file for pair in self.pairs}) > 1:
            fields = {"pair_files": "file", **fields}
        for section, field in fields.items():
            for pair in self.pairs:
                if name := getattr(pair, field):
                    groups.setdefault((section, name), []).append(pair.key)
        return groups

    def run(self, subject: Subject) -> TaskResult:
        """See `Task`."""
        encode = text_encoder(subject.tokenizer)
        context = (subject.tokenizer.eos_token_id,)
        texts = [text for pair in self.pairs for text in (pair.good, pair.bad)]
        encoded = encode.encode_batch_fast(texts, add_special_tokens=False)
        requests = [Request(context, tuple(each.ids)) for each in encoded]
        scores = iter(subject.log_probabilities(requests, "minimal pairs"))

        # Who wins each pair, and how much longer its good sentence is
        wins: dict[str, dict[str, float]] = {"sum": {}, "mean": {}}
        longer = {}
        for pair in self.pairs:
            good, bad = next(scores), next(scores)
            wins["sum"][pair.key] = won(good.sum(), bad.sum())
            wins["mean"][pair.key] = won(good.mean(), bad.mean())
            longer[pair.key] = len(good) - len(bad)

        measures, sections = {}, defaultdict(dict)
        for (section, name), keys in self.groups().items():
            found = {
                form: Measure({key: wins[form][key] for key in keys}, chance=0.5) for form in wins
            }
            measures |= {f"{section}/{name}/{form}": found[form] for form in found}
            sections[section][name] = describe(found) | lengths([longer[key] for key in keys])
        return TaskResult(measures, sections.pop("pairs"), dict(sections))

    def item_texts(self) -> Mapping[str, Sequence[str]]:
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
    """1 if the good text scores higher, 0 if the bad one does, 1/2 for a tie, up to rounding."""
    return (1 + (good > bad + TIE) - (good < bad - TIE)) / 2


def describe(measures: Mapping[str, Measure]) -> dict:
    """The scores of a group by `sum` and by `mean` with their intervals, and the verdict on the
    sum in words."""
    found = {form: estimate(measure) for form, measure in measures.items()}
    scores = {form: round(each["score"], 6) for form, each in found.items()}
    intervals = {
        f"{form}_interval": [round(end, 6) for end in each["interval"]]
        for form, each in found.items()
    }
    one = found["sum"]
    verdict = VERDICTS[one["above_chance"]]
    return {"n": one["n"], **scores, **intervals, "chance": one["chance"], "verdict": verdict}


def lengths(differences: Sequence[int]) -> dict[str, float]:
    """How many tokens more the good sentence has, of each pair -> `same_length`, `good_longer`."""
    unequal = [difference for difference in differences if difference]
    shares = {"same_length": round(1 - len(unequal) / len(differences), 6)}
    if unequal:
        shares["good_longer"] = round(sum(each > 0 for each in unequal) / len(unequal), 6)
    return shares
