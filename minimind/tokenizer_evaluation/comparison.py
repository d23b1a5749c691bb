"""What a tokenizer makes of a text: how many tokens, of which kinds, and whether the text comes
back.

    bytes per token     UTF-8 bytes of the texts / their tokens: the more, the less there is to train and to generate
    fertility, en       tokens with a Latin letter in the English texts / their words
    fertility, zh       tokens with a Chinese character or a piece of a character in the Chinese texts / their Chinese
                        characters
    pieces              tokens that are not whole characters; "byte" those of them that are one byte

A text is always only text: the name of a control token in it is tokenised as characters, as in
`text_encoder`.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minimind.common.errors import UserError
from minimind.data.batching import batches
from minimind.tokenizer.cutting import PIECE, Cutter
from minimind.tokenizer.loading import token_bytes, unreadable
from minimind.tokenizer.splitting import splitting_name
from minimind.tokenizer_evaluation.probes import PROBES
from minimind.tokenizer_evaluation.texts import (
    HAN_RUN,
    LANGUAGES,
    OTHER_LETTERS,
    WORD,
    Text,
    script,
)

BATCH = 1000  # texts tokenised at a time
COVERAGES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
RARE = (1, 10, 100)
LONGEST = 10
KINDS = (
    "Chinese",
    "English",
    "mixed",
    "other letters",
    "digits",
    "punctuation",
    "white space",
    "piece",
    "special",
)


class Judged:
    """A tokenizer of any make, from a directory with `tokenizer.json`; it needs no chat template
    and no end token.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """

    def __init__(self, directory: str | Path):
        self.name = str(directory)
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{directory} holds no tokenizer: tokenizer.json was not found.")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise unreadable(Path(directory), error) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        self.cut = Cutter(self.tokenizer)
        self.bytes = token_bytes(self.tokenizer)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {index for index, token in added.items() if token.special}
        self.kinds = np.array([self._kind(index) for index in range(len(self.bytes))])

    def encode(self, texts: Sequence[str]) -> list[list[int] | array]:
        """Texts -> their ids, nothing added; raises BadRowError for one that `cut` refuses."""
        short = [text for text in texts if len(text) <= PIECE]
        found = iter(self.tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            next(found).ids if len(text) <= PIECE else self._encode_long(text) for text in texts
        ]

    def _encode_long(self, text: str) -> array:
        ids = array("i")
        for piece in self.cut(text):
            ids.extend(self.tokenizer.encode(piece, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, nothing left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def facts(self) -> dict:
        """What it is: vocabulary, control tokens, tokens that any text can call by name,
        llama.cpp's rule."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {
            "directory": self.name,
            "vocab_size": self.tokenizer.get_vocab_size(),
            "control_tokens": [added[index].content for index in sorted(self.special)],
            "added_tokens": [added[index].content for index in sorted(set(added) - self.special)],
            "pre_tokenizer": splitting_name(self.tokenizer),
        }

    def _kind(self, index: int) -> str:
        if index in self.special or self.bytes[index] is None:
            return "special"
        try:
            text = self.bytes[index].decode()
        except UnicodeDecodeError:
            return "piece"
        chinese, english = HAN_RUN.search(text), WORD.search(text)
        if chinese and english:
            return "mixed"
        if chinese or english:
            return "Chinese" if chinese else "English"
        if OTHER_LETTERS.search(text):
            return "other letters"
        if any(character.isdigit() for character in text):
            return "digits"
        return "white space" if text.isspace() else "punctuation"


class Measurement:
    """Counts of the texts, and of the tokens that each of some tokenizers makes of them.

    `groups` maps (language, domain) to an array of documents, characters, bytes and each
    tokenizer's tokens; `uses` has for each tokenizer an array (languages, ids) of how often it used
    each id.
    """

    def __init__(self, judged: Sequence[Judged]):
        self.judged = judged
        self.groups: dict[tuple[str, str], np.ndarray] = defaultdict(
            lambda: np.zeros(3 + len(judged), np.int64)
        )
        self.uses = [np.zeros((len(LANGUAGES), len(one.bytes)), np.int64) for one in judged]
        self.words = self.han = 0  # words of the English, Chinese characters of the Chinese texts

    def add(self, texts: Sequence[Text]) -> None:
        """Count a batch."""
        scripts = [script(text.text) for text in texts]
        languages = [found.language for found in scripts]
        self.words += sum(found.words for found in scripts if found.language == "en")
        self.han += sum(found.han for found in scripts if found.language == "zh")
        encoded = [one.encode([text.text for text in texts]) for one in self.judged]
        for index, (text, language) in enumerate(zip(texts, languages, strict=True)):
            sizes = [
                1,
                len(text.text),
                len(text.text.encode()),
                *(len(lists[index]) for lists in encoded),
            ]
            self.groups[language, text.domain] += sizes
        for uses, lists in zip(self.uses, encoded, strict=True):
            for row, language in enumerate(LANGUAGES):
                ids = [
                    np.array(found)
                    for found, other in zip(lists, languages, strict=True)
                    if other == language
                ]
                if any(map(len, ids)):
                    uses[row] += np.bincount(
                        np.concatenate(ids).astype(np.int64), minlength=uses.shape[1]
                    )

    def sizes(self, part: int | None = None) -> dict[str, np.ndarray]:
        """Sums by language (`part` 0), by domain (1), or of all; the largest first."""
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3 + len(self.judged), np.int64))
        for key, counts in self.groups.items():
            sums["all" if part is None else key[part]] += counts
        return dict(sorted(sums.items(), key=lambda item: -item[1][2]))


