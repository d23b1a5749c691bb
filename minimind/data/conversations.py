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
# Values of a column "reasoning" or "thinking" that switch it on or off
SWITCHES = {
    *("on", "off", "true", "false", "yes", "no", "none", "auto", "enabled", "disabled"),
    *("low", "medium", "high"),
}


class Conversation(NamedTuple):
    """Messages, the tools they may call (OpenAI's schemas), and the row's weight in the loss."""

    messages: list[Message]
    tools: list[dict] | None = None
    weight: float = 1.0


def to_conversation(data: Mapping) -> Conversation:
    """The checked messages and the tools of a row in any of the formats; raises BadRowError."""
    row = Fields.of(data)
    check_verdict(row)
    open_template_kwargs(row)

    # Messages, a prompt and a reply, or a dialogue in one string
    name, value = row.find("messages"), None
    if name and (value := row.take(name)) not in EMPTY:
        messages = parse_messages(value, name, row=row)
    elif (prompt := read_prompt(row)) and (reply := read_reply(row)):
        name, value = "messages", None
        messages = prompt + reply
    elif isinstance(row.get("text"), str) and (dialogue := split_dialogue(row["text"], "text")):
        row.take("text")
        name, value, messages = "text", None, dialogue
    elif name:
        messages = parse_messages(value, name)  # raises
    else:
        raise BadRowError(f"found keys {row.names}, expected {FORMATS}")
    check_order(messages, name)

    # What the row says about them
    tools = read_tools(row, value)
    weight = parse_weight({key: row[key] for key in ("train", "weight") if key in row}, "the row")
    messages = add_reasoning(row, add_system(row, without_empty_system(messages, tools)))
    return Conversation(messages, tools, 1.0 if weight is None else weight)


def to_messages(data: Mapping) -> list[Message]:
    """`to_conversation` without tools and weight; raises BadRowError."""
    return to_conversation(data).messages


def to_text(data: Mapping) -> str:
    """The text of a document or a conversation, to train a tokenizer on; raises BadRowError."""
    row = Fields.of(data)
    if "text" in row or ("content" in row and not row.find("reasoning_content")):
        return to_document(row)
    messages, tools, _ = to_conversation(row)
    texts = [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        texts += [message.get("reasoning_content", ""), message["content"]]
        texts += [json.dumps(call, ensure_ascii=False) for call in calls]
    return "\n".join(text for text in texts if text)


# Prompts and replies in columns


def read_prompt(row: Fields) -> list[Message]:
    """The question in the columns of a row, with its history; an empty list without one.

    An instruction and its input, context or choices are one message, a line each. Raises
    BadRowError.
    """
    name = row.find("prompt") or row.find("input")
    if name is None:
        return []
    value = row.take(name)
    value = as_text(value, name) if name == "instruction" else value
    messages = parse_messages(value, name, "user", row)
    if len(messages) == 1 and messages[0]["role"] == "user":
        messages = split_dialogue(messages[0]["content"], name) or messages

    texts = [as_text(row.take("input"), "input")] if "input" in row and name != "input" else []
    context = row.find("context")
    if context and isinstance(row.get(context), str):
        texts.append(row.take(context))
    choices = zip(LETTERS, read_choices(row), strict=False)
    texts += [f"{letter}. {choice}" for letter, choice in choices]
    if any(texts):
        *others, last = messages
        content = "\n".join(text for text in (last["content"], *texts) if text)
        messages = [*others, {**last, "content": content}]
    return parse_history(row.take("history")) + messages


def read_choices(row: Fields) -> list[str]:
    """The choices of a question: columns A, B, C, D ..., or one list of them; [] without any."""
    letters = [letter for letter in LETTERS.lower() if letter in row]
    if letters[:2] == ["a", "b"]:
        return [str(row.take(letter)) for letter in letters]
    name = row.find("choices")
    value = row.get(name) if name else None
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_literal(value, name)
    if isinstance(value, Mapping):
        value = value.get("text", list(value.values()))
    if not isinstance(value, list) or not all(isinstance(v, str | int | float) for v in value):
        return []
    if value:
        row.take(name)
    return [str(text) for text in value]


def parse_history(value: Any) -> list[Message]:
    """Parse earlier turns: messages, [user, assistant] pairs, or nothing; raises BadRowError."""
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


def read_reply(row: Fields) -> list[Message] | None:
    """The reply in the columns of a row; None without one. Raises BadRowError."""
    name = row.find("response")
    # Beside its reasoning, "content" is a reply
    if name is None and row.find("reasoning_content") and "content" in row:
        name = "content"
    if name is None:
        return None
    value = row.take(name)
    is_index = isinstance(value, int) and not isinstance(value, bool)
    if is_index and 0 <= value < len(read_choices(row)):
        value = LETTERS[value]  # of the right choice
    return parse_messages(value, name, "assistant", row)


# Columns beside the messages


def open_template_kwargs(row: Fields) -> None:
    """Make columns of the values in "chat_template_kwargs" (smoltalk2's system prompt, tools)."""
    values = row.columns.pop("chat_template_kwargs", None)
    values = parse_literal(values, "chat_template_kwargs") if values not in EMPTY else {}
    if isinstance(values, Mapping):
        for name, value in values.items():
            if value is not None:
                row.columns.setdefault(str(name).lower(), value)


def add_system(row: Fields, messages: list[Message]) -> list[Message]:
    """The messages with the row's system prompt, if any, in front; raises BadRowError."""
    name = row.find("system")
    system = row.take(name) if name else ""
    if isinstance(system, Mapping | list):  # Gemini's and Anthropic's parts
        parts = system.get("parts", system) if isinstance(system, Mapping) else system
        system = parse_content(parts, name).text
    system = as_text(system, name)
    check_text(system, "system")
    if not system.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise BadRowError(
            f"found two system prompts, in {name!r} and in the first message, expected one"
        )
    return messages


def read_tools(row: Fields, *lists: Any) -> list[dict] | None:
    """The tools of a row: in a column, or on the system message that begins one of `lists`, as
    minimind has them.

    Tools that the system prompt already spells out are not returned. Raises BadRowError.
    """
    candidates = [(name, row.take(name)) for name in NAMES["tools"] if name in row]
    firsts = [value[0] for value in lists if isinstance(value, list | tuple) and value]
    systems = [message for message in firsts if isinstance(message, Mapping)]
    candidates += [("messages[0]: tools", message.get("tools")) for message in systems]
    texts = [message.get("content", message.get("value")) for message in systems]
    texts.append(row.get(row.find("system")))
    return find_tools(candidates, [text for text in texts if isinstance(text, str)])


def without_empty_system(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    """The messages without a system message that only carries the tools, as minimind's does."""
    return messages[1:] if tools and messages[0] == {"role": "system", "content": ""} else messages


def add_reasoning(row: Fields, messages: list[Message]) -> list[Message]:
    """The messages, with the reasoning in a column of the row added to the last reply."""
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
