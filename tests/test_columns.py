"""Whatever is in a row is used, or named: layouts of public data sets, with contents made up
here."""

import json
import re
from pathlib import Path

import pytest
from pipeline import assistant, result, user

from minimind.cleaning import clean
from minimind.cleaning.row_texts import RowTexts, check_row
from minimind.common.errors import UserError
from minimind.data.columns import NAMES, Columns
from minimind.data.conversations import to_conversation, to_messages
from minimind.data.files import BadRowError, expand, read_rows, to_document
from minimind.data.preferences import to_preference

TALK = [user("hi"), assistant("hello")]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def system(content):
    return {"role": "system", "content": content}


def call(**arguments):
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


def unread(rows, convert=to_conversation, **options):
    """The columns with text that a reading of `rows` left out, each with the number of its rows."""
    columns = Columns(**options)
    for number, row in enumerate(rows, 1):
        fields = columns.fields(row)
        convert(fields)
        columns.count(f"a.jsonl:{number}", fields)
    return {name: count for name, count, *_ in columns.findings()}


@pytest.mark.parametrize("guide", ["data.md", "data_zh.md"])
def test_the_guide_lists_every_name_of_every_meaning(guide):
    text = (Path(__file__).parent.parent / "docs" / guide).read_text(encoding="utf-8")
    for meaning, names in NAMES.items():
        (row,) = re.findall(rf"^\| `{meaning}` \| .* \| (`.*) \|$", text, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == list(names)


# Columns with one meaning


@pytest.mark.parametrize(
    "name", ["system", "system_prompt", "system_message", "systemInstruction", "sys_prompt"]
)
def test_a_system_prompt_is_used_under_any_usual_name(name):
    pair = {"question": "hi", "response": "hello", name: "be brief"}
    assert to_messages(pair) == [system("be brief"), *TALK]
    preferred = to_preference({"question": "hi", "chosen": "a", "rejected": "b", name: "be brief"})
    assert preferred["prompt"] == [system("be brief"), user("hi")]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many?", "context": "CREATE TABLE t", "answer": "SELECT 1"},
        {"instruction": "How many?", "context": "CREATE TABLE t", "output": "SELECT 1"},
        {"instruction": "How many?", "input": "CREATE TABLE t", "output": "SELECT 1"},
        {"prompt": "How many?", "passage": "CREATE TABLE t", "completion": "SELECT 1"},
        {"Question": "How many?", "Context": "CREATE TABLE t", "Answer": "SELECT 1"},
    ],
)
def test_what_a_question_is_about_stands_in_its_message(row):
    assert to_messages(row) == [user("How many?\nCREATE TABLE t"), assistant("SELECT 1")]
    assert unread([row]) == {}


@pytest.mark.parametrize(
    "choices",
    [
        {"A": "red", "B": "blue", "answer": "B"},
        {"choices": ["red", "blue"], "answer": 1},
        {"choices": {"label": ["A", "B"], "text": ["red", "blue"]}, "answerKey": "B"},
        {"options": '["red", "blue"]', "answer": "B"},
    ],
)
def test_the_choices_of_a_question_stand_in_its_message(choices):
    row = {"id": 3, "question": "Which?", **choices}
    assert to_messages(row) == [user("Which?\nA. red\nB. blue"), assistant("B")]
    assert unread([row]) == {}


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "Complex_CoT", "rationale"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "output": "hello"},
        {"messages": TALK},
        {"input": "hi", "content": "hello"},
    ],
)
def test_reasoning_in_a_column_belongs_to_the_last_reply(row, name):
    assert to_messages({**row, name: "why"}) == [
        user("hi"),
        assistant("hello", reasoning_content="why"),
    ]


def test_a_reply_beside_its_reasoning_is_no_document():
    row = {"input": "hi", "content": "hello", "reasoning_content": "why"}
    with pytest.raises(BadRowError, match="a reply and its reasoning, expected a document"):
        to_document(row)
    with pytest.raises(BadRowError, match="one message of a conversation, expected a document"):
        to_document({"message_id": "1", "text": "hi", "role": "prompter"})


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"functions": json.dumps([TOOL["function"]])},
        {"tools_json": json.dumps([TOOL])},
        {
            "chat_template_kwargs": {
                "xml_tools": [json.dumps(TOOL)],
                "python_tools": None,
                "enable_thinking": False,
            }
        },
    ],
)
def test_tools_are_used_under_any_usual_name(columns):
    assert to_conversation({"messages": TALK, **columns}).tools == [TOOL]


