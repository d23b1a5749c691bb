import json

import pytest
from pipeline import assistant, result, user
from reading import call, system, unread

from minimind.common.errors import BadRowError
from minimind.data.conversations import to_messages


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
