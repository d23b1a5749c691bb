"""Whatever is in a row is used, or named: layouts of public data sets, with contents made up
here."""

import json
import re
from pathlib import Path

import pytest
from pipeline import assistant, user
from reading import TALK, system, unread

from minimind.cleaning import clean
from minimind.cleaning.row_texts import RowTexts, check_row
from minimind.common.errors import BadRowError, UserError
from minimind.data.columns import NAMES, Columns
from minimind.data.conversations import to_conversation, to_messages
from minimind.data.files import read_rows, to_document
from minimind.data.preferences import to_preference

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


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
def test_the_context_of_a_question_is_part_of_its_message(row):
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
def test_the_choices_of_a_question_are_part_of_its_message(choices):
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


def test_columns_with_unusual_names_are_read_as_they_are_mapped(tmp_path):
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


def test_columns_whose_names_differ_only_in_case_are_both_kept():
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
