"""Preference pairs -> rows, as TRL's trainer makes them."""

import copy

import pytest
from datasets import Dataset
from example_chats import (
    CALLING,
    END,
    EVIL,
    IGNORED,
    LONG,
    RENDERED,
    SHORT,
    START,
    SYSTEM,
    by_hand,
    call,
    fits,
    marked,
)
from pipeline import assistant, user
from trl import DPOConfig, DPOTrainer

from minimind.common.errors import BadRowError, UserError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chats import load_preferences
from minimind.data.loss_mask import preference_labels
from minimind.data.preference_rows import tokenize_preferences
from minimind.training.data_arguments import DataArguments
from minimind.training.preference_trainer import PreferenceTrainer

PAIR = {"prompt": SHORT[:1], "chosen": SHORT[1:], "rejected": [assistant("home")]}


def pair_rows_of(pair, tokenizer, max_length=None, **options):
    (found,) = tokenize_preferences(
        [pair], ChatEncoder(tokenizer), max_length, ChatArguments(**options)
    )
    if isinstance(found, BadRowError):
        raise found
    return found.rows, dict(found.counts)


def dpo_arguments(tmp_path):
    return DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=None,
        dataloader_pin_memory=False,
        report_to="none",
        max_length=512,
    )


def test_pairs_are_tokenised_and_batched_as_by_trl(model, tokenizer, tmp_path):
    # One call: a Dataset would give each the other's arguments
    called = {**CALLING[1], "tool_calls": [call(a=1)]}
    calling = {
        "prompt": [CALLING[0], called, CALLING[2]],
        "chosen": CALLING[4:],
        "rejected": [assistant("3")],
    }
    pairs = [PAIR, {**PAIR, "prompt": LONG[:5]}, calling]
    theirs = DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=dpo_arguments(tmp_path),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    rows = [pair_rows_of(pair, tokenizer)[0][0] for pair in pairs]
    ours = PreferenceTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=dpo_arguments(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = theirs.data_collator(list(theirs.train_dataset))
    actual = ours.data_collator(list(ours.train_dataset))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].equal(value), name


def test_of_a_reply_in_several_messages_the_results_of_tools_are_not_trained(
    model, tokenizer, tmp_path
):
    pair = {"prompt": CALLING[:1], "chosen": CALLING[1:], "rejected": [assistant("3")]}
    (row,), _ = pair_rows_of(pair, tokenizer)
    labelled = preference_labels([row])
    expected = RENDERED["chatml"][1][1]
    assert marked(labelled[0], tokenizer) == expected
    trainer = PreferenceTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=dpo_arguments(tmp_path),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([row])
    length = len(labelled[0]["input_ids"])
    assert [
        t for t, m in zip(batch["input_ids"][0], batch["completion_mask"][0], strict=True) if m
    ] == [label for label in labelled[0]["labels"] if label != IGNORED]
    assert batch["attention_mask"][0].sum() == length
    loaded = next(iter(trainer.get_train_dataloader()))
    assert loaded["completion_mask"].equal(batch["completion_mask"]), (
        "the trainer keeps the masks of its rows"
    )


def test_control_tokens_in_a_pair_are_plain_text(either):
    pair = {"prompt": [user(EVIL)], "chosen": [assistant("good")], "rejected": [assistant(EVIL)]}
    (row,), counts = pair_rows_of(pair, either)
    assert row["prompt_ids"] == by_hand(
        either, START, f"user\n{EVIL}", END, "\n", START, "assistant\n"
    )
    whole = by_hand(either, START, f"user\n{EVIL}", END, "\n", START, f"assistant\n{EVIL}", END)
    assert row["rejected_ids"] == whole[len(row["prompt_ids"]) :]
    assert counts == {"escaped": 1}


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_that_does_not_fit_is_dropped_with_both_numbers_and_its_place(
    tokenizer, write_jsonl, longer, caplog
):
    pair = {**PAIR, longer: [assistant("the lazy dog " * 9)]}
    needed = fits(pair["prompt"] + pair[longer], tokenizer)
    assert pair_rows_of(pair, tokenizer, needed)[1] == {}
    path = write_jsonl("pairs.jsonl", [PAIR, pair])
    rows = load_preferences(
        DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, needed - 1
    )
    assert (rows.facts["train"]["rows"], rows.facts["train"]["dropped"]) == (1, 1)
    assert (
        f"{path}:2: found {needed} tokens of prompt and {longer} reply, expected at most"
        " --max_length" in caplog.text
    )


def test_a_long_pair_loses_the_oldest_turns_of_its_prompt_or_is_dropped(either):
    pair = {**PAIR, "prompt": [SYSTEM, *LONG[:5]]}
    kept = {**pair, "prompt": [SYSTEM, LONG[4]]}
    window = fits(kept["prompt"] + PAIR["chosen"], either)
    assert pair_rows_of(pair, either, window) == (pair_rows_of(kept, either)[0], {"truncated": 1})
    assert pair_rows_of(pair, either, window, long_conversations="drop") == ([], {"dropped": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"long_conversations": "split"},
        {"train_turns": "last"},
        {"loss_normalization": "conversation"},
    ],
)
def test_options_that_mean_nothing_for_pairs_are_refused(tokenizer, write_jsonl, options):
    path = write_jsonl("pairs.jsonl", [PAIR])
    with pytest.raises(UserError, match=f"--{next(iter(options))}"):
        load_preferences(
            DataArguments(train_files=[path]), tokenizer, 512, ChatArguments(**options)
        )


def test_loaded_pairs_are_the_files_pairs_in_order(tokenizer, write_jsonl):
    swapped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    path = write_jsonl("pairs.jsonl", [PAIR, swapped])
    rows = load_preferences(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, 512)
    assert list(rows.train) == [pair_rows_of(pair, tokenizer)[0][0] for pair in (PAIR, swapped)]
    assert (rows.eval, rows.facts["train"]["rows"]) == (None, 2)
