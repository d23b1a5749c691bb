"""Rows of chat data in the usual formats -> conversations: messages in one form (messages.py),
checked, and tools.

The format of a row is recognised by its columns, so one file may mix them; columns.py lists the
names.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import check_text, shown
from minimind.data.calls import EMPTY, find_tools, parse_literal
from minimind.data.columns import NAMES, Fields, as_text
from minimind.data.content import parse_content
from minimind.data.dialogues import split_dialogue
from minimind.data.files import to_document
from minimind.data.marks import check_verdict, parse_weight
from minimind.data.message_order import check_order
from minimind.data.messages import Message, parse_message, parse_messages

FORMATS = (
    "'messages' or 'conversations' (a list), 'instruction' and 'output', or a pair such as 'prompt'"
    " and 'completion' (other names: --columns prompt=... response=...)"
)
TURNS = ("user", "assistant")
LETTERS = "ABCDEFGHIJ"
# Values of a column "reasoning" or "thinking" that switch it and are no thoughts.
SWITCHES = {
    "on",
    "off",
    "true",
    "false",
    "yes",
    "no",
    "none",
    "auto",
    "enabled",
    "disabled",
    "low",
    "medium",
    "high",
}


class Conversation(NamedTuple):
    """Messages in order, the tools they may call (OpenAI's schemas), and the row's weight in a
    weighted loss."""

    messages: list[Message]
    tools: list[dict] | None = None
    weight: float = 1.0


def open_template_kwargs(row: Fields) -> None:
    """Treat what stands in "chat_template_kwargs" (smoltalk2's system prompt and tools) as columns
    of the row."""
    inside = row.columns.pop("chat_template_kwargs", None)
    inside = parse_literal(inside, "chat_template_kwargs") if inside not in EMPTY else {}
    if isinstance(inside, Mapping):
        for name, value in inside.items():
            if value is not None:
                row.columns.setdefault(str(name).lower(), value)


def parse_history(value: Any) -> list[Message]:
    """Earlier turns, as messages or as [user, assistant] pairs, perhaps none -> messages; raises
    BadRowError."""
    if value in EMPTY:
        return []
    value = parse_literal(value, "history")
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) for pair in value):
        return parse_messages(value, "history")
    for index, pair in enumerate(value):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRowError(
                f"history[{index}]: found {shown(pair)}, expected a pair of strings [user,"
                " assistant]"
            )
    return [
        message
        for index, pair in enumerate(value)
        for role, text in zip(TURNS, pair, strict=True)
        for message in parse_message({"role": role, "content": text}, f"history[{index}]")
    ]


def add_system(row: Fields, messages: list[Message]) -> list[Message]:
    """A row's optional system prompt and its messages -> the messages with it in front; raises
    BadRowError."""
    name = row.find("system")
    (system,) = row.take(name) if name else ("",)
    if isinstance(system, Mapping | list):  # Gemini's and Anthropic's parts
        system = parse_content(
            system.get("parts", system) if isinstance(system, Mapping) else system, name
        ).text
    if not isinstance(system, str):
        raise BadRowError(f"{name}: found {shown(system)}, expected a string")
    check_text(system, "system")
    if not system.strip():
        return messages
    if messages[0]["role"] == "system" and messages[0]["content"] != system:
        raise BadRowError(
            f"found two system prompts, in {name!r} and in the first message, expected one"
        )
    return (
        messages
        if messages[0]["role"] == "system"
        else [{"role": "system", "content": system}, *messages]
    )


def read_tools(row: Fields, *lists: Any) -> list[dict] | None:
    """The tools of a row: in a column of its own, or as minimind hangs them on the system message
    of one of `lists`.

    Tools that the system prompt spells out already are not given twice. Raises BadRowError.
    """
    places = [name for name in NAMES["tools"] if name in row]
    given = list(zip(places, row.take(*places), strict=True))
    systems = [
        m
        for value in lists
        if isinstance(value, list | tuple)
        for m in value[:1]
        if isinstance(m, Mapping)
    ]
    given += [("messages[0]: tools", message.get("tools")) for message in systems]
    texts = [
        row.get(row.find("system")),
        *(message.get("content", message.get("value")) for message in systems),
    ]
    return find_tools(given, [text for text in texts if isinstance(text, str)])


def without_empty_system(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    """Messages without a system message that has no words but only carries the tools, as minimind's
    does."""
    return messages[1:] if tools and messages[0] == {"role": "system", "content": ""} else messages


def add_reasoning(row: Fields, messages: list[Message]) -> list[Message]:
    """Messages, the last reply with the reasoning that stands in a column of the row."""
    name = row.find("reasoning_content")
    value = row.get(name) if name else None
    last = messages[-1]
    if not isinstance(value, str) or last["role"] != "assistant":
        return messages
    if value.strip().lower() in {*SWITCHES, "", last.get("reasoning_content", "").strip().lower()}:
        row.take(name)
        return messages
    # Two different thoughts: the column stays unread, and is a finding
    if "reasoning_content" in last:
        return messages
    row.take(name)
    return [*messages[:-1], {**last, "reasoning_content": value.strip("\n")}]


# Prompts that stand in columns


def read_choices(row: Fields) -> list[str]:
    """The choices of a question with several: a column A, B, C, D each, or one list of them; []
    without any."""
    letters = [letter for letter in LETTERS.lower() if letter in row]
    if letters[:2] == ["a", "b"]:
        return [str(value) for value in row.take(*letters)]
    name = row.find("choices")
    value = row.get(name) if name else None
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_literal(value, name)
    if isinstance(value, Mapping):
        value = value.get("text", list(value.values()))
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(text, str | int | float) for text in value)
    ):
        return []
    row.take(name)
    return [str(text) for text in value]


def read_prompt(row: Fields) -> list[Message]:
    """The question that a row's columns spell out, with its history; empty if they spell out none.

    An instruction and its input, context or choices are one message, a line each. Raises
    BadRowError.
    """
    name = row.find("prompt") or row.find("input")
    if name is None:
        return []
    (value,) = row.take(name)
    messages = parse_messages(
        as_text(value, name) if name == "instruction" else value, name, "user", row
    )
    if len(messages) == 1 and messages[0]["role"] == "user":
        dialogue = split_dialogue(messages[0]["content"], name)
        messages = dialogue or messages
    texts = [as_text(row.take(n)[0], n) for n in ("input",) if n in row and n != name]
    context = row.find("context")
    if context and isinstance(row.get(context), str):
        texts += row.take(context)
    texts += [
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, read_choices(row), strict=False)
    ]
    if any(texts):
        last = messages[-1]
        messages = [
            *messages[:-1],
            {**last, "content": "\n".join(t for t in (last["content"], *texts) if t)},
        ]
    (history,) = row.take("history")
    return parse_history(history) + messages


def read_reply(row: Fields) -> list[Message] | None:
    """The reply that a row's columns spell out; None without one. Raises BadRowError."""
    name = row.find("response")
    # Beside a thought, the words are a reply
    if name is None and row.find("reasoning_content") and "content" in row:
        name = "content"
    if name is None:
        return None
    (value,) = row.take(name)
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and 0 <= value < len(read_choices(row))
    ):
        value = LETTERS[value]  # the index of the right choice
    return parse_messages(value, name, "assistant", row)


def to_conversation(data: Mapping) -> Conversation:
    """One row in any of the formats -> its messages, checked by `check_order`, and tools; raises
    BadRowError."""
    row = Fields.of(data)
    check_verdict(row)
    open_template_kwargs(row)
    name = row.find("messages")
    if name and (value := row.take(name)[0]) not in EMPTY:
        messages = parse_messages(value, name, row=row)
    elif (prompt := read_prompt(row)) and (reply := read_reply(row)):
        name, value = "messages", None
        messages = prompt + reply
    elif isinstance(row.get("text"), str) and (dialogue := split_dialogue(row["text"], "text")):
        row.take("text")
        name, value, messages = "text", None, dialogue
    elif name:
        messages = parse_messages(value, name)
    else:
        raise BadRowError(f"found keys {row.names}, expected {FORMATS}")
    check_order(messages, name)
    tools = read_tools(row, value)
    weight = parse_weight({key: row[key] for key in ("train", "weight") if key in row}, "the row")
    messages = add_reasoning(row, add_system(row, without_empty_system(messages, tools)))
    return Conversation(messages, tools, 1.0 if weight is None else weight)


def to_messages(data: Mapping) -> list[Message]:
    """`to_conversation` without tools and weight; raises BadRowError."""
    return to_conversation(data).messages


def to_text(data: Mapping) -> str:
    """A document or a conversation -> its text, for training a tokenizer; raises BadRowError."""
    row = Fields.of(data)
    if "text" in row or ("content" in row and not row.find("reasoning_content")):
        return to_document(row)
    messages, tools, _ = to_conversation(row)
    texts = [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
    for message in messages:
        texts += [message.get("reasoning_content", ""), message["content"]]
        texts += [
            json.dumps(call["function"], ensure_ascii=False)
            for call in message.get("tool_calls", ())
        ]
    return "\n".join(text for text in texts if text)