def test_the_system_prompt_of_a_rows_template_arguments_is_used():
    kwargs = {
        "custom_instructions": "be brief",
        "enable_thinking": False,
        "documents": "a long text of two words",
    }
    row = {"messages": TALK, "chat_template_kwargs": kwargs}
    assert to_messages(row) == [system("be brief"), *TALK]
    assert unread([row]) == {"documents": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"query": "hi", "response": "hello", "history": "[]"},
        {"input": "hi", "target": "hello", "kind": "Couplet"},
        {"problem": "hi", "solution": "hello"},
        {"messages": json.dumps(TALK)},
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "hello"]}},
        {"conversation": [{"human": "hi", "assistant": "hello"}]},
        {
            "conversations": [
                {"from": "User", "value": "hi"},
                {"from": "Assistant", "value": "hello"},
            ]
        },
        {
            "contents": [
                {"role": "user", "parts": [{"text": "hi"}]},
                {"role": "model", "parts": [{"text": "hello"}]},
            ]
        },
        {"prompt": json.dumps(TALK[:1]), "completion": json.dumps(TALK[1:])},
        {"text": "### Human: hi### Assistant: hello"},
    ],
)
def test_other_layouts_of_a_conversation_are_recognised(row):
    assert to_messages(row) == TALK
    assert unread([row]) == {}


# Columns that nobody reads


def test_text_that_nobody_reads_is_counted_by_column():
    rows = [
        {
            "question": "q",
            "answer": "a",
            "hint": "think of two",
            "score": 0.5,
            "source": "a long name, in words",
        },
        {
            "question": "q",
            "answer": "a",
            "hint": "think of three",
            "language": "English",
            "id": "x y z",
        },
        {
            "question": "q",
            "answer": "a",
            "hint": None,
            "tier": "gold",
            "dataType": "百科",
            "copyright": "of them all",
            "meta": {"note": "of the maker"},
        },
        {
            "messages": [user("q"), assistant("a", citations=["read this book"])],
            "n": 3,
            "empty": " ",
        },
    ]
    assert unread(rows) == {"hint": 2, "messages.citations": 1}
    assert (
        unread(rows, unread=["hint", "messages.citations"]) == unread(rows, unread=["ignore"]) == {}
    )


def test_text_that_another_column_repeats_is_not_lost():
    assert unread([{"prompt": "hi", "messages": TALK}]) == {}
    assert unread([{"prompt": "other", "messages": TALK}]) == {"prompt": 1}
    pair = {"prompt": "hi", "chosen": "a b", "rejected": "c d", "generations": ["a b", "c d"]}
    assert unread([pair], to_preference) == {}
    assert unread([{**pair, "generations": ["e f"]}], to_preference) == {"generations": 1}
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "text": "An instruction.\nAdd.\n1 2\nResponse: 3",
    }
    assert unread([row]) == {}
    assert unread([{**row, "input": "4 5"}]) == {"text": 1}
    assert unread([{"text": "a", "summary": "of the text"}], to_document) == {"summary": 1}


def test_columns_with_names_of_their_own_are_read_as_they_are_mapped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"问题": "hi", "回答": "hello", "prompt": "an older one"}) + "\n",
        encoding="utf-8",
    )
    columns = Columns(["prompt=问题", "response=回答"])
    assert [row.data for row in read_rows([str(path)], "error", to_messages, columns=columns)] == [
        TALK
    ]
    with pytest.raises(
        UserError, match="found no row with '题', only the columns '问题', '回答', 'prompt'"
    ):
        list(
            read_rows(
                [str(path)],
                "skip",
                to_messages,
                columns=Columns(["prompt=题", "response=回答"][:1]),
            )
        )
    for wrong in ("问题", "prompt=", "ask=问题"):
        with pytest.raises(UserError, match=f"--columns {wrong}: expected MEANING=COLUMN"):
            Columns([wrong])


# Marks of what nobody should learn


@pytest.mark.parametrize(
    "mark",
    [
        *({name: False} for name in ("train", "training", "trainable", "train_on_turn", "loss")),
        *(
            {"loss": "false"},
            {"loss": 0},
            {"loss_weight": 0.0},
            {"weight": "0"},
            {"masked": True},
            {"loss_mask": 0},
        ),
        *({"weight": 1, "train": False}, {"loss_weight": 1.0, "loss": False}),
    ],
)
def test_a_reply_marked_as_not_trained_has_the_weight_0(mark):
    row = {"messages": [user("a"), assistant("bad", **mark), user("b"), assistant("good")]}
    assert [m.get("weight") for m in to_messages(row) if m["role"] == "assistant"] == [0.0, None]


