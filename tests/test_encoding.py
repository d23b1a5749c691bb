import random

import numpy as np
import pytest
from conftest import CHINESE, ENGLISH
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minimind.tokenizer import (
    SPLIT_PATTERN,
    encoding,
    load_tokenizer,
    text_encoder,
    train_tokenizer,
)
from minimind.tokenizer.encoding import DocumentEncoder, WrongIdsError, fast_engine

ALPHABET = [
    *"aab  \n\t'.,1!<|>_",
    "中",
    "文",
    "，",
    "é",
    "🙂",
    "\u0301",
    "ſ",
    "\r",
    "<think>",
    "<|im_end|>",
    "'ll",
    "字",
]


def random_texts(count=400, seed=0):
    generator = random.Random(seed)
    texts = ["".join(generator.choices(ALPHABET, k=generator.randrange(60))) for _ in range(count)]
    return [*texts, "", ENGLISH, CHINESE, ENGLISH * 20, "a" * 500, "中" * 300]


def by_library(tokenizer, texts):
    encoder = text_encoder(tokenizer)
    return [
        i
        for text in texts
        for i in (*encoder.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id)
    ]


def gpt2_like(base):
    """`base` with the splitting rule of GPT-2."""
    state = Tokenizer.from_str(base.backend_tokenizer.to_str())
    state.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=state, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def with_added_token(base):
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base.backend_tokenizer.to_str())
    )
    other.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    other.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return other


@pytest.fixture(scope="module", params=["default", "trained", "gpt-2", "added token"])
def any_tokenizer(request, tokenizer):
    default = load_tokenizer()
    return {
        "default": lambda: default,
        "trained": lambda: tokenizer,
        "gpt-2": lambda: gpt2_like(default),
        "added token": lambda: with_added_token(default),
    }[request.param]()


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_the_ids_are_those_of_the_library(any_tokenizer, at_a_time):
    texts = random_texts()
    encoder = DocumentEncoder(any_tokenizer)
    assert encoder.engine is not None
    ids = np.concatenate(
        [encoder(texts[i : i + at_a_time]) for i in range(0, len(texts), at_a_time)]
    )
    assert ids.tolist() == by_library(any_tokenizer, texts)


def test_the_ids_do_not_depend_on_the_sample(any_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "FIRST_CHECKED", 0)
    texts = random_texts(seed=1)
    assert DocumentEncoder(any_tokenizer)(texts).tolist() == by_library(any_tokenizer, texts)


def unlisted_merge():
    """A vocabulary in which "abc" is a token of "a" and "bc", while "ab" and "c" may not be merged
    to it."""
    letters = list(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i
        for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters])
    }
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("d", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    state = Tokenizer(models.BPE(vocabulary, merges))
    state.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=state, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def test_a_token_that_tiktoken_merges_from_an_unlisted_pair_is_asked_of_the_library():
    tokenizer = unlisted_merge()
    engine, unsure, _ = fast_engine(text_encoder(tokenizer), tokenizer.eos_token_id)
    token = tokenizer.convert_tokens_to_ids("abc")
    assert engine.encode_ordinary("abc") == [token]  # and the library says "ab" "c"
    assert unsure[token]
    texts = ["abc de", "de", "x abc", "ab c"]
    assert DocumentEncoder(tokenizer)(texts).tolist() == by_library(tokenizer, texts)
    assert token not in by_library(tokenizer, texts)


def test_a_wrong_engine_is_noticed(tokenizer):
    encoder = DocumentEncoder(tokenizer)
    wrong, _, _ = fast_engine(
        text_encoder(train_tokenizer([CHINESE], vocab_size=270)), tokenizer.eos_token_id
    )
    encoder.engine = wrong
    with pytest.raises(WrongIdsError, match="differently"):
        encoder([ENGLISH])


@pytest.mark.parametrize("kind", ["normalizer", "prefix space", "other split"])
def test_what_the_fast_engine_cannot_say_is_left_to_the_library(kind, tokenizer):
    from tokenizers import normalizers

    state = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if kind == "normalizer":
        state.normalizer = normalizers.NFKC()
    elif kind == "prefix space":
        state.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        state.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    other = PreTrainedTokenizerFast(
        tokenizer_object=state, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    encoder = DocumentEncoder(other)
    assert encoder.engine is None
    assert encoder(["ﬁne 中文", ""]).tolist() == by_library(other, ["ﬁne 中文", ""])


def test_the_mark_between_documents_is_harmless_inside_one(tokenizer):
    texts = [f"a{encoding.END}b", "c"]
    assert DocumentEncoder(tokenizer)(texts).tolist() == by_library(tokenizer, texts)
