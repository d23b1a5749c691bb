import json

import pytest
from pipeline import assistant, result, user
from reading import TALK, system, turn

from minimind.common.errors import BadRowError, UserError
from minimind.data.conversations import Conversation, to_conversation, to_messages, to_text
from minimind.data.files import read_rows

LONGER = [system("be brief"), user("hi"), assistant("hello"), user("more?"), assistant("no")]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": TALK}, TALK),
        ({"conversations": LONGER}, LONGER),
        ({"conversations": LONGER[1:], "system": "be brief"}, LONGER),
        ({"conversations": LONGER, "system": "be brief"}, LONGER),
        ({"messages": LONGER, "id": 7}, LONGER),
        (
            {
                "messages": [dict(user("hi"), name=None, tool_calls=None), assistant("hello")],
                "tools": None,
            },
            TALK,
        ),
        ({"conversations": [dict(m, tools="", tool_calls="") for m in TALK], "tools": "[]"}, TALK),
        (
            {
                "messages": None,
                "conversations": [turn("human", "hi"), turn("gpt", "hello")],
                "system": "",
            },
            TALK,
        ),
        *(
            ({"conversations": [turn(a, "hi"), turn(b, "hello")]}, TALK)
            for a, b in [("user", "assistant"), ("human", "chatgpt"), ("human", "bot")]
        ),
        (
            {
                "conversations": [
                    turn("system", "be brief"),
                    turn("human", "hi"),
                    turn("gpt", "hello"),
                ]
            },
            [system("be brief"), *TALK],
        ),
        ({"instruction": "hi", "output": "hello"}, TALK),
        (
            {"instruction": "hi", "input": "", "output": "hello", "system": None, "history": None},
            TALK,
        ),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [user("add\n1 2"), assistant("3")]),
        (
            {
                "instruction": "more?",
                "output": "no",
                "system": "be brief",
                "history": [["hi", "hello"]],
            },
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
        (
            {"text": "x"},
            ['found keys ["text"]', "expected 'messages' or 'conversations'", "'instruction'"],
        ),
        ({"instruction": "x"}, ['found keys ["instruction"]', "'output'"]),
        ({"messages": []}, ["messages: found []", "expected a list of messages"]),
        ({"messages": "hi"}, ['messages: found "hi"', "expected a list of messages"]),
        ({"messages": ["hi"]}, ['messages[0]: found "hi"', "expected an object"]),
        (
            {"messages": [{"content": "hi"}]},
            ['messages[0]: found keys ["content"]', "expected a 'role'"],
        ),
        (
            {"messages": [{"role": ["user"], "content": "hi"}]},
            ['messages[0]: found role ["user"]', "expected a 'role'"],
        ),
        (
            {"messages": [user("hi"), {"role": "cat", "content": "x"}]},
            ['messages[1]: found role "cat"', "expected"],
        ),
        (
            {"messages": [user(None), assistant("x")]},
            ["messages[0]: found the content null", "a string"],
        ),
        (
            {"messages": [user([{"type": "text"}])]},
            ['messages[0]: found the content [{"type"', "a string"],
        ),
        (
            {"messages": [assistant("x"), user("hi")]},
            ["messages[0]: found the role 'assistant'", "expected 'user'"],
        ),
        (
            {"conversations": [*TALK, *TALK[1:]]},
            ["conversations[2]: found the role 'assistant'", "expected 'user'"],
        ),
        (
            {"messages": [user("a"), user("b")]},
            ["messages[1]: found the role 'user'", "expected 'assistant'"],
        ),
        (
            {"messages": [*TALK, system("late")]},
            ["messages[2]: found the role 'system'", "expected 'user'"],
        ),
        (
            {"messages": [*TALK, user("and?")]},
            ["messages[2]: found the role 'user' last", "the assistant's"],
        ),
        (
            {"messages": [system("alone")]},
            ["messages[0]: found the role 'system' last", "the assistant's"],
        ),
        (
            {"messages": [user("hi"), assistant(" \n")]},
            ["messages[1]: found an empty reply", "expected text"],
        ),
        ({"messages": LONGER, "system": "be long"}, ["two system prompts", "expected one"]),
        ({"messages": TALK, "system": 1}, ["system: found 1", "expected a string"]),
        ({"instruction": 1, "output": "x"}, ["instruction: found 1", "expected a string"]),
        ({"instruction": "x", "input": 1, "output": "x"}, ["input: found 1", "expected a string"]),
        ({"instruction": "x", "output": 1}, ["output: found 1", "expected a string"]),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            ['history[0]: found ["a"]', "expected a pair"],
        ),
        (
            {"instruction": "x", "output": ""},
            ["messages[1]: found an empty reply", "expected text"],
        ),
        ({"prompt": 1, "completion": "x"}, ["prompt: found 1", "expected a string"]),
    ],
)
def test_a_conversation_out_of_order_says_which_message_what_was_found_and_expected(row, words):
    with pytest.raises(BadRowError) as caught:
        to_messages(row)
    assert all(word in str(caught.value) for word in words)