@pytest.mark.parametrize(
    "mark",
    [
        *({"label": value} for value in (False, 0, "false", "0")),
        *(
            {"kto_tag": False},
            {"desirable": "no"},
            {"is_correct": False},
            {"rejected": True},
            {"chosen": False},
        ),
        *(
            {"score": -1},
            {"score": 0},
            {"reward": False},
            {"rating": "rejected"},
            {"feedback": "thumbs_down"},
        ),
        *({"votes": -3}, {"label": "dispreferred"}),
    ],
)
def test_a_row_marked_as_rejected_is_refused_unless_its_mark_is_left_out(mark):
    (name,) = mark
    row = {"prompt": "hi", "completion": "hello", **mark}
    with pytest.raises(BadRowError, match=f"found '{name}': .*, the mark of a rejected reply"):
        to_messages(row)
    assert to_messages(Columns(unread=[name]).fields(row)) == TALK
    kept = {
        "label": True,
        "kto_tag": 1,
        "score": 3,
        "rating": 0.5,
        "reward": -1.5,
        "votes": 0,
        "feedback": "good",
    }
    assert to_messages({"prompt": "hi", "completion": "hello", **kept}) == TALK


# Tools and parts


@pytest.mark.parametrize(
    ("reply", "results"),
    [
        (
            assistant('<tool_call>\n{"name": "look", "arguments": {"at": "Lomo"}}\n</tool_call>'),
            [result("21")],
        ),
        (
            assistant("<tool_call>{'name': 'look', 'arguments': {'at': 'Lomo'}}</tool_call>"),
            [result("21")],
        ),
        (
            assistant('{"name": "look", "arguments": {"at": "Lomo"}}'),
            [{"role": "observation", "content": "21"}],
        ),
        (assistant('{"at": "Lomo"}', metadata="look"), [{"role": "observation", "content": "21"}]),
        (assistant('look\n{"at": "Lomo"}'), [{"role": "observation", "content": "21"}]),
        (assistant('[look(at="Lomo")]'), [{"from": "tool", "value": "21"}]),
        (
            {"role": "tool_call", "content": '{"name": "look", "arguments": {"at": "Lomo"}}'},
            [result("21")],
        ),
        (
            assistant([{"type": "tool_use", "name": "look", "input": {"at": "Lomo"}}]),
            [result("21")],
        ),
        (assistant("", tool_calls=[call(at="Lomo")]), [result([{"type": "text", "text": "21"}])]),
        (
            assistant("", tool_calls=[call(at="Lomo")]),
            [result("<tool_response>\n21\n</tool_response>")],
        ),
        (
            assistant("", tool_calls=[call(at="Lomo")]),
            [user([{"type": "tool_result", "content": "21"}])],
        ),
    ],
)
def test_a_call_and_its_result_are_understood_in_every_spelling(reply, results):
    row = {"messages": [user("Lomo?"), reply, *results, assistant("21 degrees")]}
    expected = [
        user("Lomo?"),
        assistant("", tool_calls=[call(at="Lomo")]),
        result("21"),
        assistant("21 degrees"),
    ]
    assert to_messages(row) == expected
    assert unread([row]) == {}


def test_calls_that_follow_each_other_or_a_thought_are_one_reply():
    calls = [
        {"role": "tool_call", "content": json.dumps({"name": "look", "arguments": {"at": a}})}
        for a in "xy"
    ]
    results = result("<tool_response>1</tool_response>\n<tool_response>2</tool_response>")
    row = {
        "messages": [
            user("?"),
            assistant("<think>\nwhy\n</think>\nWell."),
            *calls,
            results,
            assistant("so"),
        ]
    }
    assert to_messages(row) == [
        user("?"),
        assistant("Well.", reasoning_content="why", tool_calls=[call(at="x"), call(at="y")]),
        *(result("1"), result("2"), assistant("so")),
    ]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            "I will look.",
            [
                'found the reply "I will look." before a tool',
                "no call was understood in it, expected",
            ],
        ),
        (
            "<tool_call>{name: look}</tool_call>",
            ["no call was understood in it (", "expected JSON"],
        ),
        ('<tool_call>{"name": "look"}</tool_call> Wait.', ['(text after a </tool_call>: "Wait.")']),
        ('<tool_call>{"name": "look"}', ["(a <tool_call> that is not closed)"]),
    ],
)
def test_a_result_without_a_call_names_the_reply_in_which_none_was_understood(reply, words):
    with pytest.raises(BadRowError) as caught:
        to_messages({"messages": [user("?"), assistant(reply), result("21"), assistant("so")]})
    assert str(caught.value).startswith("messages[1]: found the reply")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "part", [{"type": "text", "text": "hi"}, {"type": "text", "value": "hi"}, {"text": "hi"}, "hi"]
)
def test_parts_of_text_are_read_in_every_role(part):
    row = {
        "messages": [{"role": role, "content": [part]} for role in ("system", "user", "assistant")]
    }
    assert to_messages(row) == [system("hi"), user("hi"), assistant("hi")]
    thought = {"messages": [user("hi"), assistant([{"type": "thinking", "thinking": "why"}, part])]}
    assert to_messages(thought) == [user("hi"), assistant("hi", reasoning_content="why")]
    with pytest.raises(
        BadRowError, match='found a part of type "image_url" in the content, expected text only'
    ):
        to_messages(
            {"messages": [user([part, {"type": "image_url", "image_url": {}}]), assistant("x")]}
        )


