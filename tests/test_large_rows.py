"""Rows of any size: memory and time follow a row's length, or the row is refused by name."""

import random
import tracemalloc

import pytest
from conftest import CHINESE, ENGLISH
from pipeline import assistant, user
from test_encoding import by_library, gpt2_like, with_added_token
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated
from minimind.data.calls import split_results
from minimind.data.chat_arguments import ChatArguments, PreferenceArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.conversations import Conversation
from minimind.data.documents import load_blocks
from minimind.data.preference_rows import tokenize_preferences
from minimind.tokenizer import (
    cutting,
    load_tokenizer,
    text_encoder,
    tokenizer_hash,
    train_tokenizer,
)
from minimind.tokenizer.cutting import Cutter
from minimind.tokenizer.encoding import DocumentEncoder
from minimind.training.data_arguments import DataArguments

PIECE = 97  # characters, so that short texts are cut many times


def changed(base, **parts):
    state = Tokenizer.from_str(base.backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(state, name, part)
    return PreTrainedTokenizerFast(
        tokenizer_object=state, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def digits_then_words():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


TOKENIZERS = {
    "default": lambda base: base,
    "gpt-2": gpt2_like,
    "added token": with_added_token,
    "normalizer": lambda base: changed(base, normalizer=normalizers.NFC()),
    "digits": lambda base: changed(base, pre_tokenizer=digits_then_words()),
}


def long_texts():
    chance = random.Random(0)
    kinds = [
        [*ENGLISH.split(" "), "it's", "1234", "don't", "\n\n", "  ", " x"],
        [*CHINESE, "，", "。\n", "“", "12"],
        [*"ABCabc012+/="],  # base64
        ["e\u0301", "é ", "中", " 🙂", "\r\n", "<think>", "'ll ", "a, ", "'s", "\t", " "],
    ]
    return [
        chance.choice(["", " "]).join(chance.choices(words, k=300))
        for words in kinds
        for _ in range(2)
    ]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", PIECE)
    monkeypatch.setattr("minimind.tokenizer.encoding.PIECE", PIECE)
    monkeypatch.setattr("minimind.data.chat_encoder.PIECE", PIECE)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("fast", [True, False])
def test_the_ids_of_pieces_are_those_of_the_whole_text(kind, fast, small_pieces):
    tokenizer = TOKENIZERS[kind](load_tokenizer())
    encoder, texts = DocumentEncoder(tokenizer, fast), long_texts()
    pieces = [list(encoder.cut(text)) for text in texts]
    assert ["".join(each) for each in pieces] == texts
    assert all(len(each) > 2 for each in pieces)
    assert encoder([*texts, "short", texts[0]]).tolist() == by_library(
        tokenizer, [*texts, "short", texts[0]]
    )


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (None, "the whole text is one word"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "each piece would begin with a space"),
        (pre_tokenizers.Split(" ", "merged_with_previous"), "a space belongs to the word before"),
    ],
)
def test_a_rule_that_sees_over_a_border_is_not_cut_there(rule, why, small_pieces, monkeypatch):
    tokenizer = changed(load_tokenizer(), pre_tokenizer=rule)
    text = " ".join(["abc"] * 200)
    assert list(Cutter(text_encoder(tokenizer))(text)) == [text], why
    assert DocumentEncoder(tokenizer, fast=False)([text]).tolist() == by_library(tokenizer, [text])
    monkeypatch.setattr(cutting, "LONGEST_WHOLE", 500)
    monkeypatch.setattr(cutting, "LONGEST", 500)
    with pytest.raises(BadRowError, match="more than 500 characters"):
        Cutter(text_encoder(tokenizer)).check(text)


def test_white_space_too_long_for_the_fast_engine_is_the_library_s():
    tokenizer = load_tokenizer()
    encoder = DocumentEncoder(tokenizer)
    with pytest.raises(ValueError, match="Max stack size") as raised:
        encoder.engine.encode_to_numpy(" " * 1_000_000)

    class Failing:
        def encode_to_numpy(self, text, allowed_special):
            raise raised.value

    encoder.engine = Failing()
    assert encoder(["a  b", "c"]).tolist() == by_library(tokenizer, ["a  b", "c"])


