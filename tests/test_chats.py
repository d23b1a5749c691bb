"""Files of conversations -> rows for a trainer."""

import copy
import re
from pathlib import Path

import pytest
from example_chats import EVIL, LONG, SHORT, chat, fits, tokenized
from pipeline import assistant, user

from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.data import chats
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chats import _prepare as prepare
from minimind.data.chats import load_conversations, load_preferences
from minimind.training.data_arguments import DataArguments


def test_loaded_conversations_are_the_files_rows_in_order_with_what_was_cut_counted(
    tokenizer, write_jsonl
):
    path = write_jsonl("chats.jsonl", [{"messages": messages} for messages in (SHORT, LONG, SHORT)])
    window = fits(SHORT, tokenizer)
    rows = load_conversations(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, window)
    assert list(rows.train) == tokenized([SHORT, LONG[-2:], SHORT], tokenizer)
    assert rows.eval is None
    digest = content_hash([Path(path)])
    assert rows.facts["train"] == {"files": [path], "hash": digest, "rows": 3, "truncated": 1}
    assert rows.where == [f"{path}:{line}" for line in (1, 2, 3)]
    assert rows.lengths == [[fits(messages, tokenizer)] for messages in (SHORT, LONG, SHORT)]


def test_what_became_of_the_conversations_is_counted(tokenizer, write_jsonl):
    evil, thinking = (
        chat(EVIL, "a"),
        [
            user("a"),
            assistant("b", reasoning_content="c"),
            user("d"),
            assistant("e"),
        ],
    )
    path = write_jsonl(
        "chats.jsonl", [{"messages": m} for m in (SHORT, evil, thinking, chat("fox " * 60, "dog"))]
    )
    args = ChatArguments(long_conversations="drop")
    rows = load_conversations(
        DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, 100, args
    )
    counts = {
        name: value for name, value in rows.facts["train"].items() if name not in ("files", "hash")
    }
    assert counts == {"rows": 4, "truncated": 0, "escaped": 1, "reasoning_rows": 1, "dropped": 1}
    with pytest.raises(UserError, match=r"no row is left to train \(4 untrained, .*--train_turns"):
        load_conversations(
            DataArguments(train_files=[path], eval_ratio=0.0),
            tokenizer,
            None,
            ChatArguments(train_turns="flags"),
        )


def test_conversations_of_which_nothing_fits_are_counted_and_the_first_is_named(
    tokenizer, write_jsonl, caplog
):
    rows = [SHORT, chat("fox " * 40, "dog"), SHORT, chat("fox " * 50, "dog")]
    path = write_jsonl("chats.jsonl", [{"messages": messages} for messages in rows])
    window = fits(SHORT, tokenizer)
    rows = load_conversations(DataArguments(train_files=[path], eval_ratio=0.0), tokenizer, window)
    assert (rows.facts["train"]["rows"], rows.facts["train"]["dropped"]) == (2, 2)
    (warning,) = [
        record.getMessage() for record in caplog.records if record.name.startswith("minimind")
    ]
    assert warning.startswith(f"skipped 2 of 4 rows: {path}:2: found ")
    assert f"expected at most --max_length {window} (and 1 more: {path}:4)" in warning


def test_rows_refused_while_reading_and_while_tokenising_are_counted_together(
    tokenizer, write_jsonl
):
    rows = [{"messages": SHORT}] * 2 + [
        {"messages": []},
        {"messages": chat("fox", "dog"), "weight": 0.5},
    ]
    path = write_jsonl("chats.jsonl", rows)
    with pytest.raises(UserError, match=r"2 of 4 rows are bad"):
        load_conversations(DataArguments(train_files=[path]), tokenizer, 512)
    with pytest.raises(UserError, match=rf"^{re.escape(path)}:2: found weights other than 0 and 1"):
        path = write_jsonl(
            "chats.jsonl", [{"messages": SHORT}, {"messages": chat("fox", "dog"), "weight": 0.5}]
        )
        load_conversations(DataArguments(train_files=[path], on_bad_rows="error"), tokenizer, 512)


def test_copies_of_a_conversation_are_never_on_both_sides(tokenizer, write_jsonl):
    conversations = [chat(f"fox {number}", f"dog {number}") for number in range(40)] * 2
    path = write_jsonl("chats.jsonl", [{"messages": messages} for messages in conversations])
    rows = load_conversations(DataArguments(train_files=[path], eval_ratio=0.3), tokenizer, 512)
    train, held_out = (
        {tokenizer.decode(row["input_ids"]) for row in part} for part in (rows.train, rows.eval)
    )
    assert not train & held_out
    assert len(train | held_out) == 40
    assert len(held_out) > 5
    assert len(rows.train) + len(rows.eval) == 80