def measure(directories: Sequence[str | Path], texts: Iterable[Text]) -> Measurement:
    """Tokenise `texts` with the tokenizers in some directories."""
    measurement = Measurement([Judged(directory) for directory in directories])
    for batch in batches(texts, lambda text: len(text.text), BATCH):
        measurement.add(batch)
    return measurement


def check_of(directories: Iterable[str | Path]) -> Callable[[str], None]:
    """What raises BadRowError for a text that one of the tokenizers cannot encode; see
    `Cutter.check`."""
    cutters = [Judged(directory).cut for directory in directories]

    def check(text: str) -> None:
        for cut in cutters:
            cut.check(text)

    return check


def evaluate(directory: str | Path, texts: Iterable[Text]) -> dict:
    """Judge one tokenizer on `texts`; the keys are those that `minimind tokenizer evaluate --json`
    prints."""
    found = measure([directory], texts)
    return {
        "tokenizer": found.judged[0].facts(),
        "total": _figures(found.sizes()["all"]),
        "languages": {name: _figures(sizes) for name, sizes in found.sizes(0).items()},
        "domains": {name: _figures(sizes) for name, sizes in found.sizes(1).items()},
        **_judgement(found, 0),
        "round_trip": round_trip(found.judged[0]),
    }


def compare(directories: Sequence[str | Path], texts: Iterable[Text]) -> dict:
    """Judge several tokenizers side by side on `texts`.

    `total`, `languages` and `domains` hold documents, characters, bytes, and a list with an entry
    for each tokenizer of `tokens`, of `bytes_per_token` and of `ratio`: the tokens of the first /
    its tokens. `winner` is the directory of the one with the fewest tokens, None where several have
    them.
    """
    found = measure(directories, texts)
    tokenizers = []
    for index, judged in enumerate(found.judged):
        tokenizers.append(
            {**judged.facts(), **_judgement(found, index), "round_trip": round_trip(judged)}
        )
    return {
        "tokenizers": tokenizers,
        "total": _contest(found.sizes()["all"], directories),
        "languages": {name: _contest(sizes, directories) for name, sizes in found.sizes(0).items()},
        "domains": {name: _contest(sizes, directories) for name, sizes in found.sizes(1).items()},
    }


def _ratio(part: int, whole: int) -> float | None:
    """None where a tokenizer without an unknown token made nothing of a text."""
    return part / whole if whole else None


def _figures(sizes: np.ndarray) -> dict:
    documents, characters, size, tokens = map(int, sizes)
    return {
        "documents": documents,
        "characters": characters,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": _ratio(size, tokens),
        "characters_per_token": _ratio(characters, tokens),
        "tokens_per_document": _ratio(tokens, documents),
    }


def _contest(sizes: np.ndarray, directories: Sequence[str | Path]) -> dict:
    documents, characters, size, *tokens = map(int, sizes)
    best = [index for index, count in enumerate(tokens) if count == min(tokens)]
    return {
        "documents": documents,
        "characters": characters,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": [_ratio(size, count) for count in tokens],
        "ratio": [_ratio(tokens[0], count) for count in tokens],
        "winner": str(directories[best[0]]) if len(best) == 1 else None,
    }


def _judgement(found: Measurement, index: int) -> dict:
    """Fertility and what was used of the vocabulary."""
    judged, uses = found.judged[index], found.uses[index]
    total = uses.sum(axis=0)
    usable = np.array(
        [token is not None and i not in judged.special for i, token in enumerate(judged.bytes)]
    )
    frequent = np.sort(total)[::-1].cumsum()
    one_byte = np.array([token is not None and len(token) == 1 for token in judged.bytes]) & (
        judged.kinds == "piece"
    )
    text, zh, en = int(total.sum()), *(uses[LANGUAGES.index(name)] for name in ("zh", "en"))

    def tokens(counts: np.ndarray, *kinds: str) -> int:
        return int(counts[np.isin(judged.kinds, kinds)].sum())

    longest = sorted(np.flatnonzero(usable), key=lambda i: (-len(judged.bytes[i]), i))
    return {
        "fertility": {
            "en": _ratio(tokens(en, "English", "mixed"), found.words),
            "zh": _ratio(tokens(zh, "Chinese", "mixed", "piece"), found.han),
        },
        "vocabulary": {
            "tokens": int(usable.sum()),
            "used": float((total[usable] > 0).mean()),
            "used_fewer_than": {
                str(times): float((total[usable] < times).mean()) for times in RARE
            },
            "tokens_that_cover": {
                str(share): int(np.searchsorted(frequent, share * text) + 1) for share in COVERAGES
            },
        },
        "pieces": _ratio(tokens(total, "piece"), text),
        "byte_tokens": _ratio(int(total[one_byte].sum()), text),
        "kinds": {
            kind: {
                "tokens": int((judged.kinds == kind).sum()),
                "text": _ratio(tokens(total, kind), text),
            }
            for kind in KINDS
            if (judged.kinds == kind).any()
        },
        "longest": [
            {
                "token": judged.bytes[i].decode(errors="replace"),
                "bytes": len(judged.bytes[i]),
                "uses": int(total[i]),
            }
            for i in longest[:LONGEST]
        ],
    }


def round_trip(judged: Judged) -> dict:
    """Encode and decode the probes: bytes and tokens of each group, and each text that did not come
    back exactly."""
    groups, changed = {}, []
    for name, texts in PROBES.items():
        ids = judged.encode(texts)
        back = [judged.decode(found) for found in ids]
        changed += [
            {"probe": name, "text": text, "back": found}
            for text, found in zip(texts, back, strict=True)
            if found != text
        ]
        groups[name] = {
            "texts": len(texts),
            "exact": sum(text == found for text, found in zip(texts, back, strict=True)),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, ids)),
            "control_tokens": sum(index in judged.special for found in ids for index in found),
        }
    return {"exact": not changed, "probes": groups, "changed": changed}
