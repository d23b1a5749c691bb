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
    marked,
)
from pipeline import assistant, result, user
from trl import DPOConfig, DPOTrainer

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import PreferenceArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chats import load_preferences
from minimind.data.loss_mask import preference_labels
from minimind.data.preference_rows import tokenize_preferences
from minimind.training.data_arguments import DataArguments
from minimind.training.preference_trainer import PreferenceTrainer

PAIR = {"prompt": SHORT[:1], "chosen": SHORT[1:], "rejected": [assistant("home")]}


def pair_rows_of(pair, tokenizer, prompt=4096, completion=4096, **options):
    args = PreferenceArguments(
        max_prompt_length=prompt, max_completion_length=completion, **options
    )
    (found,) = tokenize_preferences([pair], ChatEncoder(tokenizer), args)
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
    assert actual.keys() >= expected.keys()  # and those of the packed rows
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


def spoken(tokenizer, role, words, end=True):
    """The ids of a message as ChatML writes it."""
    return by_hand(tokenizer, START, f"{role}\n{words}", *([END, "\n"] if end else []))


def test_a_long_prompt_loses_its_oldest_turns_then_its_system_message_then_its_beginning(either):
    question = "and now? " * 6 + "home"
    turns = [*LONG[:4], user(question)]
    pair = {**PAIR, "prompt": [SYSTEM, *turns]}
    system, header = spoken(either, "system", SYSTEM["content"]), by_hand(either, START, "user\n")
    second = spoken(either, "user", "再来") + spoken(either, "assistant", LONG[3]["content"])
    words = by_hand(either, question)
    last = [*header, *words, *by_hand(either, END, "\n", START, "assistant\n")]
    for expected, room in (
        (system + second + last, len(system + second + last)),  # without the first turn
        (system + last, len(system + second + last) - 1),
        (system + last, len(system + last)),
        (last, len(system + last) - 1),
        (last, len(last)),
        (header + last[len(header) + 1 :], len(last) - 1),  # of the question 1 token is missing
        (header + last[len(header) + len(words) - 1 :], len(last) - len(words) + 1),
    ):
        (row,), counts = pair_rows_of(pair, either, room)
        assert row["prompt_ids"] == expected
        (whole,), _ = pair_rows_of(pair, either)
        assert row == {**whole, "prompt_ids": expected}, "the replies are as they were"
        assert counts == {"truncated": 1, "prompts_cut": 1}
    nothing = len(last) - len(words)
    assert pair_rows_of(pair, either, nothing) == ([], {"dropped": 1})
    fitting = len(whole["prompt_ids"])
    assert pair_rows_of(pair, either, fitting) == ([whole], {})
    assert pair_rows_of(pair, either, len(last), long_prompts="drop") == ([], {"dropped": 1})


def test_a_question_without_system_message_is_cut_by_any_template_after_its_own_marker(llama2):
    words = "tell me more " * 9
    (row,), _ = pair_rows_of({**PAIR, "prompt": [SYSTEM, user(words)]}, llama2, 20)
    text = llama2.decode(row["prompt_ids"])
    assert text.startswith("<|im_start|>[INST]") and text.endswith(" me more [/INST]")
    assert len(row["prompt_ids"]) == 20


def test_of_a_long_turn_with_tools_only_the_question_is_cut(default):
    called = {**CALLING[1], "tool_calls": [call(a=1)]}
    prompt = [user("why? " * 40), called, result("9 " * 20)]
    pair = {"prompt": prompt, "chosen": [assistant("3")], "rejected": [assistant("4")]}
    whole = pair_rows_of(pair, default)[0][0]["prompt_ids"]
    (row,), _ = pair_rows_of(pair, default, len(whole) - 30)
    header = by_hand(default, START, "user\n")
    assert row["prompt_ids"] == header + whole[len(header) + 30 :]
    rest = pair_rows_of({**pair, "prompt": [user(""), *prompt[1:]]}, default)[0][0]["prompt_ids"]
    assert pair_rows_of(pair, default, len(rest)) == ([], {"dropped": 1})


@pytest.mark.parametrize(("longer", "shorter"), [("chosen", "rejected"), ("rejected", "chosen")])
def test_a_long_reply_loses_its_end_and_the_other_one_its_end_token(either, longer, shorter):
    words = "the lazy dog jumps over the fox"
    long, short = by_hand(either, words), by_hand(either, "home")
    pair = {**PAIR, longer: [assistant(words)], shorter: [assistant("home")]}
    for room in (len(short), len(long) - 1, len(long)):
        (row,), counts = pair_rows_of(pair, either, completion=room)
        assert row == {
            "prompt_ids": pair_rows_of(pair, either)[0][0]["prompt_ids"],
            f"{longer}_ids": long[:room],
            f"{longer}_mask": [1] * room,
            f"{shorter}_ids": short,
            f"{shorter}_mask": [1] * len(short),
        }
        assert counts == {"truncated": 1, "replies_cut": 1}


