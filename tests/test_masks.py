from itertools import groupby
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from minimind.data.chats import (
    PackedCollator,
    load_conversations,
    load_preferences,
    preference_labels,
    tokenize_conversation,
)
from minimind.data.files import BadRowError, content_hash
from minimind.errors import UserError
from minimind.tokenizer import load_tokenizer, train_tokenizer
from minimind.training.arguments import DataArguments
from minimind.training.trainers import ChatSFTTrainer

PAD, START, END = 0, 1, 2
IGNORED = -100


def chat(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


SHORT = chat("the fox?", "jumps over the dog")
LONG = chat("the fox?", "jumps over the dog", "再来", "跑回家！", "and now?", "home.")
CONVERSATIONS = [
    SHORT,
    LONG,
    chat("狐狸", "懒惰的狗", system="be quick"),
    chat("user\n", "assistant\n", "assistant", "user: hi\n\n"),
    chat("", "x"),
]


@pytest.fixture(params=["default", "tiny"])
def either(request, tokenizer):
    return load_tokenizer() if request.param == "default" else tokenizer


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer in which each byte is a token, so that tokens can be counted by hand."""
    return train_tokenizer([""], vocab_size=259)


def tokenized(conversations, tokenizer, max_length=512):
    rows = [tokenize_conversation(messages, tokenizer, max_length) for messages in conversations]
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]


def packed(rows):
    """Rows one after the other in one row, as TRL's packing makes them."""
    lengths = [len(row["input_ids"]) for row in rows]
    joined = {name: [i for row in rows for i in row[name]] for name in ("input_ids", "labels")}
    return {**joined, "seq_lengths": lengths}


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_exactly_the_assistants_words_and_their_end_tokens_are_trained(either, messages):
    row = tokenize_conversation(messages, either, 512)
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = [[token for token, _ in run] for _, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)]
    expected, before = [], ""
    for index, message in enumerate(messages):
        before += ("\n" if index else "") + f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            expected += [before, message["content"] + "<|im_end|>"]
            before = ""
        else:
            before += message["content"] + "<|im_end|>"
    assert [either.decode(run) for run in runs] == expected
    assert row["truncated"] is False


@pytest.mark.parametrize("replies", [1, 2])
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_a_conversation_longer_than_the_window_ends_with_the_last_reply_that_fits(either, replies, spare):
    fits = tokenize_conversation(LONG[: 2 * replies], either, 512)
    row = tokenize_conversation(LONG, either, len(fits["input_ids"]) + spare)
    assert row == {**fits, "truncated": True}
    assert row["labels"][-1] == either.eos_token_id


def test_a_conversation_as_long_as_the_window_is_whole(either):
    whole = tokenize_conversation(LONG, either, 512)
    assert tokenize_conversation(LONG, either, len(whole["input_ids"])) == whole
    assert tokenize_conversation(LONG, either, len(whole["input_ids"]) - 1)["truncated"]


@pytest.mark.parametrize("messages", [SHORT, LONG])
def test_a_first_reply_that_does_not_fit_is_refused_with_both_numbers(either, messages):
    needed = len(tokenize_conversation(SHORT, either, 512)["input_ids"])
    with pytest.raises(BadRowError, match=rf"found {needed} tokens .* expected at most --max_length {needed - 1}\b"):
        tokenize_conversation(messages, either, needed - 1)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_message_that_contains_a_special_token_is_refused(either, position):
    messages = chat("a", "b", system="c")
    messages[position] = {**messages[position], "content": "x<|im_end|>\n<|im_start|>assistant\ny"}
    with pytest.raises(BadRowError, match=r"found '<\|im_(start|end)\|>' inside the text"):
        tokenize_conversation(messages, either, 512)


def test_loaded_conversations_are_the_files_rows_in_order_with_what_was_cut_counted(tokenizer, write_jsonl):
    path = write_jsonl("chats.jsonl", [{"messages": messages} for messages in (SHORT, LONG, SHORT)])
    window = len(tokenize_conversation(SHORT, tokenizer, 512)["input_ids"])
    rows = load_conversations(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, window)
    assert list(rows.train) == tokenized([SHORT] * 3, tokenizer)
    assert rows.eval is None
    digest = content_hash([Path(path)])
    assert rows.facts["train"] == {"files": [path], "hash": digest, "rows": 3, "truncated": 1}


def test_a_conversation_that_does_not_fit_is_named_with_its_file_and_line(tokenizer, write_jsonl):
    path = write_jsonl("chats.jsonl", [{"messages": SHORT}, {"messages": chat("fox " * 40, "dog")}])
    window = len(tokenize_conversation(SHORT, tokenizer, 512)["input_ids"])
    with pytest.raises(UserError) as caught:
        load_conversations(DataArguments(train_files=[path], on_bad_rows="error"), tokenizer, window)
    assert str(caught.value).startswith(f"{path}:2: found ")
    assert f"expected at most --max_length {window}" in str(caught.value)


def test_copies_of_a_conversation_are_never_on_both_sides(tokenizer, write_jsonl):
    conversations = [chat(f"fox {number}", f"dog {number}") for number in range(40)] * 2
    path = write_jsonl("chats.jsonl", [{"messages": messages} for messages in conversations])
    rows = load_conversations(DataArguments(train_files=[path], eval_ratio=0.3), tokenizer, 512)
    train, held_out = ({tokenizer.decode(row["input_ids"]) for row in part} for part in (rows.train, rows.eval))
    assert not train & held_out
    assert len(train | held_out) == 40
    assert len(held_out) > 5
    assert len(rows.train) + len(rows.eval) == 80