# Reasoning and white space


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            assistant("<think>\nwhy\n</think>\n\nhello", reasoning_content="why"),
            {"reasoning_content": "why"},
        ),
        (
            assistant("<think>\n\n</think>\n\nhello", reasoning_content="why"),
            {"reasoning_content": "why"},
        ),
        (assistant("\nhello", reasoning_content="why"), {"reasoning_content": "why"}),
        (assistant("hello", thinking=True), {}),
        (assistant("\n \nhello"), {}),
        (assistant(" hello"), {}),
    ],
)
def test_a_thought_counts_once_and_a_reply_begins_with_its_words(reply, expected):
    assert to_messages({"messages": [user("hi"), reply], "reasoning": "off"}) == [
        user("hi"),
        assistant("hello", **expected),
    ]


def test_a_text_about_the_think_tag_is_no_thought_and_code_keeps_its_indentation():
    for text in ("Write this line:\n</think>\nand go on.", "    return 1"):
        assert to_messages({"messages": [user("?"), assistant(text)]}) == [
            user("?"),
            assistant(text),
        ]


def test_two_different_thoughts_of_one_reply_are_refused():
    with pytest.raises(BadRowError, match="two different thoughts"):
        to_messages(
            {"messages": [user("?"), assistant("<think>\na\n</think>\n\nb", reasoning_content="c")]}
        )


# Dialogues in one string


@pytest.mark.parametrize(
    "row",
    [
        {
            "instruction": "Human: hi\nAssistant: hello\nHuman: more?\nAssistant:",
            "input": "",
            "output": "no",
        },
        {"prompt": "User: hi\n\nAssistant: hello\n\nUser: more?", "completion": " no"},
        {"text": "用户：hi\n助手：hello\n用户：more?\n助手：no"},
    ],
)
def test_a_dialogue_in_one_string_is_parsed(row):
    assert to_messages(row) == [*TALK, user("more?"), assistant("no")]


def test_dialogues_of_pairs_are_parsed():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?\n\nAssistant:"
    expected = {
        "prompt": [*TALK, user("more?")],
        "chosen": [assistant("yes")],
        "rejected": [assistant("no")],
    }
    assert to_preference({"chosen": f"{start} yes", "rejected": f"{start} no"}) == expected
    assert to_preference({"prompt": start, "chosen": " yes", "rejected": " no"}) == expected


def test_a_dialogue_whose_voices_do_not_alternate_is_refused():
    with pytest.raises(
        BadRowError, match="prompt: found a dialogue in one string with the voices Human:, Human:"
    ):
        to_messages({"prompt": "Human: a\nHuman: b\nAssistant: c", "completion": "d"})


# Pairs


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "rejected_response": "no"},
        {"messages": TALK, "rejected_messages": [TALK[0], assistant("no")]},
        {"query": "hi", "response": "hello", "rejected_response": "no"},
        {
            "input": {"messages": TALK[:1]},
            "preferred_output": TALK[1:],
            "non_preferred_output": [assistant("no")],
        },
        {"chosen_messages": TALK, "rejected_messages": [TALK[0], assistant("no")]},
        {"input": "hi", "chosen": "hello", "rejected": "no", "generations": ["hello", "no"]},
        {"prompt": "hi\n", "chosen": TALK, "rejected": [TALK[0], assistant("no")]},
    ],
)
def test_other_layouts_of_a_pair_are_recognised(row):
    assert to_preference(row) == {
        "prompt": TALK[:1],
        "chosen": TALK[1:],
        "rejected": [assistant("no")],
    }
    assert unread([row], to_preference) == {}


def test_a_prompt_may_be_any_question_of_the_conversations_it_stands_beside():
    talk = [*TALK, user("more?")]
    for prompt in ("hi", "more?"):
        row = {
            "prompt": prompt,
            "chosen": [*talk, assistant("a")],
            "rejected": [*talk, assistant("b")],
        }
        assert to_preference(row)["prompt"] == talk