ADD = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}]


def call(name="add", **fields):
    return {
        **fields,
        "type": "function",
        "function": {"name": name, "arguments": {"a": 1, "b": None}},
    }


CALLED = [user("1+?"), assistant("", tool_calls=[call()]), result("2"), assistant("It is 2.")]
ARGUMENTS = '{"a": 1, "b": null}'


@pytest.mark.parametrize(
    ("row", "messages", "tools"),
    [
        # OpenAI's
        ({"messages": CALLED, "tools": TOOLS}, CALLED, TOOLS),
        (
            {
                "messages": [
                    user("1+?"),
                    assistant(
                        None,
                        tool_calls=[
                            {"id": "7", "function": {"name": "add", "arguments": ARGUMENTS}}
                        ],
                    ),
                    {
                        "role": "tool",
                        "tool_call_id": "7",
                        "name": "add",
                        "content": "2",
                        "weight": None,
                    },
                    assistant("It is 2.", tool_calls=None, refusal=None),
                ],
                "tools": [json.dumps(TOOLS[0])],
            },
            [
                *(CALLED[0], assistant("", tool_calls=[call(id="7")])),
                *({**result("2"), "name": "add", "tool_call_id": "7"}, CALLED[3]),
            ],
            TOOLS,
        ),
        (
            {
                "messages": [
                    user("1+?"),
                    assistant(None, function_call={"name": "add", "arguments": ARGUMENTS}),
                    {"role": "function", "name": "add", "content": {"x": "二"}},
                    assistant("It is 2."),
                ],
                "functions": [ADD],
            },
            [*CALLED[:2], {**result('{"x": "二"}'), "name": "add"}, CALLED[3]],
            TOOLS,
        ),
        # minimind's: JSON in strings, the tools on the system message
        (
            {
                "conversations": [
                    {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
                    user("1+?"),
                    assistant(
                        "",
                        tool_calls=json.dumps([{"name": "add", "arguments": {"a": 1, "b": None}}]),
                    ),
                    dict(result("2"), tools="", reasoning_content=""),
                    assistant("It is 2.", reasoning_content=""),
                ]
            },
            CALLED,
            TOOLS,
        ),
        (
            {"conversations": [dict(system("be brief"), tools=json.dumps(TOOLS)), *TALK]},
            [system("be brief"), *TALK],
            TOOLS,
        ),
        # ShareGPT's, as in LLaMA-Factory
        (
            {
                "conversations": [
                    turn("human", "1+?"),
                    turn("function_call", f'{{"name": "add", "arguments": {ARGUMENTS}}}'),
                    turn("observation", "2"),
                    turn("gpt", "It is 2."),
                ],
                "tools": json.dumps([ADD]),
            },
            CALLED,
            TOOLS,
        ),
        # Hermes': the calls in the text
        (
            {
                "conversations": [
                    turn("system", "<tools>[...]</tools>"),
                    turn("human", "1+?"),
                    turn(
                        "gpt",
                        'Well.\n<tool_call>\n{"name": "add", "arguments":'
                        f" {ARGUMENTS}}}\n</tool_call>",
                    ),
                    turn("tool", "2"),
                    turn("gpt", "It is 2."),
                ],
                "tools": json.dumps(TOOLS),
            },
            [
                system("<tools>[...]</tools>"),
                CALLED[0],
                assistant("Well.", tool_calls=[call()]),
                *CALLED[2:],
            ],
            None,
        ),
        (
            {"messages": [*CALLED[:3], result("3"), *CALLED[3:]]},
            [*CALLED[:3], result("3"), *CALLED[3:]],
            None,
        ),
        ({"messages": CALLED[:2], "tools": TOOLS}, CALLED[:2], TOOLS),
        (
            {"messages": [user("x"), assistant("<tool_call> is a tag")]},
            [user("x"), assistant("<tool_call> is a tag")],
            None,
        ),
        ({"messages": TALK, "tools": "[]"}, TALK, None),
    ],
)
def test_tools_their_calls_and_results_of_every_format_become_openais(row, messages, tools):
    assert to_conversation(row) == Conversation(messages, tools)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (assistant("b", reasoning_content="\na\n"), assistant("b", reasoning_content="a")),
        (assistant("b", reasoning="a"), assistant("b", reasoning_content="a")),
        (assistant("<think>\na\nc\n</think>\n\nb"), assistant("b", reasoning_content="a\nc")),
        (assistant("a\n</think>\n\nb"), assistant("b", reasoning_content="a")),
        (assistant("<think>\n\n</think>\n\nb"), assistant("b")),
        (assistant("b </think> c"), assistant("b </think> c")),
        (assistant("<think>unfinished"), assistant("<think>unfinished")),
        (assistant("b", reasoning_content=""), assistant("b")),
    ],
)
def test_reasoning_is_split_from_the_words(reply, expected):
    assert to_conversation({"messages": [user("x"), reply]}).messages == [user("x"), expected]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"train": False}, {"weight": 0.0}),
        ({"train": True}, {"weight": 1.0}),
        ({"weight": 0}, {"weight": 0.0}),
        ({"weight": 0.5, "train": True}, {"weight": 0.5}),
        ({"weight": "0.5"}, {"weight": 0.5}),
        ({"weight": None}, {}),
    ],
)
def test_flags_and_weights_of_replies_are_kept(reply, expected):
    row = {"messages": [user("x") | {"train": False}, assistant("y", **reply)], "weight": 2}
    assert to_conversation(row) == Conversation([user("x"), assistant("y", **expected)], None, 2.0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [user("x"), result("y")]},
            ["messages[1]: found the role 'tool' after the role 'user', expected"],
        ),
        (
            {"messages": [*TALK, result("y")]},
            ['messages[1]: found the reply "hello" before a tool\'s result', "no call"],
        ),
        (
            {"messages": [*CALLED[:2], user("y")]},
            ["messages[2]: found the role 'user' after a call of add, expected"],
        ),
        (
            {"messages": [*CALLED[:2], assistant("y")]},
            ["messages[2]: found the role 'assistant' after a call of add, expected 'tool'"],
        ),
        (
            {"messages": [*CALLED[:3], user("y")]},
            [
                "messages[3]: found the role 'user' after a tool's result, expected 'tool' or"
                " 'assistant'"
            ],
        ),
        ({"messages": CALLED[:3]}, ["messages[2]: found the role 'tool' last"]),
        ({"messages": TALK, "tools": "[{"}, ['tools: found "[{"', "expected JSON"]),
        (
            {"messages": TALK, "tools": [{"x": 1}]},
            ["tools[0]: found", "expected a function with a 'name'"],
        ),
        (
            {"messages": TALK, "tools": [3]},
            ["tools[0]: found 3", "expected a function with a 'name'"],
        ),
        (
            {
                "messages": [
                    user("x"),
                    assistant("", tool_calls=[{"name": "f", "arguments": "[1]"}]),
                ]
            },
            ["messages[1]: tool_calls[0]: found the arguments [1], expected an object"],
        ),
        (
            {
                "messages": [
                    user("x"),
                    assistant("", tool_calls=[{"name": "f", "arguments": '{"a": NaN}'}]),
                ]
            },
            ["messages[1]: tool_calls[0]: arguments: found", "expected JSON"],
        ),
        (
            {"messages": [user("x"), assistant("", tool_calls=["f"])]},
            ["messages[1]: tool_calls[0]: found", "a call"],
        ),
        (
            {"conversations": [turn("human", "x"), turn("function_call", "f(1)")]},
            ["found", "f(1)", "expected JSON"],
        ),
        (
            {"messages": [{**user("x"), "tool_calls": [call()]}, TALK[1]]},
            ["messages[0]: found tool calls", "'user'"],
        ),
        (
            {
                "messages": [
                    user("x"),
                    assistant("", tool_calls=[call(id="1")]),
                    {**result("y"), "tool_call_id": "2"},
                ]
            },
            ["messages[2]: found the tool_call_id '2', expected one of the calls before: 1"],
        ),
        (
            {
                "conversations": [dict(system(""), tools=json.dumps([ADD])), *TALK],
                "tools": '[{"name": "other"}]',
            },
            ["two different lists of tools", "expected one"],
        ),
        (
            {"messages": [user("x"), assistant("y", reasoning_content=3)]},
            ["messages[1]: found the reasoning 3"],
        ),
        (
            {"messages": [user("x"), assistant("", reasoning_content="y")]},
            ["messages[1]: found an empty reply"],
        ),
        (
            {"messages": [user("x"), assistant("y", weight=-1)]},
            ["messages[1]: found 'weight': -1", "from 0 up"],
        ),
        ({"messages": TALK, "weight": "much"}, ["the row: found 'weight': \"much\"", "from 0 up"]),
        (
            {"messages": [user("x"), assistant("y", train=3)]},
            ["messages[1]: found 'train': 3", "true or false"],
        ),
        (
            {"messages": [user("x"), assistant("y", train_detail=[1])]},
            ["messages[1]: found 'train_detail'", "whole"],
        ),
        (
            {"messages": [user("x") | {"train": True}, TALK[1]]},
            ["messages[0]: found 'train': true", "assistant only"],
        ),
    ],
)
def test_tools_and_weights_out_of_order_say_what_was_found_and_expected(row, words):
    with pytest.raises(BadRowError) as caught:
        to_conversation(row)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert to_messages({"messages": [user(parts), assistant("x")]}) == [user("ab"), assistant("x")]


def test_the_text_of_a_conversation_has_its_tools_reasoning_and_calls():
    row = {
        "messages": [user("u"), assistant("c", reasoning_content="r", tool_calls=[call()])],
        "tools": TOOLS,
    }
    called = '{"name": "add", "arguments": {"a": 1, "b": null}}'
    assert to_text(row) == f"{json.dumps(TOOLS[0])}\nu\nr\nc\n{called}"


def test_files_may_mix_formats_and_a_bad_conversation_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"messages": TALK},
        {"messages": [user("hi")]},
        {"instruction": "hi", "output": "hello"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [row.data for row in read_rows([str(path)], "skip", to_messages)] == [TALK, TALK]
    with pytest.raises(UserError) as caught:
        list(read_rows([str(path)], None, to_messages))
    assert str(caught.value).startswith(
        f"{path}:2: messages[0]: found the role 'user' last, expected"
    )
