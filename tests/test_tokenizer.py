import json

import pytest
from conftest import CHINESE, ENGLISH

from minimind.common.errors import UserError
from minimind.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    save_tokenizer,
    text_encoder,
    token_byte_lengths,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = {
    "emoji": "👩‍👩‍👧‍👦 🇨🇳 😀🏽 ❤️",
    "rare CJK": "𠮷野家 龘靐齉爩 㐀㐁 𪚥",
    "mixed scripts": "Hello, 世界! Привет مرحبا हिन्दी ภาษาไทย ñandú e\u0301",
    "white space": "a  b   c\t\td \u3000 e\u00a0f   ",
    "newlines": "\n\na\r\nb\n \n\n  c\n",
    "digits": "3.14159 2024-12-31 １２３ ٣٤ 0x1F",
    "code": 'def f(x):\n    return {"a": [x ** 2, "\\n"]}  # 注释\n',
    "controls": "a\x00b\x7f\ufeffc\u200d",
    "template words": "<|im_ start|> <| im_end|> system\nuser\nassistant\n",
    "one space": " ",
    "nothing": "",
}
SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello!\nYou."}]
SECOND = [{"role": "user", "content": "再见。"}, {"role": "assistant", "content": "明天见！ "}]
FIRST_TEXT = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello!\nYou.<|im_end|>"
SECOND_TEXT = "<|im_start|>user\n再见。<|im_end|>\n<|im_start|>assistant\n明天见！ <|im_end|>"
SYSTEM_TEXT = "<|im_start|>system\nBe brief.<|im_end|>"


@pytest.fixture(scope="module")
def default():
    return load_tokenizer()


@pytest.fixture(params=["default", "tiny"])
def either(request, default, tokenizer):
    return default if request.param == "default" else tokenizer


@pytest.fixture
def tampered(tokenizer_dir, tmp_path):
    """A copy of the tiny tokenizer's directory with other values in tokenizer_config.json and
    another template."""

    def tamper(template=None, without=(), **values):
        for file in tokenizer_dir.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        if template == "":
            (tmp_path / "chat_template.jinja").unlink()
        elif template:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        path = tmp_path / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(
            json.dumps({key: settings[key] for key in settings if key not in without}),
            encoding="utf-8",
        )
        return tmp_path

    return tamper


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_comes_back_unchanged(either, text):
    assert either.decode(either(text)["input_ids"]) == text
    encoder = text_encoder(either)
    assert (
        encoder.decode(
            encoder.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
        )
        == text
    )


def test_the_first_three_ids_are_the_special_tokens_and_padding_is_not_the_end(either):
    assert either.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert (either.pad_token_id, either.bos_token_id, either.eos_token_id) == (0, 1, 2)
    assert tuple(either.convert_ids_to_tokens([0, 1, 2])) == SPECIAL_TOKENS


def test_nothing_is_added_to_a_text_by_itself(either):
    assert not set(either("Hi 你好")["input_ids"]) & {0, 1, 2}


def test_the_default_tokenizer_has_6400_tokens_with_ids_0_to_6399(default):
    assert sorted(default.get_vocab().values()) == list(range(6400))
    assert len(default) == 6400


@pytest.mark.parametrize("text", ["1234567890", "a1b22c333", " 7 8", "第12章", "x=10", "１２"])
def test_a_digit_is_never_merged_with_anything(either, text):
    encoder = text_encoder(train_tokenizer([text] * 50, vocab_size=400))
    for tokens in (either.tokenize(text), encoder.encode(text, add_special_tokens=False).tokens):
        assert [
            token
            for token in tokens
            if any(char.isascii() and char.isdigit() for char in token[1:])
        ] == []
        assert [token for token in tokens if token[0] in "0123456789" and len(token) > 1] == []


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_byte_lengths_of_a_texts_tokens_sum_to_the_bytes_of_the_text(either, text):
    lengths = token_byte_lengths(either)
    ids = text_encoder(either).encode(text, add_special_tokens=False).ids
    assert sum(lengths[i] for i in ids) == len(text.encode())
    assert lengths[:3] == [0, 0, 0]
    assert min(lengths[3:]) == 1


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_special_tokens_name_in_raw_text_is_plain_characters(either, special):
    encoder, text = text_encoder(either), f"a{special}b {special}"
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert not set(ids) & {0, 1, 2}
    assert encoder.decode(ids, skip_special_tokens=False) == text
    assert special in either.tokenize(text), "the chat tokenizer itself still knows it"