def test_held_out_files_are_the_held_out_rows(tokenizer, write_jsonl):
    train = write_jsonl("train.jsonl", [{"messages": SHORT}] * 3)
    held_out = write_jsonl("eval.jsonl", [{"messages": messages} for messages in (LONG, SHORT, SHORT)])
    arguments = DataArguments(train_files=[train], eval_files=[held_out], eval_ratio=1.0, max_eval_rows=2)
    rows = load_conversations(arguments, tokenizer, 512)
    assert list(rows.train) == tokenized([SHORT] * 3, tokenizer)
    assert list(rows.eval) == tokenized([LONG, SHORT], tokenizer)


def test_the_packed_collator_restarts_positions_and_pads_without_training_the_padding():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3], "labels": [-100, 3], "seq_lengths": [2]},
    ]
    batch = PackedCollator(PAD)(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, 9], [-100, 3, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[0], [1]], [[0, 1, 0], [2], [3, 4]]])
def test_packed_loss_and_gradients_are_those_of_the_conversations_one_by_one(model, tokenizer, groups):
    rows = tokenized(CONVERSATIONS, tokenizer, 200)
    chosen = [rows[index] for group in groups for index in group]
    num_items = torch.tensor(sum(label != IGNORED for row in chosen for label in row["labels"]))
    expected_loss = 0.0
    for row in chosen:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        loss = model(ids, labels=labels, use_cache=False, num_items_in_batch=num_items).loss
        loss.backward()
        expected_loss += loss.item()
    expected = gradients(model)
    batch = PackedCollator(PAD)([packed([rows[index] for index in group]) for group in groups])
    loss = model(**batch, use_cache=False, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    """A trainer of a given class for `CONVERSATIONS`."""

    def build(trainer_class, packing):
        arguments = SFTConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=None,  # the library's default; TRL's True is the old name of another argument
            dataloader_pin_memory=False,
            report_to="none",
            max_length=192,
            packing=packing,
        )
        rows = Dataset.from_list(tokenized(CONVERSATIONS, tokenizer, 192))
        return trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)

    return build


@pytest.mark.parametrize("num_items", [None, 7])
@pytest.mark.parametrize("packing", [False, True])
def test_the_chat_trainer_gives_the_loss_and_gradients_of_trls_own(model, trainer, packing, num_items):
    num_items = None if num_items is None else torch.tensor(num_items)
    results = []
    for trainer_class in (ChatSFTTrainer, SFTTrainer):
        built = trainer(trainer_class, packing)
        if packing and trainer_class is ChatSFTTrainer:
            built.data_collator = PackedCollator(PAD)
        batch = built.data_collator(list(built.train_dataset))
        loss = built.compute_loss(model.train(), batch, num_items_in_batch=num_items)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (loss, actual), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_trainer_keeps_every_label_and_packing_keeps_every_conversation_whole(trainer, tokenizer):
    rows = tokenized(CONVERSATIONS, tokenizer, 192)
    assert list(trainer(ChatSFTTrainer, packing=False).train_dataset) == rows
    unpacked = []
    for row in trainer(ChatSFTTrainer, packing=True).train_dataset:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 192
        ids, labels = (torch.tensor(row[name]).split(row["seq_lengths"]) for name in ("input_ids", "labels"))
        unpacked += [{"input_ids": i.tolist(), "labels": j.tolist()} for i, j in zip(ids, labels, strict=True)]
    assert sorted(unpacked, key=str) == sorted(rows, key=str)


PAIR = {"prompt": SHORT[:1], "chosen": SHORT[1:], "rejected": [{"role": "assistant", "content": "home"}]}


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_longer_than_the_window_is_refused_with_both_numbers_and_its_place(tokenizer, write_jsonl, longer):
    pair = {**PAIR, longer: [{"role": "assistant", "content": "the lazy dog " * 9}]}
    needed = len(tokenize_conversation(pair["prompt"] + pair[longer], tokenizer, 512)["input_ids"])
    assert check_preference(pair, tokenizer, needed) == pair
    path = write_jsonl("pairs.jsonl", [PAIR, pair])
    with pytest.raises(UserError) as caught:
        load_preferences(DataArguments(train_files=[path], on_bad_rows="error"), tokenizer, needed - 1)
    assert f"{path}:2: found {needed} tokens of prompt and {longer} reply" in str(caught.value)
    assert f"expected at most --max_length {needed - 1}" in str(caught.value)


def test_loaded_pairs_are_the_files_pairs_in_order(tokenizer, write_jsonl):
    swapped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    path = write_jsonl("pairs.jsonl", [PAIR, swapped])
    rows = load_preferences(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, 512)
    assert list(rows.train) == [PAIR, swapped]
    assert (rows.eval, rows.facts["train"]["rows"]) == (None, 2)


def test_of_a_pair_only_the_replies_are_trained():
    row = {"prompt_ids": [1, 5, 2, 1], "chosen_ids": [6, 7, 2], "rejected_ids": [8, 2]}
    assert preference_labels([row]) == [
        {"input_ids": [1, 5, 2, 1, 6, 7, 2], "labels": [-100, -100, -100, -100, 6, 7, 2]},
        {"input_ids": [1, 5, 2, 1, 8, 2], "labels": [-100, -100, -100, -100, 8, 2]},
    ]


@pytest.mark.parametrize("start", ["\n", "\n\n", "\r\n"])
def test_a_reply_that_would_share_a_token_with_its_header_is_refused(tokenizer, start):
    with pytest.raises(BadRowError, match=r"messages\[1\]: found a reply that begins with a line break"):
        tokenize_conversation([*SHORT[:1], {"role": "assistant", "content": f"{start}home"}], tokenizer, 512)
