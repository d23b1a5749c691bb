import json

import pytest

from minimind.data.conversations import to_messages
from minimind.data.files import BadRowError, read_rows
from minimind.errors import UserError


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def turn(who, value):
    return {"from": who, "value": value}


TALK = [user("hi"), assistant("hello")]
LONGER = [system("be brief"), user("hi"), assistant("hello"), user("more?"), assistant("no")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": TALK}, TALK),
        ({"conversations": LONGER}, LONGER),
        ({"conversations": LONGER[1:], "system": "be brief"}, LONGER),
        ({"conversations": LONGER, "system": "be brief"}, LONGER),
        ({"messages": LONGER, "id": 7}, LONGER),
        ({"messages": [dict(user("hi"), name=None, tool_calls=None), assistant("hello")], "tools": None}, TALK),
        ({"conversations": [dict(m, tools="", tool_calls="") for m in TALK], "tools": "[]"}, TALK),
        ({"messages": None, "conversations": [turn("human", "hi"), turn("gpt", "hello")], "system": ""}, TALK),
        *(
            ({"conversations": [turn(a, "hi"), turn(b, "hello")]}, TALK)
            for a, b in [("user", "assistant"), ("human", "chatgpt"), ("human", "bot")]
        ),
        (
            {"conversations": [turn("system", "be brief"), turn("human", "hi"), turn("gpt", "hello")]},
            [system("be brief"), *TALK],
        ),
        ({"instruction": "hi", "output": "hello"}, TALK),
        ({"instruction": "hi", "input": "", "output": "hello", "system": None, "history": None}, TALK),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [user("add\n1 2"), assistant("3")]),
        (
            {"instruction": "more?", "output": "no", "system": "be brief", "history": [["hi", "hello"]]},
            LONGER,
        ),
        ({"prompt": "hi", "completion": "hello"}, TALK),
        ({"prompt": [user("hi")], "completion": [assistant("hello")]}, TALK),
        ({"prompt": "hi", "response": "hello"}, TALK),
        ({"question": "hi", "answer": "hello", "system": "be brief"}, [system("be brief"), *TALK]),
    ],
)
def test_each_format_is_recognised_by_its_keys(row, messages):
    assert to_messages(row) == messages


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, ['found keys ["text"]', "expected 'messages' or 'conversations'", "'instruction'"]),
        ({"instruction": "x"}, ['found keys ["instruction"]', "'output'"]),
        ({"messages": []}, ["messages: found []", "expected a list of messages"]),
        ({"messages": "hi"}, ['messages: found "hi"', "expected a list of messages"]),
        ({"messages": ["hi"]}, ['messages[0]: found "hi"', "expected an object"]),
        ({"messages": [{"content": "hi"}]}, ['messages[0]: found keys ["content"]', "expected a 'role'"]),
        (
            {"messages": [{"role": ["user"], "content": "hi"}]},
            ['messages[0]: found role ["user"]', "expected a 'role'"],
        ),
        ({"messages": [user("hi"), {"role": "cat", "content": "x"}]}, ['messages[1]: found role "cat"', "expected"]),
        ({"messages": [user(None), assistant("x")]}, ["messages[0]: found the content null", "a string"]),
        ({"messages": [user([{"type": "text"}])]}, ['messages[0]: found the content [{"type"', "a string"]),
        ({"messages": [assistant("x"), user("hi")]}, ["messages[0]: found the role 'assistant'", "expected 'user'"]),
        ({"conversations": [*TALK, *TALK[1:]]}, ["conversations[2]: found the role 'assistant'", "expected 'user'"]),
        ({"messages": [user("a"), user("b")]}, ["messages[1]: found the role 'user'", "expected 'assistant'"]),
        ({"messages": [*TALK, system("late")]}, ["messages[2]: found the role 'system'", "expected 'user'"]),
        ({"messages": [*TALK, user("and?")]}, ["messages[2]: found the role 'user' last", "the assistant's"]),
        ({"messages": [system("alone")]}, ["messages[0]: found the role 'system' last", "the assistant's"]),
        ({"messages": [user("hi"), assistant(" \n")]}, ["messages[1]: found an empty reply", "expected text"]),
        ({"messages": LONGER, "system": "be long"}, ["two system prompts", "expected one"]),
        ({"messages": TALK, "system": 1}, ["system: found 1", "expected a string"]),
        ({"instruction": 1, "output": "x"}, ["instruction: found 1", "expected a string"]),
        ({"instruction": "x", "input": 1, "output": "x"}, ["input: found 1", "expected a string"]),
        ({"instruction": "x", "output": 1}, ["output: found 1", "expected a string"]),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, ['history[0]: found ["a"]', "expected a pair"]),
        ({"instruction": "x", "output": ""}, ["messages[1]: found an empty reply", "expected text"]),
        ({"prompt": 1, "completion": "x"}, ["prompt: found 1", "expected a string"]),
    ],
)
def test_a_conversation_out_of_order_says_which_message_what_was_found_and_expected(row, words):
    with pytest.raises(BadRowError) as caught:
        to_messages(row)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TALK, "tools": '[{"name": "clock"}]'},
        {"messages": TALK, "tools": [{"name": "clock"}]},
        {"messages": [dict(system(""), tools="[{}]"), *TALK]},
        {"messages": [user("hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        {"messages": [user("hi"), {"role": "tool", "content": "12:00"}]},
        {"conversations": [turn("human", "hi"), turn("function_call", "{}")]},
        {"conversations": [turn("human", "hi"), turn("observation", "{}")]},
    ],
)
def test_tool_conversations_are_refused_with_one_clear_message(row):
    with pytest.raises(BadRowError, match="tool conversations are not supported yet"):
        to_messages(row)


def test_separate_reasoning_is_refused_rather_than_lost():
    row = {"messages": [user("hi"), dict(assistant("hello"), reasoning_content="a greeting")]}
    with pytest.raises(BadRowError, match=r"messages\[1\]: found 'reasoning_content'.*not supported yet"):
        to_messages(row)


def test_files_may_mix_formats_and_a_bad_conversation_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"messages": TALK}, {"messages": [user("hi")]}, {"instruction": "hi", "output": "hello"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [row.data for row in read_rows([str(path)], "skip", to_messages)] == [TALK, TALK]
    with pytest.raises(UserError) as caught:
        list(read_rows([str(path)], None, to_messages))
    assert str(caught.value).startswith(f"{path}:2: messages[0]: found the role 'user' last, expected")