def test_a_word_without_end_is_a_bad_row_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "' + "a" * (cutting.LONGEST + 1) + '"}\n{"text": "' + "a word " * 200 + '"}\n'
    )
    with pytest.raises(
        UserError, match=r"a\.jsonl:1: found more than 1,048,576 characters without a space"
    ):
        load_blocks(DataArguments(train_files=[str(path)], eval_ratio=0.0), load_tokenizer(), 32)
    skipping = DataArguments(train_files=[str(path)], eval_ratio=0.0, on_bad_rows="skip")
    assert load_blocks(skipping, load_tokenizer(), 32).facts["train"]["documents"] == 1


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_a_long_document_takes_memory_for_its_pieces_only(strategy, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    text = (ENGLISH * 10_000)[:1_000_000]
    path.write_text(text)
    load_tokenizer()
    seen = []
    library = DocumentEncoder._by_library
    monkeypatch.setattr(
        DocumentEncoder,
        "_by_library",
        lambda *args: seen.append(len("".join(args[1]))) or library(*args),
    )
    tracemalloc.start()
    try:
        load_blocks(
            DataArguments(train_files=[str(path)], eval_ratio=0.0), load_tokenizer(), 32, strategy
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(text)
    assert seen  # the library, which takes more than 100 bytes a character, sees a sample only
    assert max(seen) <= 2**14


def test_a_tokenizer_trained_on_pieces_is_that_of_the_whole_text(small_pieces, monkeypatch):
    text = " ".join(long_texts()[:4])
    in_pieces = train_tokenizer([text], vocab_size=300)
    monkeypatch.setattr(cutting, "PIECE", len(text))
    assert tokenizer_hash(in_pieces) == tokenizer_hash(train_tokenizer([text], vocab_size=300))


# Chats


def reasoning_chat(turns):
    messages = []
    for turn in range(turns):
        messages += [
            user(f"question {turn}"),
            assistant(f"answer {turn}", reasoning_content=f"thought {turn}"),
        ]
    return Conversation(messages)


class Counting(ChatEncoder):
    """Counts the characters of messages that are rendered."""

    characters = 0

    def apply_template(self, conversation, prompt=False):
        self.characters += sum(len(message["content"]) for message in conversation.messages)
        return super().apply_template(conversation, prompt)


def work(turns, policy):
    encoder = Counting(load_tokenizer())
    tokenize_conversations(
        [reasoning_chat(turns)], encoder, 100, ChatArguments(long_conversations=policy)
    )
    return encoder.characters


@pytest.mark.parametrize("policy", ["keep_last", "keep_first", "split", "drop"])
def test_a_chat_that_reasons_in_every_turn_takes_work_in_proportion_to_its_turns(policy):
    small, large = work(30, policy), work(60, policy)
    assert large < 2.3 * small


def test_a_pair_with_a_long_prompt_takes_work_in_proportion_to_its_turns():
    def of(turns):
        encoder, prompt = Counting(load_tokenizer()), reasoning_chat(turns).messages
        pair = {
            "prompt": [*prompt, user("q")],
            "chosen": [assistant("yes")],
            "rejected": [assistant("no")],
        }
        (found,) = tokenize_preferences([pair], encoder, PreferenceArguments(max_prompt_length=100))
        assert found.counts["truncated"]
        return encoder.characters

    assert of(60) < 2.3 * of(30)


def test_replies_are_found_where_transformers_finds_them():
    tokenizer = load_tokenizer()
    chat = reasoning_chat(30)
    chat.messages[3]["content"] = "中文 <|im_end|> é"
    text, spans = ChatEncoder(tokenizer).apply_template(chat)
    assert [text[start:end] for start, end in spans[:-1]] == [
        m["content"] + "<|im_end|>" for m in chat.messages[1:-1:2]
    ]
    assert text[slice(*spans[-1])] == "<think>\nthought 29\n</think>\n\nanswer 29<|im_end|>"


@pytest.mark.parametrize("words", ["plain words. ", "<|im_end|> in words. "])
def test_a_long_reply_has_the_ids_of_the_whole(words, small_pieces):
    chat = Conversation([user("q"), assistant(words * 200 + "end")])
    (cut,) = ChatEncoder(load_tokenizer()).encode([chat])
    encoder = ChatEncoder(load_tokenizer())
    for cutter in (encoder.cut, encoder.cut_plain):
        cutter.cuts = False
    encoder.fast = False
    (whole,) = encoder.encode([chat])
    assert list(cut.ids) == list(whole.ids)
    assert cut.replies == whole.replies
    assert cut.escaped == whole.escaped


def test_results_of_tools_are_split_in_one_pass():
    assert split_results(" " * 200_000) == [" " * 200_000]
    opened = "<tool_response>" * 20_000
    assert split_results(opened) == [opened]
    assert split_results(
        "<tool_response>\n1\n</tool_response>\n<tool_response>2</tool_response>"
    ) == ["1", "2"]


def test_a_message_with_thousands_of_parts_is_no_recursion(monkeypatch):
    monkeypatch.setenv("MINIMIND_LANG", "zh")
    monkeypatch.setattr("minimind.common.language.table", dict)
    names = ", ".join(["n"] * 1300)
    assert translated(names) == names
    assert translated(": " * 10_000) == ": " * 10_000
