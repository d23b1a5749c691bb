"""Rules that a reply is checked by, and the score they make."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from judged import Scripted
from pipeline import failure, run_cli

from minimind.common.errors import UserError
from minimind.evaluation.replies import Sampling
from minimind.evaluation.scoring import ModelSubject
from minimind.generation import Reply, complete
from minimind.score_card import (
    ChoicesTask,
    RepliesTask,
    RulesTask,
    read_multiple_choice,
    read_referenced_prompts,
    read_ruled_prompts,
)
from minimind.score_card.checks import RULES, follows, normalised, numbers_in, read_rules
from minimind.score_card.controls import controls
from minimind.tokenizer import save_tokenizer

# rule, value -> replies that follow it, replies that do not
CASES = [
    ("answer", "Paris", [" Paris.", "Ｐａｒｉｓ！", "Paris"], ["paris", "It is Paris", ""]),
    ("answer", ["Paris", "the city of Paris"], ["the  city\nof Paris"], ["the city"]),
    ("answer", "巴黎", ["巴黎。", " 巴黎！"], ["在巴黎", "巴黎市"]),
    ("number", 4, ["2 + 2 = 4.", "答案是4", "1,2,4", "３加１等于４。"], ["4 is 3 + 1", "-4", "14"]),
    ("number", -4, ["x=-4", "it is −4"], ["3-4", "H4"]),
    ("number", 1234.5, ["$1,234.50", "1234.5"], ["1,234", "234.5"]),
    ("regex", r"^\d+ apples$", ["12 apples"], ["12 apples!", "x 12 apples"]),
    ("contains", "Paris", ["in PARIS, France"], ["in Rome"]),
    ("contains", ["a", "b"], ["ab"], ["a"]),
    ("excludes", ["bad", "坏"], ["good"], ["a Bad one", "坏人"]),
    ("min_words", 3, ["one two three", "三个字"], ["one two", "两字"]),
    ("max_words", 3, ["one two three", "三个字"], ["1 2 3 4", "四个字了"]),
    ("min_characters", 3, ["abc"], [" ab "]),
    ("max_characters", 3, [" abc\n"], ["abcd"]),
    ("min_sentences", 2, ["It is 3.14. Yes", "好。是"], ["It is 3.14.", "好。"]),
    ("max_sentences", 1, ["It is 3.14.", "好吗？"], ["One. Two.", "好。是。"]),
    ("paragraphs", 2, ["a\n\nb", "a\n \n\nb\n"], ["a\nb", "a\n\nb\n\nc"]),
    ("bullets", 2, ["- a\n- b", "List:\n* a\n  • b"], ["- a", "1. a\n2. b", "-a\n-b"]),
    ("language", "zh", ["你好，world", "用 torch 训练"], ["hello there 你", "42 cats", "?!"]),
    ("language", "en", ["hello there 你", "hello"], ["你好，world", "..."]),
    ("starts_with", "Dear", ["Dear all"], ["dear all", "My Dear"]),
    ("ends_with", "谢谢！", ["好的，谢谢！\n"], ["谢谢！好"]),
    ("json", True, ['{"a": [1]}', "```json\n[1]\n```", "12"], ["{'a': 1}", '{"a": 1} ok', "x"]),
    ("no_commas", True, ["a b、c"], ["a, b", "甲，乙"]),
    ("lowercase", True, ["all low 1"], ["Not"]),
    ("uppercase", True, ["ALL UP"], ["ALl"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "good", "bad"), CASES, ids=lambda value: str(value)[:20])
def test_each_rule_by_examples(name, value, good, bad):
    ((name, read),) = read_rules({name: value})
    assert {reply: follows(reply, name, read) for reply in good} == dict.fromkeys(good, True)
    assert {reply: follows(reply, name, read) for reply in bad} == dict.fromkeys(bad, False)


def test_every_rule_has_an_example_and_an_empty_reply_follows_none():
    assert {name for name, *_ in CASES} == set(RULES)
    for name, value, *_ in CASES:
        assert not follows(" \n", name, RULES[name].read(value))


def test_texts_and_numbers_are_normalised():
    assert normalised("  Ｔｗｏ　words 。！") == "Two words"
    found = numbers_in("1,000.50, then 3-4, 1,2 and −5; v2 is 10万")
    assert found == [*map(Decimal, ("1000.50", "3", "4", "1", "2", "-5", "10"))]


VALUES = {
    "unknown rule": ({"max_word": 3}, 'rules: found "max_word", expected some of answer, number'),
    "broken regex": ({"regex": "(a"}, "regex: not a regular expression (missing )"),
    "empty answer": ({"answer": " "}, 'answer: found " ", expected a text'),
    "answers": ({"answer": []}, "answer: found [], expected a text"),
    "number": ({"number": "four"}, 'number: found "four", expected a number'),
    "numbers": ({"number": "1 or 2"}, "expected a number"),
    "count": ({"min_words": 1.5}, "min_words: found 1.5, expected a whole number, 0 or more"),
    "true count": ({"max_words": True}, "max_words: found true, expected a number"),
    "language": ({"language": "fr"}, 'language: found "fr", expected en or zh'),
    "switch": ({"json": False}, "json: found false, expected true, or no such rule"),
}


@pytest.mark.parametrize("name", VALUES)
def test_wrong_rules_are_named_with_their_line(write_jsonl, name):
    rules, message = VALUES[name]
    rows = [{"prompt": "q", "answer": "a"}, {"prompt": "q", "rules": rules}]
    with pytest.raises(UserError) as error:
        read_ruled_prompts([write_jsonl("set.jsonl", rows)], on_bad_rows="error")
    assert "set.jsonl:2: " in str(error.value)
    assert message in str(error.value)


ROWS = {
    "no rule": ({"prompt": "q"}, "found no rule, expected some of answer"),
    "no prompt": ({"answer": "a"}, "expected"),
    "twice": ({"prompt": "q", "answer": "a", "rules": {"answer": "b"}}, "the rule answer twice"),
    "no object": ({"prompt": "q", "rules": ["json"]}, "expected an object of rules"),
    "same id": ({"prompt": "q", "answer": "a", "id": "x"}, 'found the id "x" twice'),
    "empty prompt": ({"prompt": "", "answer": "a"}, "expected"),
}


@pytest.mark.parametrize("name", ROWS)
def test_wrong_rows_are_named_with_their_line(write_jsonl, name):
    row, message = ROWS[name]
    rows = [{"prompt": "q", "answer": "a", "id": "x"}, row]
    with pytest.raises(UserError) as error:
        read_ruled_prompts([write_jsonl("set.jsonl", rows)], on_bad_rows="error")
    assert "set.jsonl:2: " in str(error.value)
    assert message in str(error.value)


def test_an_item_counts_only_if_all_its_rules_hold_and_groups_are_by_kind_and_language(
    write_jsonl, chatty
):
    rows = [
        {"prompt": "1 + 1?", "rules": {"starts_with": "it"}, "kind": "sum", "language": "en"},
        {"prompt": "首都？", "answer": "巴黎", "language": "zh"},
        {"messages": [{"role": "user", "content": "list"}], "language": "en",
         "rules": {"bullets": 2, "no_commas": True}},
        {"text": "the dog", "contains": "runs", "min_words": 1, "language": "en"},
    ]  # fmt: skip
    task = RulesTask(read_ruled_prompts([write_jsonl("set.jsonl", rows)]))
    texts = ["<think>\nno, 3\n</think>\n\nit is 2", "伦敦。", "- a, b\n- c", " home\nand runs"]
    subject = Scripted(chatty, [Reply(text, [], True) for text in texts])
    result = task.run(subject)
    assert [sampling.temperature for sampling in subject.samplings] == [0]
    everything = result.section["all"]
    assert everything["n"] == 4
    assert everything["score"] == 0.25
    assert everything["rules"] == 3 / 6
    assert everything["by_rule"]["bullets"] == {"n": 1, "score": 1.0}
    assert everything["by_rule"]["contains"]["score"] == 0  # beyond the first line
    assert {group: each["score"] for group, each in result.section.items() if group != "all"} == {
        "sum": 1, "en": 1 / 3, "answer": 0, "zh": 0, "bullets": 0, "contains": 0,
    }  # fmt: skip
    assert next(iter(result.measures)) == "rules/all"
    assert task.needs_chat
    assert subject.asked[3] == "<|im_end|>the dog"  # as a document in training
    assert subject.asked[0].endswith("1 + 1?<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_that_leave_no_room_for_a_reply_are_left_out_and_counted(write_jsonl, chatty):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "the dog runs " * 199, "answer": "b"}]
    path = write_jsonl("set.jsonl", rows)
    task = RulesTask(read_ruled_prompts([path]), max_new_tokens=64)
    subject = Scripted(chatty, [Reply("b", [], True)])
    result = task.run(subject)
    assert result.section["all"]["too_long"] == 1
    assert result.measures["rules/all"].values == {"set#0": 1.0}
    with pytest.raises(UserError, match=r"--rules: all prompts are too long: .* positions for 0"):
        RulesTask(task.rows, max_new_tokens=512).run(subject)


def test_replies_of_a_model_are_greedy_and_in_the_order_of_the_prompts(model, chatty):
    subject = ModelSubject(model, chatty)
    prompts = [chatty(text).input_ids for text in ("the quick brown fox", "a", "dog runs")]
    found = subject.replies(prompts, Sampling(1, 5, 0.0, 1.0, 0, 2))
    alone = [complete(model, chatty, [each], 5)[0] for each in prompts]
    assert [reply.text for reply in found] == alone


def test_controls_take_the_models_place_where_there_are_choices_and_not_where_it_replies(
    model, chatty, write_jsonl
):
    row = {"question": "the dog", "choices": ["runs", "fox"], "answer": 0}
    questions, _ = read_multiple_choice([write_jsonl("q.jsonl", [row, row, row, row])])
    asked = write_jsonl("rules.jsonl", [{"prompt": "q", "answer": "a"}])
    tasks = [
        ChoicesTask(questions),
        RulesTask(read_ruled_prompts([asked])),
        RepliesTask(read_referenced_prompts([write_jsonl("plain.jsonl", [{"prompt": "q"}])])),
    ]
    section = controls(lambda: ModelSubject(model, chatty), tasks, []).section
    assert {*section["random"]} == {*section["shuffled"]} == {"choices"}
    assert section["length"]["choices"]["all"]["cloze_tokens"] == 0.5  # every token is as probable


@pytest.fixture
def stage(tmp_path, chatty, model):
    """A directory with a model that can be asked."""
    model.save_pretrained(tmp_path / "sft")
    save_tokenizer(chatty, tmp_path / "sft")
    (tmp_path / "sft/stage.json").write_text(json.dumps({"stage": "sft"}))
    return tmp_path / "sft"


def test_a_base_model_is_refused_before_it_is_loaded_where_it_is_asked_as_a_chat(
    stage, write_jsonl, capsys, monkeypatch
):
    monkeypatch.delattr("minimind.score_card.card.load_for_generation")
    choices = write_jsonl("q.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    rules = write_jsonl("rules.jsonl", [{"prompt": "q", "answer": "a"}])
    asking = {"choices": (choices, "--chat"), "rules": (rules,), "replies": (rules,)}
    for name, (file, *options) in asking.items():
        for change in (
            lambda: (stage / "stage.json").write_text(json.dumps({"stage": "pretrain"})),
            lambda: (stage / "chat_template.jinja").unlink(missing_ok=True),
        ):
            change()
            error = failure(capsys, run_cli, "evaluate", str(stage), f"--{name}", file, *options)
            assert f"has not learned to answer the questions of {name}, expected a chat" in error


def test_the_command_keeps_each_reply_and_what_was_wrong_with_it(
    stage, write_jsonl, tmp_path, capsys
):
    file = write_jsonl("rules.jsonl", [{"text": "the dog", "rules": {"json": True}, "id": "x"}])
    out = tmp_path / "out"
    command = "evaluate", stage, "--rules", file, "--max_new_tokens", 3, "--output", out
    run_cli(*command)
    printed = capsys.readouterr().out
    (line,) = map(json.loads, (out / "items.jsonl").read_text().splitlines())
    assert line["item"] == "rules/x"
    assert line["values"] == {"rules/all": 0.0}
    assert line["broken"] == ["json"]
    assert isinstance(line["reply"], str)
    (out / "items.jsonl").unlink()
    run_cli(*command)  # from the kept results
    assert capsys.readouterr().out == printed
    assert json.loads((out / "items.jsonl").read_text()) == line


WRONG = {
    ("--chat",): "--chat and --num_shots: found no --choices that they could belong to",
    ("--decoding", "greedy"): "--decoding: found no --replies",
    ("--rules", "{file}", "--max_new_tokens", "0"): "--max_new_tokens 0: --rules and --replies",
}


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_options_without_their_task_are_refused(options, write_jsonl, tmp_path, capsys):
    file = write_jsonl("rules.jsonl", [{"prompt": "q", "answer": "a"}])
    options = [word.format(file=file) for word in options]
    error = failure(capsys, run_cli, "evaluate", tmp_path, *options)
    assert error.startswith(WRONG[tuple(w.replace(file, "{file}") for w in options)])


def test_the_guides_name_every_rule_and_no_other():
    for guide in ("docs/evaluate.md", "docs/evaluate_zh.md"):
        text = (Path(__file__).parents[1] / guide).read_text(encoding="utf-8")
        (table,) = re.findall(r"\| (?:rule|规则) \|.*?\n\n", text, re.DOTALL)
        names = " ".join(line.split("|")[1] for line in table.splitlines() if line)
        named = re.findall(r"`(\w+)`", names)
        assert sorted(named) == sorted(RULES)
