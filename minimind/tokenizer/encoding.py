"""Documents -> token ids, fast and exact: tiktoken's engine on the vocabulary and merges of
tokenizer.json.

The ids are those of the library's tokenizer, which stays the only truth. Two things make them so,
and a third watches:

*   tiktoken merges any two neighbours whose bytes are a token, BPE only the listed pairs. What stands between the
    borders of a final token was merged without regard to anything outside, hence as that token alone would be. So if
    tiktoken builds each token of a text, alone, from listed pairs only, it has merged that text by listed pairs only,
    each time the first of them: what BPE does. The other tokens are known beforehand (`unsure`), and a document that
    holds one is encoded by the library.
*   Tokens that are added but not special ("<think>", say) are cut out of any text before it is split: documents that
    hold the text of one go to the library too.
*   In every run the library encodes a sample beside it. (That both split text alike, whatever the character, is tested
    on all of Unicode by benchmarks/data_preparation.py --unicode.)

Both encode long texts in pieces (cutting.py).
"""

import json
import re
from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
import tiktoken
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minimind.tokenizer.cutting import PIECE, Cutter
from minimind.tokenizer.loading import BYTE_OF, text_encoder

END = "\U0010ffff end of document \U0010ffff"  # becomes EOS; U+10FFFF is no character
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FIRST_CHECKED = 100  # documents of a run that both engines encode, and then one of each batch
CHECKED = 2**14  # characters of a document that are checked


class WrongIdsError(Exception):
    """The fast engine gave other ids than the library."""


class DocumentEncoder:
    """Texts -> one flat array of their ids, each text followed by EOS.

    Can be called from several threads at once; the engines leave Python's lock to the others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fast: bool = True):
        self.library = text_encoder(tokenizer)
        self.cut = Cutter(self.library)
        self.eos_token_id = tokenizer.eos_token_id
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        self.engine, self.unsure, self.added = (
            fast_engine(self.library, self.eos_token_id) if fast else (None,) * 3
        )
        self.unchecked = FIRST_CHECKED

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Raises BadRowError for a text that `cut` refuses, and WrongIdsError where the engines
        differ: begin again with `fast=False`."""
        parts = []
        for is_long, group in groupby(texts, lambda text: len(text) > PIECE):
            if is_long:
                for text in group:
                    parts += [self._encode([piece])[:-1] for piece in self.cut(text)]
                    parts.append(np.array([self.eos_token_id], dtype=self.dtype))
            else:
                parts.append(self._encode(list(group)))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _encode(self, texts: list[str]) -> np.ndarray:
        if self.engine is None:
            return self._by_library(texts)
        text = END.join(texts) + END
        try:
            ids = self.engine.encode_to_numpy(text, allowed_special={END})
        except ValueError:  # its splitting has too small a stack for very long white space
            return self._by_library(texts)
        ends = np.flatnonzero(ids == self.eos_token_id)
        if len(ends) != len(texts):  # a text that holds the mark itself
            return self._by_library(texts)
        doubtful = np.unique(np.searchsorted(ends, np.flatnonzero(self.unsure[ids])))
        if self.added and self.added.search(text):
            found = [index for index, each in enumerate(texts) if self.added.search(each)]
            doubtful = np.union1d(doubtful, found).astype(int)
        checked = range(min(max(self.unchecked, 1), len(texts)))
        self.unchecked -= len(checked)
        parts = np.split(ids, ends[:-1] + 1)
        for index in checked:
            if index not in doubtful:
                self._check(texts[index], parts[index])
        if len(doubtful):
            for index in doubtful:
                parts[index] = self._by_library([texts[index]])
            ids = np.concatenate(parts)
        return ids.astype(self.dtype)

    def _check(self, text: str, ids: np.ndarray) -> None:
        """Compare the ids of a text, or of its beginning, with the library's."""
        if len(text) > CHECKED:
            text = text[:CHECKED]
            ids = self.engine.encode_to_numpy(text + END, allowed_special={END})
            if self.unsure[ids].any():  # in a word that was cut
                return
        if not np.array_equal(ids, self._by_library([text])):
            raise WrongIdsError(f"tiktoken and tokenizers encode {text[:60]!r} differently")

    def _by_library(self, texts: Sequence[str]) -> np.ndarray:
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [token for encoding in encodings for token in (*encoding.ids, self.eos_token_id)]
        return np.asarray(ids, dtype=self.dtype)


def fast_engine(
    library: Tokenizer, eos_token_id: int
) -> tuple[tiktoken.Encoding | None, np.ndarray | None, re.Pattern | None]:
    """tiktoken's engine, by id whether the library has to be asked about a token, and the added
    tokens' text.

    The engine is None where it would not do what tokenizer.json says: for anything but byte-level
    BPE whose merges are numbered in their order, without normalizer and dropout.
    """
    state = json.loads(library.to_str())
    bpe, pattern = state["model"], split_pattern(state["pre_tokenizer"])
    beyond = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    if (
        pattern is None
        or bpe["type"] != "BPE"
        or state["normalizer"]
        or any(bpe.get(key) for key in beyond)
    ):
        return None, None, None
    added = {token["content"] for token in state["added_tokens"]}
    try:
        vocabulary = {
            bytes(map(BYTE_OF.__getitem__, t)): i for t, i in bpe["vocab"].items() if t not in added
        }
        merges = [
            tuple(bytes(map(BYTE_OF.__getitem__, part)) for part in _pair(merge))
            for merge in bpe["merges"]
        ]
        merged = [vocabulary[left + right] for left, right in merges]
    except KeyError:  # tokens that are no bytes, or merges into an added token
        return None, None, None
    every_byte = all(bytes([value]) in vocabulary for value in range(256))
    if not every_byte or any(a >= b for a, b in pairwise(merged)):
        return None, None, None
    engine = tiktoken.Encoding(
        "minimind", pat_str=pattern, mergeable_ranks=vocabulary, special_tokens={END: eos_token_id}
    )
    listed = set(merges)
    unsure = np.ones(max(*vocabulary.values(), eos_token_id) + 1, dtype=bool)
    unsure[eos_token_id] = False
    for token, index in vocabulary.items():
        unsure[index] = not built_from(token, vocabulary, listed)
    literal = [
        re.escape(token["content"]) for token in state["added_tokens"] if not token["special"]
    ]
    return engine, unsure, re.compile("|".join(literal)) if literal else None


def _pair(merge: str | list[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def built_from(
    token: bytes, vocabulary: dict[bytes, int], listed: set[tuple[bytes, bytes]]
) -> bool:
    """Whether merging the first of all mergeable neighbours in `token`, again and again, ends in
    one token and uses listed pairs only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        ranks = [vocabulary.get(a + b, len(vocabulary) + 10**9) for a, b in pairwise(parts)]
        first = ranks.index(min(ranks))
        if (parts[first], parts[first + 1]) not in listed:
            return False
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return True


def split_pattern(pre_tokenizer: dict | None) -> str | None:
    """The pattern of one split followed by byte-level characters; None for any other rule."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None
