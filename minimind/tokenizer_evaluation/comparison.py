"""What tokenizers make of texts: how many tokens, of which kinds, and whether the text comes back.

    bytes per token     UTF-8 bytes / tokens: the more, the less there is to train and generate
    fertility, en       tokens with a Latin letter in the English texts / their words
    fertility, zh       tokens with a Chinese character or a piece of one in the Chinese texts /
                        their Chinese characters
    pieces              tokens that are no complete characters; "byte tokens" are one byte of one

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
    *("Chinese", "English", "mixed", "other letters", "digits"),
    *("punctuation", "white space", "piece", "special"),
)


class Candidate:
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
        self.added = self.tokenizer.get_added_tokens_decoder()
        self.special = {index for index, token in self.added.items() if token.special}
        self.kinds = np.array([self._kind(index) for index in range(len(self.bytes))])

    def encode(self, texts: Sequence[str]) -> list[list[int] | array]:
        """The ids of texts, nothing added; raises BadRowError for a text that `cut` refuses."""
        short = [text for text in texts if len(text) <= PIECE]
        encoded = iter(self.tokenizer.encode_batch_fast(short, add_special_tokens=False))
        return [
            next(encoded).ids if len(text) <= PIECE else self._encode_long(text) for text in texts
        ]

    def _encode_long(self, text: str) -> array:
        ids = array("i")
        for piece in self.cut(text):
            ids.extend(self.tokenizer.encode(piece, add_special_tokens=False).ids)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, nothing left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def facts(self) -> dict:
        """Vocabulary, control tokens, tokens that any text can call by name, llama.cpp's rule."""
        return {
            "directory": self.name,
            "vocab_size": self.tokenizer.get_vocab_size(),
            "control_tokens": [self.added[index].content for index in sorted(self.special)],
            "added_tokens": [
                self.added[index].content for index in sorted(set(self.added) - self.special)
            ],
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
        if chinese or english:
            return "mixed" if chinese and english else "Chinese" if chinese else "English"
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

    def __init__(self, candidates: Sequence[Candidate]):
        self.candidates = candidates
        self.groups: dict[tuple[str, str], np.ndarray] = defaultdict(self._zeros)
        self.uses = [np.zeros((len(LANGUAGES), len(each.bytes)), np.int64) for each in candidates]
        self.words = self.han = 0  # words of the English, Chinese characters of the Chinese texts

    def _zeros(self) -> np.ndarray:
        return np.zeros(3 + len(self.candidates), np.int64)

    def add(self, texts: Sequence[Text]) -> None:
        """Count a batch."""
        counts = [script(text.text) for text in texts]
        languages = np.array([LANGUAGES.index(each.language) for each in counts])
        self.words += sum(each.words for each in counts if each.language == "en")
        self.han += sum(each.han for each in counts if each.language == "zh")
        encoded = [each.encode([text.text for text in texts]) for each in self.candidates]
        for (text, domain), each, *ids in zip(texts, counts, *encoded, strict=True):
            sizes = [1, len(text), len(text.encode()), *map(len, ids)]
            self.groups[each.language, domain] += sizes
        for uses, lists in zip(self.uses, encoded, strict=True):
            rows = np.repeat(languages, list(map(len, lists)))
            ids = np.concatenate([np.array(ids, np.int64) for ids in lists])
            flat = np.bincount(rows * uses.shape[1] + ids, minlength=uses.size)
            uses += flat.reshape(uses.shape)

    def sizes(self, part: int | None = None) -> dict[str, np.ndarray]:
        """Sums by language (`part` 0), by domain (1), or of all; the largest first."""
        sums: dict[str, np.ndarray] = defaultdict(self._zeros)
        for key, counts in self.groups.items():
            sums["all" if part is None else key[part]] += counts
        return dict(sorted(sums.items(), key=lambda item: -item[1][2]))


def measure(directories: Sequence[str | Path], texts: Iterable[Text]) -> Measurement:
    """Tokenise `texts` with the tokenizers in some directories."""
    measurement = Measurement([Candidate(directory) for directory in directories])
    for batch in batches(texts, lambda text: len(text.text), BATCH):
        measurement.add(batch)
    return measurement


def check_of(directories: Iterable[str | Path]) -> Callable[[str], None]:
    """A function that raises BadRowError for a text that one of the tokenizers cannot encode; see
    `Cutter.check`."""
    cutters = [Candidate(directory).cut for directory in directories]

    def check(text: str) -> None:
        for cut in cutters:
            cut.check(text)

    return check


def evaluate(directory: str | Path, texts: Iterable[Text]) -> dict:
    """Evaluate one tokenizer on `texts`; the keys are those that `minimind tokenizer evaluate
    --json` prints."""
    measurement = measure([directory], texts)
    return {
        "tokenizer": measurement.candidates[0].facts(),
        **_of_all_parts(measurement, _figures),
        **_vocabulary(measurement, 0),
        "round_trip": round_trip(measurement.candidates[0]),
    }


def compare(directories: Sequence[str | Path], texts: Iterable[Text]) -> dict:
    """Evaluate several tokenizers side by side on `texts`.

    `total`, `languages` and `domains` hold documents, characters, bytes, and a list with an entry
    for each tokenizer of `tokens`, of `bytes_per_token` and of `ratio`: the tokens of the first /
    its tokens. `winner` is the directory of the one with the fewest tokens, None where several have
    them.
    """
    measurement = measure(directories, texts)
    tokenizers = [
        {**each.facts(), **_vocabulary(measurement, index), "round_trip": round_trip(each)}
        for index, each in enumerate(measurement.candidates)
    ]
    parts = _of_all_parts(measurement, lambda sizes: _contest(sizes, directories))
    return {"tokenizers": tokenizers, **parts}


def _of_all_parts(measurement: Measurement, figures: Callable[[np.ndarray], dict]) -> dict:
    """The figures of all texts, of each language and of each domain."""
    return {
        "total": figures(measurement.sizes()["all"]),
        "languages": {name: figures(sizes) for name, sizes in measurement.sizes(0).items()},
        "domains": {name: figures(sizes) for name, sizes in measurement.sizes(1).items()},
    }


def _ratio(part: int, total: int) -> float | None:
    """None where a tokenizer without an unknown token made nothing of a text."""
    return part / total if total else None


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


def _vocabulary(measurement: Measurement, index: int) -> dict:
    """Fertility, and how the vocabulary is used."""
    candidate, uses = measurement.candidates[index], measurement.uses[index]
    pieces, kinds, total = candidate.bytes, candidate.kinds, uses.sum(axis=0)
    text, zh, en = int(total.sum()), *(uses[LANGUAGES.index(name)] for name in ("zh", "en"))
    sizes = np.array([0 if piece is None else len(piece) for piece in pieces])
    usable = np.array(
        [piece is not None and i not in candidate.special for i, piece in enumerate(pieces)]
    )
    used, frequent = total[usable], np.sort(total)[::-1].cumsum()
    longest = sorted(np.flatnonzero(usable), key=lambda i: (-sizes[i], i))

    def tokens(counts: np.ndarray, *names: str) -> int:
        return int(counts[np.isin(kinds, names)].sum())

    return {
        "fertility": {
            "en": _ratio(tokens(en, "English", "mixed"), measurement.words),
            "zh": _ratio(tokens(zh, "Chinese", "mixed", "piece"), measurement.han),
        },
        "vocabulary": {
            "tokens": int(usable.sum()),
            "used": float((used > 0).mean()),
            "used_fewer_than": {str(times): float((used < times).mean()) for times in RARE},
            "tokens_that_cover": {
                str(share): int(np.searchsorted(frequent, share * text) + 1) for share in COVERAGES
            },
        },
        "pieces": _ratio(tokens(total, "piece"), text),
        "byte_tokens": _ratio(int(total[(sizes == 1) & (kinds == "piece")].sum()), text),
        "kinds": {
            kind: {"tokens": int((kinds == kind).sum()), "text": _ratio(tokens(total, kind), text)}
            for kind in KINDS
            if (kinds == kind).any()
        },
        "longest": [
            {
                "token": pieces[i].decode(errors="replace"),
                "bytes": len(pieces[i]),
                "uses": int(total[i]),
            }
            for i in longest[:LONGEST]
        ],
    }


def round_trip(candidate: Candidate) -> dict:
    """Encode and decode the probes: bytes and tokens of each group, and each text that did not come
    back exactly."""
    groups, changed = {}, []
    for name, texts in PROBES.items():
        encoded = candidate.encode(texts)
        pairs = list(zip(texts, map(candidate.decode, encoded), strict=True))
        lost = [{"probe": name, "text": text, "back": back} for text, back in pairs if text != back]
        changed += lost
        groups[name] = {
            "texts": len(texts),
            "exact": len(texts) - len(lost),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": sum(map(len, encoded)),
            "control_tokens": sum(index in candidate.special for ids in encoded for index in ids),
        }
    return {"exact": not changed, "probes": groups, "changed": changed}