# Files


@pytest.mark.parametrize(
    "text",
    [
        '{\n "instruction": "hi",\n "output": "hello"\n}',
        '{"instruction": "hi", "output": "hello"}',
        '{"instruction": "hi", "output": "hello"},',
        '{"version": "1.0", "data": [{"instruction": "hi", "output": "hello"}]}',
        (
            '{\n"train": [{"instruction": "hi", "output": "hello"}],\n"test": [{"instruction": "x",'
            ' "output": "y"}]}'
        ),
        (
            '{"rows": [{"row_idx": 0, "row": {"instruction": "hi", "output": "hello"},'
            ' "truncated_cells": []}]}'
        ),
        '{"instruction": ["hi"], "output": ["hello"]}',
        '{"instruction": {"0": "hi"}, "output": {"0": "hello"}}',
        '{"columns": ["instruction", "output"], "index": [0], "data": [["hi", "hello"]]}',
        (
            '{"made_by": "us", "chats": [{"messages": [{"role": "user", "content": "hi"}, '
            '{"role": "assistant", "content": "hello"}]}]}'
        ),
    ],
)
def test_a_json_file_of_one_object_is_read_as_what_it_is(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert [row.data for row in read_rows([str(tmp_path / "a.json")], "error", to_messages)] == [
        TALK
    ]


def test_objects_over_several_lines_are_read_one_after_the_other(tmp_path):
    text = '{\n "instruction": "hi",\n "output": "hello"\n}\n'
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(text * 3, encoding="utf-8")
        rows = list(read_rows([str(tmp_path / name)], "error", to_messages))
        assert [row.where.rsplit(":", 1)[1] for row in rows] == ["1", "5", "9"]
        assert [row.data for row in rows] == [TALK] * 3


def test_a_directory_keeps_the_parts_that_are_named_for_evaluation_out(tmp_path, caplog):
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation", "contest", "x_eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    assert [path.stem for path in expand([str(tmp_path)])] == ["contest", "train-00000-of-00001"]
    assert (
        "left out 3 of 5 files, which are named as held-out data: test-00000-of-00001.jsonl"
        in caplog.text
    )
    assert [path.stem for path in expand([str(tmp_path / "validation.jsonl")])] == ["validation"]
    only = tmp_path / "contest.jsonl"
    for path in tmp_path.iterdir():
        if "test-" in path.name or path == only or "train" in path.name:
            path.unlink()
    assert [path.stem for path in expand([str(tmp_path)])] == ["validation", "x_eval"]


def test_columns_whose_names_differ_in_case_alone_are_both_kept():
    row = {
        "prompt": "hi",
        "completion": "hello",
        "Notes": "of two words",
        "notes": "of other words",
        "x": None,
    }
    assert unread([row]) == {"Notes": 1, "notes": 1}


def test_a_cleaning_writes_rows_under_the_names_that_they_are_read_by(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"问题": "hi  there", "回答": "hello"}) + "\n", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [whitespace]\n")
    names = ["prompt=问题", "response=回答"]
    clean([str(path)], tmp_path / "out", recipe, num_proc=1, columns=names)
    cleaned = next((tmp_path / "out").glob("data-*.jsonl"))
    row = json.loads(cleaned.read_text(encoding="utf-8"))
    assert list(row) == ["prompt", "response"]
    again = Columns(names, cleaned=True)
    read = [row.data for row in read_rows([str(cleaned)], "error", to_messages, columns=again)]
    assert [message["content"] for message in read[0]] == list(row.values())


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        (
            {"query": "a", "response": "b", "rejected_response": "c"},
            {"query": "A", "response": "B", "rejected_response": "C"},
        ),
        (
            {"question": "a", "context": "b", "answer": "c"},
            {"question": "A", "context": "B", "answer": "C"},
        ),
        (
            {"Question": "a", "A": "b", "B": "c", "Answer": "d"},
            {"Question": "A", "A": "B", "B": "C", "Answer": "D"},
        ),
        (
            {"system_prompt": "a", "prompt": "b", "response": "c"},
            {"system_prompt": "A", "prompt": "B", "response": "C"},
        ),
        (
            {"input": "a", "content": "b", "reasoning_content": "c"},
            {"input": "A", "content": "B", "reasoning_content": "C"},
        ),
    ],
)
def test_a_cleaning_changes_the_texts_of_every_layout(row, texts):
    assert RowTexts(check_row(row)).replace(str.upper) == (True, False)
    assert row == texts