def test_replies_that_fit_exactly_keep_their_end_and_one_token_less_takes_it_from_both(either):
    pair = {**PAIR, "chosen": [assistant("the dog")], "rejected": [assistant("home")]}
    (whole,), _ = pair_rows_of(pair, either)
    longest = len(whole["chosen_ids"])
    assert whole["chosen_ids"][-1] == whole["rejected_ids"][-1] == END
    assert pair_rows_of(pair, either, completion=longest) == ([whole], {})
    (row,), _ = pair_rows_of(pair, either, completion=longest - 1)
    assert (row["chosen_ids"], row["rejected_ids"]) == tuple(
        whole[f"{name}_ids"][:-1] for name in ("chosen", "rejected")
    )
    assert pair_rows_of(pair, either, completion=longest - 1, long_completions="drop") == (
        [],
        {"dropped": 1},
    )


def test_a_reply_that_is_cut_within_a_tools_result_ends_with_what_the_assistant_said(default):
    pair = {"prompt": CALLING[:1], "chosen": CALLING[1:], "rejected": [assistant("3")]}
    (whole,), _ = pair_rows_of(pair, default)
    last = whole["chosen_mask"].index(0)  # of the first result
    (row,), _ = pair_rows_of(pair, default, completion=last + 4)
    assert whole["chosen_ids"][last - 1] == END
    assert row["chosen_ids"] == whole["chosen_ids"][: last - 1]
    assert row["chosen_mask"] == [1] * (last - 1)


def test_a_pair_whose_replies_are_equal_once_cut_is_left_out_with_its_place(
    tokenizer, write_jsonl, caplog
):
    same = {**PAIR, "chosen": [assistant("the dog")], "rejected": [assistant("the dog runs")]}
    room = len(by_hand(tokenizer, "the dog"))
    assert pair_rows_of(same, tokenizer, completion=room)[1] == {"identical": 1}
    path = write_jsonl("pairs.jsonl", [PAIR, same])
    rows = load_preferences(
        DataArguments(train_files=[path], eval_ratio=0.0),
        tokenizer,
        PreferenceArguments(max_completion_length=room),
    )
    assert (rows.facts["train"]["rows"], rows.facts["train"]["identical"]) == (1, 1)
    assert (
        f"{path}:2: found chosen equal to rejected once both are cut to --max_completion_length"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_prompt_length": 17}, "in the last turn of the prompt without its question"),
        ({"max_prompt_length": 20, "long_prompts": "drop"}, "in the prompt"),
        ({"max_completion_length": 8, "long_completions": "drop"}, "in the rejected reply"),
    ],
)
def test_a_pair_of_which_nothing_fits_is_left_out_with_both_numbers_and_its_place(
    tokenizer, write_jsonl, options, words, caplog
):
    long = {
        "prompt": [user("why? " * 30)],
        "chosen": [assistant("x")],
        "rejected": [assistant("the lazy dog " * 9)],
    }
    path = write_jsonl(
        "pairs.jsonl",
        [{"prompt": [user("")], "chosen": [assistant("x")], "rejected": [assistant("y")]}, long],
    )
    args = PreferenceArguments(**options)
    rows = load_preferences(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, args)
    assert (rows.facts["train"]["rows"], rows.facts["train"]["dropped"]) == (1, 1)
    assert f"{path}:2: found " in caplog.text
    option, limit = next(iter(options.items()))
    assert f" tokens {words}, expected at most --{option} {limit}" in caplog.text


def test_other_limits_are_other_rows_of_the_cache(tokenizer, write_jsonl):
    path = write_jsonl("pairs.jsonl", [{**PAIR, "prompt": LONG[:5]}] * 2)
    data_args = DataArguments(train_files=[path], eval_ratio=0.0)
    found = [
        list(load_preferences(data_args, tokenizer, PreferenceArguments(**options)).train)
        for options in ({}, {"max_prompt_length": 40}, {"max_completion_length": 3}, {})
    ]
    assert found[0] == found[3]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize("name", ["long_prompts", "long_completions"])
def test_an_unknown_policy_for_long_pairs_is_refused(name):
    with pytest.raises(ValueError, match=f"--{name} split: expected one of cut, drop"):
        PreferenceArguments(**{name: "split"})


def test_loaded_pairs_are_the_files_pairs_in_order(tokenizer, write_jsonl):
    swapped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    path = write_jsonl("pairs.jsonl", [PAIR, swapped])
    rows = load_preferences(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer)
    assert list(rows.train) == [pair_rows_of(pair, tokenizer)[0][0] for pair in (PAIR, swapped)]
    assert (rows.eval, rows.facts["train"]["rows"]) == (None, 2)
