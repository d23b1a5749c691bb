"""Documents -> token ids, fast and exact: tiktoken's engine on the vocabulary and merges of
tokenizer.json.

The ids must be those of the library's tokenizer. Two rules ensure that, and a third checks it:

*   tiktoken merges any two neighbours whose bytes are a token, BPE only listed pairs. What lies
    within a final token was merged without regard to anything outside, just like that token alone.
    If tiktoken builds each token of a text, alone, from listed pairs only, then it has merged the
    text by listed pairs only, the first of them each time, as BPE does. All other tokens are known
    beforehand (`unsure`), and the library encodes the documents in which one occurs.
*   Added tokens that are not special (such as "<think>") are cut out of a text before it is split.
    The library also encodes the documents that contain the text of one.
*   In every run the library encodes a sample for comparison. (benchmarks/data_preparation.py
    --unicode tests on all of Unicode that both split text alike.)

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

END = "\U0010ffff end of document \U0010ffff"  # becomes EOS; U+10FFFF is not a character
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
FIRST_CHECKED = 100  # documents of a run that both engines encode, before one of each batch
CHECKED = 2**14  # characters of a document that are checked
# Options of BPE that neither tiktoken nor a GGUF file has
BEYOND_BYTES_AND_MERGES = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
BEYOND_BYTES_AND_MERGES += ("byte_fallback", "ignore_merges")


class WrongIdsError(Exception):
    """The fast engine returned other ids than the library."""


class DocumentEncoder:
    """Texts -> one flat array of their ids, each text followed by EOS.

    Can be called from several threads at once; the engines release Python's lock.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, fast: bool = True):
        self.library = text_encoder(tokenizer)
        self.cut = Cutter(self.library)
        self.eos_token_id = tokenizer.eos_token_id
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        self.engine = self.unsure = self.added = None
        if fast:
            self.engine, self.unsure, self.added = fast_engine(self.library, self.eos_token_id)
        self.unchecked = FIRST_CHECKED

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Raises BadRowError for a text that `cut` refuses, and WrongIdsError if the engines
        differ: start again with `fast=False`."""
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
        except ValueError:  # its stack is too small to split very long white space
            return self._by_library(texts)
        ends = np.flatnonzero(ids == self.eos_token_id)
        if len(ends) != len(texts):  # a text contains the mark itself
            return self._by_library(texts)

        # The documents that the library has to encode
        doubtful = np.unique(np.searchsorted(ends, np.flatnonzero(self.unsure[ids])))
        if self.added and self.added.search(text):
            added = [index for index, each in enumerate(texts) if self.added.search(each)]
            doubtful = np.union1d(doubtful, added).astype(int)

        # A sample of the others is checked
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
    """tiktoken's engine; for each id, whether the library has to decide; a pattern of the added
    tokens' text.

    All are None where tiktoken would not do what tokenizer.json says: for anything but byte-level
    BPE whose merges are numbered in their order, without normalizer and dropout.
    """
    none = (None, None, None)
    state = json.loads(library.to_str())
    bpe, pattern = state["model"], split_pattern(state["pre_tokenizer"])
    if pattern is None or bpe["type"] != "BPE" or state["normalizer"]:
        return none
    if any(bpe.get(option) for option in BEYOND_BYTES_AND_MERGES):
        return none

    def to_bytes(token: str) -> bytes:
        return bytes(BYTE_OF[character] for character in token)

    added = {token["content"]: token["special"] for token in state["added_tokens"]}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"])
    try:
        vocabulary = {to_bytes(token): i for token, i in bpe["vocab"].items() if token not in added}
        merges = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
        results = [vocabulary[left + right] for left, right in merges]
    except KeyError:  # tokens that are not bytes, or merges into an added token
        return none
    every_byte = all(bytes([value]) in vocabulary for value in range(256))
    if not every_byte or any(a >= b for a, b in pairwise(results)):
        return none

    special = {END: eos_token_id}
    engine = tiktoken.Encoding(
        "minimind", pat_str=pattern, mergeable_ranks=vocabulary, special_tokens=special
    )
    listed = set(merges)
    unsure = np.ones(max(*vocabulary.values(), eos_token_id) + 1, dtype=bool)
    unsure[eos_token_id] = False
    for token, index in vocabulary.items():
        unsure[index] = not is_built_from(token, vocabulary, listed)
    literal = [re.escape(text) for text, is_special in added.items() if not is_special]
    return engine, unsure, re.compile("|".join(literal)) if literal else None


def is_built_from(
    token: bytes, vocabulary: dict[bytes, int], listed: set[tuple[bytes, bytes]]
) -> bool:
    """Whether repeatedly merging the first of all mergeable neighbours in `token` ends in one token
    and uses listed pairs only."""
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
