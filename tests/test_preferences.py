import json

import pytest
from pipeline import assistant, user
from reading import TALK, system, turn, unread

from minimind.common.errors import BadRowError, UserError
from minimind.data.files import read_rows
from minimind.data.preferences import to_preference


def pair(prompt, chosen=None):
    return {
        "prompt": prompt,
        "chosen": chosen or [assistant("good")],
        "rejected": [assistant("bad")],
    }


HI = [user("hi")]
EARLIER = [user("hi"), assistant("hello"), user("more?")]
STRINGS = {"chosen": "good", "rejected": "bad"}
REPLIES = {"chosen": [assistant("good")], "rejected": [assistant("bad")]}


ADD = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}]
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
CALLED = [*HI, {**assistant(""), "tool_calls": CALLS}, {"role": "tool", "content": "2"}]
THOUGHT = {**assistant("good"), "reasoning_content": "why"}


def whole(prompt):
    return {"chosen": [*prompt, assistant("good")], "rejected": [*prompt, assistant("bad")]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "hi", **STRINGS}, pair(HI)),
        (
            {"prompt": "hi", "system": "be brief", "history": [], **STRINGS},
            pair([system("be brief"), *HI]),
        ),
        ({"prompt": "more?", "history": EARLIER[:2], **STRINGS}, pair(EARLIER)),
        ({"prompt": "more?", "history": [["hi", "hello"]], **STRINGS}, pair(EARLIER)),
        ({"question": "hi", "system": None, **STRINGS}, pair(HI)),
        ({"question": "hi", "system": "be brief", **STRINGS}, pair([system("be brief"), *HI])),
        ({"prompt": EARLIER, **REPLIES}, pair(EARLIER)),
        ({"prompt": HI, **whole(HI)}, pair(HI)),
        ({"prompt": "hi", "score_chosen": 9, **whole(HI)}, pair(HI)),
        ({"prompt": "more?", **whole(EARLIER)}, pair(EARLIER)),
        ({"prompt": "hi", "system": "be brief", **whole(HI)}, pair([system("be brief"), *HI])),
        (whole(HI), pair(HI)),
        (whole([system("be brief"), *EARLIER]), pair([system("be brief"), *EARLIER])),
        (
            {
                "chosen": [*HI, assistant("good"), user("and?"), assistant("so")],
                "rejected": [*HI, assistant("bad")],
            },
            pair(HI, [assistant("good"), user("and?"), assistant("so")]),
        ),
        (
            {
                "conversations": [turn("system", "be brief"), turn("human", "hi")],
                "chosen": turn("gpt", "good"),
                "rejected": turn("gpt", "bad"),
            },
            pair([system("be brief"), *HI]),
        ),
        ({"instruction": "add", "input": "1 2", **STRINGS}, pair([user("add\n1 2")])),
        ({"prompt": "hi", "tools": json.dumps([ADD]), **STRINGS}, {**pair(HI), "tools": TOOLS}),
        (
            whole([{**system(""), "tools": json.dumps([ADD])}, *CALLED]),
            {**pair(CALLED), "tools": TOOLS},
        ),
        (
            {**whole([system("be brief"), *CALLED]), "tools": [ADD]},
            {**pair([system("be brief"), *CALLED]), "tools": TOOLS},
        ),
        (
            {
                "chosen": [*CALLED, assistant("it is 2")],
                "rejected": [*HI, assistant("no")],
                "tools": [ADD],
            },
            {
                "prompt": HI,
                "chosen": [*CALLED[1:], assistant("it is 2")],
                "rejected": [assistant("no")],
                "tools": TOOLS,
            },
        ),
        (
            {"prompt": "hi", "chosen": "<think>\nwhy\n</think>\n\ngood", "rejected": "bad"},
            pair(HI, [THOUGHT]),
        ),
    ],
)
def test_each_format_gives_prompt_chosen_and_rejected_messages(row, expected):
    assert to_preference(row) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"prompt": "hi", "chosen": "x"},
            ['found keys ["prompt", "chosen"]', "expected 'chosen' and 'rejected'"],
        ),
        ({"prompt": "hi", "chosen": "x", "rejected": None}, ["found keys", "'rejected'"]),
        ({"prompt": "", **STRINGS}, ['prompt: found ""', "expected a question"]),
        (
            {"prompt": "hi", "chosen": "x", "rejected": " x\n"},
            ["chosen equal to rejected", "two different replies"],
        ),
        (
            {"chosen": [*EARLIER[:2]], "rejected": [*EARLIER, assistant("x")]},
            ["is the beginning of the other, 2 messages", "expected two different replies"],
        ),
        (
            {"prompt": "hi", "chosen": [{"content": "x"}], "rejected": "y"},
            ['chosen[0]: found keys ["content"]', "expected a 'role'"],
        ),
        (
            {"prompt": "hi", "chosen": True, "rejected": "y"},
            ["chosen: found true", "expected a string or a list of messages"],
        ),
        (
            {"prompt": "hi", "completion": "x", "label": "yes"},
            ["found keys", "expected 'chosen' and 'rejected'"],
        ),
        *(
            (
                {"context": HI, "response1": "x", "response2": "y", "overall_preference": label},
                [f"overall_preference: found {shown}, expected a number below 0 where response1"],
            )
            for label, shown in ((0, "0"), ("first", '"first"'), (True, "true"))
        ),
        (STRINGS, ['found keys ["chosen", "rejected"]', "expected one of prompt, question"]),
        (
            {"prompt": "hi", "chosen": 1, "rejected": "x"},
            ["chosen: found 1", "expected a string or a list of messages"],
        ),
        ({"prompt": 1, **STRINGS}, ["prompt: found 1", "expected a string or a list of messages"]),
        (
            {"prompt": "hi", "chosen": "x", "rejected": "x"},
            ["chosen equal to rejected", "two different replies"],
        ),
        ({"chosen": HI, "rejected": HI}, ["chosen equal to rejected", "two different replies"]),
        (
            {"prompt": "hi", "chosen": "x", "rejected": " "},
            ["(prompt + rejected)[1]: found an empty reply", "expected"],
        ),
        (
            {"prompt": EARLIER[:2], **STRINGS},
            ["(prompt + chosen)[2]: found the role 'assistant'", "expected 'user'"],
        ),
        (
            {"prompt": EARLIER[1:], **STRINGS},
            ["(prompt + chosen)[0]: found the role 'assistant'", "expected 'user'"],
        ),
        (
            {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]},
            [
                "prompts that differ between chosen and rejected at message 0",
                "expected the same messages",
            ],
        ),
        (
            {
                "chosen": [*EARLIER, assistant("x")],
                "rejected": [*EARLIER[:2], user("else?"), assistant("y")],
            },
            [
                "prompts that differ between chosen and rejected at message 2",
                "expected the same messages",
            ],
        ),
        ({"prompt": "hello", **whole(HI)}, ["found a prompt that differs", "expected the same"]),
        (
            {"prompt": "hi", "chosen": [*HI, assistant("x")], "rejected": "y"},
            ["differ", "expected the same messages"],
        ),
        (
            {"chosen": [*HI, assistant("x")], "rejected": HI},
            [
                "(prompt + rejected)[0]: found the role 'user' last",
                "expected that the last message is the assistant's",
            ],
        ),
        (
            {"prompt": "hi", "tools": "[{}]", **STRINGS},
            ["tools[0]: found {}", "expected a function with a 'name'"],
        ),
    ],
)
def test_a_pair_that_teaches_nothing_clear_says_what_was_found_and_expected(row, words):
    with pytest.raises(BadRowError) as caught:
        to_preference(row)
    assert all(word in str(caught.value) for word in words)


def test_a_bad_pair_is_named_with_its_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "hi", **STRINGS}, {"prompt": "hi", "chosen": "x", "rejected": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [row.data for row in read_rows([str(path)], "skip", to_preference)] == [pair(HI)]
    with pytest.raises(UserError) as caught:
        list(read_rows([str(path)], None, to_preference))
    assert str(caught.value).startswith(f"{path}:2: found chosen equal to rejected, expected")


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
        {"context": HI, "response1": "no", "response2": "hello", "overall_preference": 2},
        {"context": HI, "response1": "hello", "response2": "no", "overall_preference": -1},
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


def test_a_prompt_may_be_any_question_of_the_conversations_beside_it():
    talk = [*TALK, user("more?")]
    for prompt in ("hi", "more?"):
        row = {
            "prompt": prompt,
            "chosen": [*talk, assistant("a")],
            "rejected": [*talk, assistant("b")],
        }
        assert to_preference(row)["prompt"] == talk