def test_held_out_files_are_the_held_out_rows(tokenizer, write_jsonl):
    train = write_jsonl("train.jsonl", [{"messages": SHORT}] * 3)
    held_out = write_jsonl(
        "eval.jsonl", [{"messages": messages} for messages in (LONG, SHORT, SHORT)]
    )
    arguments = DataArguments(
        train_files=[train], eval_files=[held_out], eval_ratio=1.0, max_eval_rows=2
    )
    rows = load_conversations(arguments, tokenizer, 512)
    assert list(rows.train) == tokenized([SHORT] * 3, tokenizer)
    assert list(rows.eval) == tokenized([LONG, SHORT], tokenizer)


def test_sources_are_mixed_by_their_numbers(tokenizer, write_jsonl):
    paths = [
        write_jsonl(f"{name}.jsonl", [{"messages": chat(name, "x")}] * 3) for name in ("a", "b")
    ]
    arguments = DataArguments(train_files=[f"{paths[0]}:2x", paths[1]], eval_ratio=0.0)
    rows = load_conversations(arguments, tokenizer, 512)
    texts = [
        "".join(re.findall(r"user\n(.)", tokenizer.decode(row["input_ids"]))) for row in rows.train
    ]
    assert sorted(texts) == ["a"] * 6 + ["b"] * 3
    assert rows.facts["train"]["rows_per_epoch"] == 9
    assert [where.split(":")[0][-7] for where in rows.where] == texts


# Rows that are found again


def everything(rows):
    """All that a trainer and an inspection see of rows."""
    parts = [list(part) if part else part for part in (rows.train, rows.eval)]
    features = [part.features if part else None for part in (rows.train, rows.eval)]
    return *parts, features, rows.facts, rows.where, rows.lengths, rows.reading.state()


def test_rows_found_again_are_those_prepared_with_the_same_report_and_warnings(
    tokenizer, write_jsonl, caplog, monkeypatch
):
    one = [{"messages": chat(f"question {n}", "answer " * n)} for n in range(1, 30)]
    one[3] = {"messages": []}
    paths = [write_jsonl("one.jsonl", one), write_jsonl("two.jsonl", [{"messages": SHORT}] * 4)]
    words = [f"{paths[0]}:0.5", f"{paths[1]}:0.5"]
    data_args = DataArguments(words, eval_ratio=0.2, max_eval_rows=3, on_bad_rows="skip")
    args = ChatArguments(weighted_loss=True)

    def load():
        caplog.clear()
        rows = load_conversations(data_args, tokenizer, 60, args, roles=True)
        return everything(rows), [record.getMessage() for record in caplog.records]

    fresh, warnings = load()
    assert len(warnings) == 2  # a bad row, and conversations that are too long
    monkeypatch.setattr(chats, "tokenize_conversations", None)
    assert load() == (fresh, warnings)


def test_preference_pairs_are_found_again(tokenizer, write_jsonl, monkeypatch):
    pairs = [{"prompt": f"p {n}", "chosen": "yes", "rejected": "no"} for n in range(9)]
    data_args = DataArguments([write_jsonl("pairs.jsonl", pairs)], eval_ratio=0.3)
    fresh = everything(load_preferences(data_args, tokenizer))
    monkeypatch.setattr(chats, "tokenize_preferences", None)
    assert everything(load_preferences(data_args, tokenizer)) == fresh


@pytest.mark.parametrize(
    "changed",
    [
        "file",
        "name",
        "tokenizer",
        "template",
        {"eval_ratio": 0.5},
        {"max_length": 99},
        {"train_turns": "last"},
        {"roles": True},
    ],
    ids=str,
)
def test_whatever_decides_the_rows_has_them_prepared_again(
    tokenizer, write_jsonl, monkeypatch, changed
):
    tokenizer, prepared = copy.deepcopy(tokenizer), []
    rows = [{"messages": chat(f"question {n}", "answer")} for n in range(6)]
    monkeypatch.setattr(chats, "_prepare", lambda *args: prepared.append(args) or prepare(*args))

    def load(name="chats.jsonl", rows=rows, **options):
        files = [write_jsonl(name, rows)]
        data_args = DataArguments(files, eval_ratio=options.pop("eval_ratio", 0.0))
        chat_args = ChatArguments(train_turns=options.pop("train_turns", "all"))
        options = {"max_length": 100} | options
        load_conversations(data_args, tokenizer, args=chat_args, **options)
        return len(prepared)

    assert (load(), load()) == (1, 1)
    if changed == "tokenizer":
        tokenizer.add_tokens(["question"])
    elif changed == "template":
        tokenizer.chat_template += "{# another #}"
    options = {"file": {"rows": rows[1:]}, "name": {"name": "other.jsonl"}}
    assert load(**changed if isinstance(changed, dict) else options.get(changed, {})) == 2