def test_the_text_encoder_neither_pads_nor_truncates_whatever_the_tokenizer_was_asked_for(
    tokenizer_dir,
):
    used = load_tokenizer(tokenizer_dir)
    used(["a", ENGLISH], padding=True, truncation=True, max_length=3)
    alone = [
        text_encoder(used).encode(text, add_special_tokens=False).ids for text in ("a", ENGLISH)
    ]
    batch = text_encoder(used).encode_batch_fast(["a", ENGLISH], add_special_tokens=False)
    assert [encoding.ids for encoding in batch] == alone
    assert used.decode(alone[1]) == ENGLISH
    assert tokenizer_hash(used) == tokenizer_hash(load_tokenizer(tokenizer_dir))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (FIRST, FIRST_TEXT),
        ([SYSTEM, *FIRST], f"{SYSTEM_TEXT}\n{FIRST_TEXT}"),
        ([*FIRST, *SECOND], f"{FIRST_TEXT}\n{SECOND_TEXT}"),
        ([SYSTEM, *FIRST, *SECOND], f"{SYSTEM_TEXT}\n{FIRST_TEXT}\n{SECOND_TEXT}"),
    ],
)
def test_the_template_writes_chatml(either, messages, expected):
    assert either.apply_chat_template(messages, tokenize=False) == expected
    prompt = either.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt == expected[: expected.rindex("assistant\n") + len("assistant\n")]


@pytest.mark.parametrize(
    "messages", [FIRST, [SYSTEM, *FIRST], [*FIRST, *SECOND], [SYSTEM, *FIRST, *SECOND]]
)
def test_the_prompt_for_a_reply_begins_the_whole_conversation_in_text_and_in_ids(either, messages):
    for tokenize in (False, True):
        options = {"tokenize": tokenize} | ({"return_dict": False} if tokenize else {})
        whole = either.apply_chat_template(messages, **options)
        prompt = either.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        assert whole[: len(prompt)] == prompt
        assert len(prompt) < len(whole)


@pytest.mark.parametrize(
    ("messages", "trained"),
    [
        ([SYSTEM, *FIRST], ["Hello!\nYou.<|im_end|>"]),
        ([SYSTEM, *FIRST, *SECOND], ["Hello!\nYou.<|im_end|>", "明天见！ <|im_end|>"]),
        ([*SECOND, *FIRST], ["明天见！ <|im_end|>", "Hello!\nYou.<|im_end|>"]),
        ([*FIRST[:1], {"role": "assistant", "content": "  x\n"}], ["  x\n<|im_end|>"]),
    ],
)
def test_the_assistant_mask_covers_exactly_the_assistants_words_and_their_end_tokens(
    either, messages, trained
):
    encoded = either.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    runs, before = [], 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(token)
        before = mask
    assert [either.decode(run) for run in runs] == trained


def test_a_saved_tokenizer_comes_back_with_its_ids_and_template_and_nothing_partial_is_left(
    tokenizer, tmp_path
):
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    names = {file.name for file in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    for text in (ENGLISH, CHINESE, *TEXTS.values()):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_that_fails_to_save_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    def fail(directory):
        (type(tmp_path)(directory) / "chat_template.jinja").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tokenizer(tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_twice_on_the_same_texts_gives_the_same_tokenizer():
    first, second = (
        train_tokenizer(iter([ENGLISH, CHINESE] * 3), vocab_size=290) for _ in range(2)
    )
    assert tokenizer_hash(first) == tokenizer_hash(second)
    assert tokenizer_hash(first) != tokenizer_hash(train_tokenizer([ENGLISH], vocab_size=290))


def test_259_is_the_smallest_vocabulary():
    assert len(train_tokenizer([ENGLISH], vocab_size=259)) == 259
    with pytest.raises(UserError, match=r"--vocab_size 258 .* need 259"):
        train_tokenizer([ENGLISH], vocab_size=258)


def test_a_tokenizer_is_loaded_whatever_it_lacks_and_pads_with_a_token_it_has(tampered):
    """As published ones do: GPT-2 has no template and no padding, base models pad with their
    end."""
    bare = load_tokenizer(tampered(template="", without=["pad_token"]))
    assert (bare.chat_template, bare.pad_token, bare.eos_token) == (
        None,
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (
        load_tokenizer(tampered(without=["pad_token"], unk_token="<|endoftext|>")).pad_token
        == "<|endoftext|>"
    )
    endless = load_tokenizer(tampered(without=["eos_token", "pad_token"]))
    assert (endless.eos_token, endless.pad_token) == (None, None)


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError) as caught:
            load_tokenizer(directory)
        assert f"{directory} holds no tokenizer: tokenizer.json was not found" in str(caught.value)


def test_a_broken_tokenizer_file_is_refused_by_name(tampered):
    directory = tampered()
    (directory / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory)
    assert f"{directory / 'tokenizer.json'}: not JSON" in str(caught.value)
