"""Steps that remove rows for what they share with other rows: exact copies, near copies, texts of
evaluation sets.

Memory, kept in the main process for each row that stays (measured on 40,000 rows): exact_dedup
about 160 bytes, near_dedup about 2.6 kB with 128 values and 16 bands. Texts are not kept.
"""

import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import xxhash

from minimind.cleaning.extras import require
from minimind.cleaning.options import check_positive, check_share
from minimind.cleaning.steps import Dedup, Filter
from minimind.common.errors import UserError
from minimind.data.files import read_rows
from minimind.data.sources import expand
from minimind.data.units import is_chinese, units_of

NOT_WORD = re.compile(r"\W+")
SEED = 42  # of the permutations


class ExactIndex:
    """128-bit hash -> the number of the row it was first seen in."""

    def __init__(self):
        self.first: dict[int, int] = {}
        self.new: list[int] = []

    def find_or_add(self, key: int, number: int) -> int | None:
        """See `steps.Index`."""
        first = self.first.setdefault(key, number)
        if first == number:
            self.new.append(key)
            return None
        return first

    def take_new(self) -> dict[str, np.ndarray]:
        """Arrays `hashes` (rows, 16) of bytes and `numbers` (rows,)."""
        new, self.new = self.new, []
        hashes = b"".join(key.to_bytes(16, "little") for key in new)
        return {
            "hashes": np.frombuffer(hashes, np.uint8).reshape(-1, 16),
            "numbers": np.array([self.first[key] for key in new], np.int64),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        for digest, number in zip(arrays["hashes"], arrays["numbers"].tolist(), strict=True):
            self.first[int.from_bytes(digest.tobytes(), "little")] = number


@dataclass(frozen=True)
class ExactDedup(Dedup):
    """Rows whose text equals an earlier row's, but for letter case and whitespace (by xxh3_128)."""

    name: ClassVar[str] = "exact_dedup"

    def key(self, text: str) -> int:
        reduced = " ".join(unicodedata.normalize("NFC", text).casefold().split())
        return xxhash.xxh3_128_intdigest(reduced.encode())

    def index(self) -> ExactIndex:
        return ExactIndex()


class NearIndex:
    """MinHash signatures in rensa's LSH: rows that share a band are compared, and only similar ones
    count."""

    def __init__(self, threshold: float, num_perm: int, bands: int):
        self.rensa = require("rensa")
        self.threshold, self.num_perm = threshold, num_perm
        self.lsh = self.rensa.RMinHashLSH(threshold=threshold, num_perm=num_perm, num_bands=bands)
        self.signatures: dict[int, Any] = {}
        self.new: list[tuple[int, bytes]] = []

    def _add(self, signature: Any, number: int) -> None:
        self.lsh.insert(number, signature)
        self.signatures[number] = signature

    def _signature(self, state: bytes) -> Any:
        signature = self.rensa.RMinHash(self.num_perm, SEED)
        signature.__setstate__(state)
        return signature

    def find_or_add(self, key: bytes, number: int) -> int | None:
        """The most similar earlier row at or above the threshold, the earliest of equals; see
        `steps.Index`."""
        signature = self._signature(key)
        others = self.lsh.query(signature)
        similarities = [(signature.jaccard(self.signatures[other]), -other) for other in others]
        similarity, other = max(similarities, default=(0.0, 0))
        if similarity >= self.threshold:
            return -other
        self._add(signature, number)
        self.new.append((number, key))
        return None

    def take_new(self) -> dict[str, np.ndarray]:
        """Arrays `numbers` (rows,), `states` (bytes,) and `lengths` (rows,) of each row's part of
        the states."""
        new, self.new = self.new, []
        return {
            "numbers": np.array([number for number, _ in new], np.int64),
            "states": np.frombuffer(b"".join(state for _, state in new), np.uint8),
            "lengths": np.array([len(state) for _, state in new], np.int64),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        states = io.BytesIO(arrays["states"].tobytes())
        numbers, lengths = arrays["numbers"].tolist(), arrays["lengths"].tolist()
        for number, length in zip(numbers, lengths, strict=True):
            self._add(self._signature(states.read(length)), number)


@dataclass(frozen=True)
class NearDedup(Dedup):
    """Rows whose letters and digits are nearly those of an earlier row: the Jaccard similarity of
    their sets of character `ngram`-grams, estimated from `num_perm` MinHash values, is at least
    `threshold`.

    Candidates come from LSH with `bands` bands; a pair is compared only if one band agrees in full,
    which 16 bands of 8 values miss for 5 % of the pairs at 0.8, and for none in a million at 0.95
    (1 - (1 - s^8)^16).
    """

    name: ClassVar[str] = "near_dedup"
    packages: ClassVar[tuple[str, ...]] = ("rensa",)
    threshold: float = 0.8
    ngram: int = 5
    num_perm: int = 128
    bands: int = 16

    def __post_init__(self):
        check_share(self, "threshold")
        check_positive(self, "ngram", "num_perm", "bands")
        if self.num_perm % self.bands:
            raise ValueError(
                f"bands: found {self.bands}, expected a divisor of num_perm = {self.num_perm}"
            )

    def prepare(self) -> None:
        require("rensa")

    def shingles(self, text: str) -> list[str]:
        """The character n-grams of a text's letters and digits; of a shorter text, all of it as
        one."""
        reduced = NOT_WORD.sub("", text.casefold()) or text
        last = max(len(reduced) - self.ngram, 0)
        return [reduced[start : start + self.ngram] for start in range(last + 1)]

    def key(self, text: str) -> bytes:
        signature = require("rensa").RMinHash(self.num_perm, SEED)
        signature.update(self.shingles(text))
        return signature.__getstate__()

    def index(self) -> NearIndex:
        return NearIndex(self.threshold, self.num_perm, self.bands)


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, without the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


class NgramIndex:
    """The n-grams of evaluation texts, over lower-cased units, and the items they are from.

    N-grams are found by a rolling hash of their first `prefix` units and then compared in full, so
    no hash collision counts.
    """

    MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, prefix: int):
        self.prefix = prefix
        self.ids: dict[str, int] = {}
        self.items: dict[tuple[int, ...], list[Any]] = {}
        self.hashes, self.lengths = np.empty(0, np.uint64), []

    def add(self, units: list[str], n: int, item: Any = None, step: int = 1) -> None:
        """Remember every n-gram of the units, or those at every `step`; if there are fewer than n,
        all of them as one."""
        ids = [self.ids.setdefault(unit, len(self.ids) + 1) for unit in units]
        n = min(n, len(ids))
        for start in range(0, len(ids) - n + 1, step):
            self.items.setdefault(tuple(ids[start : start + n]), []).append(item)

    def freeze(self) -> None:
        """Call after the last `add`."""
        prefixes = np.array([ngram[: self.prefix] for ngram in self.items], np.uint64)
        self.hashes = np.unique(self._hash(prefixes.T)[0]) if len(prefixes) else self.hashes
        self.lengths = sorted({len(ngram) for ngram in self.items})

    def _hash(self, ids: np.ndarray) -> np.ndarray:
        """(units, ...) -> (units - prefix + 1, ...), one hash for each start."""
        count = max(len(ids) - self.prefix + 1, 0)
        keys = np.zeros((count, *ids.shape[1:]), np.uint64)
        for offset in range(self.prefix if count else 0):
            keys = keys * self.MULTIPLIER + ids[offset : offset + count]
            keys ^= keys >> np.uint64(29)
        return keys

    def find(self, units: list[str]) -> Iterator[tuple[int, int, list[Any]]]:
        """The n-grams in the text with these units: start, length, and the items they are from."""
        ids = [self.ids.get(unit, 0) for unit in units]
        keys = self._hash(np.array(ids, np.uint64))
        places = np.searchsorted(self.hashes, keys).clip(max=len(self.hashes) - 1)
        for start in np.flatnonzero(self.hashes[places] == keys).tolist():
            for length in self.lengths:
                items = self.items.get(tuple(ids[start : start + length]))
                if items and start + length <= len(ids):
                    yield start, length, items


@dataclass(frozen=True)
class Decontaminate(Filter):
    """Rows that share an n-gram with a text of the evaluation files in `against` (any strings of
    their rows).

    13 words as for GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C) and 20 Chinese
    characters, which are about 13 words. A shorter evaluation text is looked for in full from
    `min_words` words or `min_characters` characters on; still shorter ones (such as single answers)
    are not.
    """

    name: ClassVar[str] = "decontaminate"
    reads_all: ClassVar[bool] = True
    against: list[str] = field(default_factory=list)
    words: int = 13
    characters: int = 20
    min_words: int = 8
    min_characters: int = 12

    def __post_init__(self):
        if not self.against:
            raise ValueError("against: found no evaluation files, expected a list of at least one")
        check_positive(self, "words", "characters", "min_words", "min_characters")

    def files(self) -> list[str]:
        return [str(path) for path in expand(self.against)]

    def prepare(self) -> None:
        _ = self._index

    @cached_property
    def _index(self) -> NgramIndex:
        index = NgramIndex(min(self.words, self.characters, self.min_words, self.min_characters))
        for row in read_rows(self.against, "error"):
            for text in strings_in(row.data):
                units = units_of(text.casefold())
                shortest, n = self.min_words, self.words
                if is_chinese(text, len(units)):
                    shortest, n = self.min_characters, self.characters
                if len(units) >= shortest:
                    index.add(units, n)
        if not index.items:
            raise UserError(
                f"decontaminate: {', '.join(self.against)}: found no text of at least"
                f" {self.min_words} words or {self.min_characters} Chinese characters, expected"
                " evaluation texts. Check the files."
            )
        index.freeze()
        return index

    def reason(self, text: str) -> str | None:
        is_shared = any(self._index.find(units_of(text.casefold())))
        return "in an evaluation set" if is_shared else None
