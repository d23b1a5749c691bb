"""One message in any of the usual forms -> OpenAI's: `{"role", "content", ...}`, checked.

{"role": "system" | "user", "content"}
{"role": "assistant", "content", "reasoning_content"?, "tool_calls"?, "weight"?}
{"role": "tool", "content", "name"?, "tool_call_id"?}
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.calls import (
    EMPTY,
    bare_calls,
    parse_calls,
    parse_literal,
    split_calls,
    split_results,
)
from minimind.data.columns import FACTS, NAMES, Fields
from minimind.data.content import CONTENTS, Content, parse_content, split_reasoning
from minimind.data.marks import MESSAGE_MARKS, parse_weight

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "助手"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: the text of the message is the call
CALLS = ("tool_calls", "function_call")
REASONING = NAMES["reasoning_content"]
KEYS_READ = {
    *(*ROLES, "role", "from", *CONTENTS, *CALLS, *REASONING, *MESSAGE_MARKS),
    *("tool_call_id", "tools"),
}
LEADING = re.compile(r"\A(?:[^\S\n]*\n)+|\A (?=\S)")  # blank lines or one space, no indentation


def parse_messages(
    value: Any, name: str, role: str | None = None, row: Fields | None = None
) -> list[Message]:
    """Parse a list of messages, one message, or a string where its `role` is known; raises
    BadRowError.

    The list may be JSON in a string, or a dict of lists, as `datasets` stores a sequence of
    objects.
    """
    if isinstance(value, str) and role and not _is_list_of_messages(value):
        return parse_message({"role": role, "content": value}, name)

    # Unpack the list
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_literal(value, name)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        value = _transposed(value, name)
    if isinstance(value, Mapping):
        return parse_message(value, name, row)
    if not isinstance(value, list | tuple) or not value:
        raise BadRowError(
            f"{name}: found {shown(value)}, expected {'a string or ' if role else ''}a list of"
            " messages"
        )

    # Parse each message; join a reply with the calls that follow it as a message of their own
    precedes_result = [*map(_is_result, value[1:]), False]
    messages: list[Message] = []
    for index, raw in enumerate(value):
        for message in parse_message(raw, f"{name}[{index}]", row, precedes_result[index]):
            if messages and "tool_calls" in message and messages[-1]["role"] == "assistant":
                messages[-1] = _joined(messages[-1], message)
            else:
                messages.append(message)
    return messages


def _is_list_of_messages(text: str) -> bool:
    """Whether a string is the JSON of a list of messages, as pandas and CSV keep it."""
    return bool(re.match(r"\s*\[ ?\{\s*[\"'](role|from|content|value)[\"']", text[:200]))


def _is_result(raw: Any) -> bool:
    """Whether a message is a tool's result, or contains one, as Anthropic writes it."""
    content = raw.get("content") if isinstance(raw, Mapping) else None
    parts = content if isinstance(content, list) else ()
    return role_of(raw) == "tool" or any(
        isinstance(part, Mapping) and part.get("type") == "tool_result" for part in parts
    )


def _transposed(columns: Mapping[str, list], name: str) -> list[dict]:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise BadRowError(
            f"{name}: found lists of {shown(sorted(lengths))} items, expected lists of equal length"
        )
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _joined(before: Message, message: Message) -> Message:
    """Two replies as one."""
    joined = {**before, **message}
    for key in ("content", "reasoning_content"):
        texts = [part[key] for part in (before, message) if part.get(key)]
        if texts or key == "content":
            joined[key] = "\n".join(texts)
    joined["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
    weights = [part["weight"] for part in (before, message) if "weight" in part]
    return joined | ({"weight": min(weights)} if weights else {})


# One message


def role_of(raw: Any) -> str | None:
    """The role of a message in our words; None for an unknown or missing one."""
    role = raw.get("role", raw.get("from")) if isinstance(raw, Mapping) else None
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def parse_message(
    raw: Any, name: str, row: Fields | None = None, calls_expected: bool = False
) -> list[Message]:
    """Parse a message, also as ShareGPT's {"from", "value"}; raises BadRowError.

    Returns several where results of tools are in one message, and for {"human", "assistant"}, a
    complete turn.

    Args:
        row: learns which texts of the message are not read.
        calls_expected: whether a tool's result follows.
    """
    if not isinstance(raw, Mapping):
        raise BadRowError(
            f"{name}: found {shown(raw)}, expected an object with 'role' and 'content'"
        )
    message = {key: value for key, value in raw.items() if value is not None}
    role = role_of(message)
    if row is not None and not message.keys() <= KEYS_READ:
        _note_unread(message, row)
    given_role = message.get("role", message.get("from"))

    if role is None:
        voices = [key for key in message if ROLES.get(str(key).lower()) in ("user", "assistant")]
        if not voices:
            keys = f"keys {shown(list(raw))}"
            found = f"role {shown(given_role)}" if given_role is not None else keys
            raise BadRowError(
                f"{name}: found {found}, expected a 'role' (or 'from') of system, user, assistant"
                " or tool"
            )
        turn = [{"role": key, "content": message[key]} for key in voices]
        return [parsed for each in turn for parsed in parse_message(each, name)]

    content = next((message[key] for key in CONTENTS if key in message), None)
    calls = next((message[key] for key in CALLS if message.get(key) not in EMPTY), None)
    if str(given_role).strip().lower() in CALL_ROLES:
        content, calls = "", content
    if role == "assistant":
        return [_parse_reply(message, content, calls, name, calls_expected)]

    if calls is not None:
        raise BadRowError(
            f"{name}: found tool calls by the role {role!r}, expected them from the assistant"
        )
    if parse_weight(message, name):
        mark = next(key for key in MESSAGE_MARKS if key in message)
        found = f"found {mark!r}: {shown(message[mark])} for the role {role!r}"
        raise BadRowError(f"{name}: {found}, expected it for the assistant only")
    if role == "tool":
        return _parse_results(message, content, name)
    return _parse_words(role, content, name)


def _note_unread(message: Mapping, row: Fields) -> None:
    """Tell a row the keys of a message that hold text and are not read."""
    keys = [key for key in message if key not in KEYS_READ and not FACTS.fullmatch(key)]
    names = [f"messages.{key}" for key in Fields({key: message[key] for key in keys}).unread()]
    row.unread_inside += [name for name in names if name not in row.unread_inside]


def _parse_words(role: str, content: Any, name: str) -> list[Message]:
    """A message of the user or the system, after the tools' results that Anthropic puts in it."""
    parsed = parse_content(content, name)
    if parsed.calls or parsed.reasoning:
        raise BadRowError(
            f"{name}: found calls or reasoning by the role {role!r}, expected them from the"
            " assistant"
        )
    messages = []
    for text, part in parsed.results:
        call = part.get("tool_use_id")
        ids = {"tool_call_id": call} if isinstance(call, str) else {}
        messages.append({"role": "tool", "content": text} | ids)
    if parsed.text or not messages:
        messages.append({"role": role, "content": parsed.text})
    return messages


def _parse_results(message: Mapping, content: Any, name: str) -> list[Message]:
    if isinstance(content, list):
        try:
            content = parse_content(content, name, "\n").text
        except BadRowError:  # a result that is a list of something else
            content = json.dumps(content, ensure_ascii=False)
    elif content is None:
        parse_content(content, name)  # raises
    elif not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    keys = [key for key in ("name", "tool_call_id") if isinstance(message.get(key), str)]
    names = {key: message[key] for key in keys}
    return [{"role": "tool", "content": result, **names} for result in split_results(content)]


def _parse_reply(
    message: Mapping, content: Any, calls: Any, name: str, calls_expected: bool
) -> Message:
    parsed = parse_content("" if content is None and calls is not None else content, name)
    if parsed.results:
        raise BadRowError(
            f"{name}: found a tool's result by the role 'assistant', expected it from a tool"
        )
    text, reasoning = _parse_reasoning(message, parsed, name)
    if calls is not None:
        calls = parse_calls(calls, f"{name}: tool_calls")
    elif parsed.calls:
        calls = list(parsed.calls)
    else:
        text, calls, reason = split_calls(text, name)
        if calls_expected and not calls:
            calls = bare_calls(text, message.get("metadata"), name)
            if not calls:
                because = f" ({reason})" if reason else ""
                raise BadRowError(
                    f"{name}: found the reply {shown(text)} before a tool's result, and no call was"
                    f" understood in it{because}, expected 'tool_calls' or a <tool_call> block"
                )
            text = ""

    reply = {"role": "assistant", "content": LEADING.sub("", text)}
    if reasoning.strip():
        reply["reasoning_content"] = reasoning.strip("\n")
    if calls:
        reply["tool_calls"] = calls
    if (weight := parse_weight(message, name)) is not None:
        reply["weight"] = weight
    return reply


def reply_message(text: str) -> Message:
    """What a model wrote as a message, its reasoning and calls apart from its words."""
    message = {"role": "assistant", "content": text}
    with suppress(BadRowError):  # else as it is
        (message,) = parse_message(message, "the reply")
    return message


def _parse_reasoning(message: Mapping, parsed: Content, name: str) -> tuple[str, str]:
    """The words of a reply, and its reasoning: in a field, in a <think> block, or alike in both."""
    field = next((message[key] for key in REASONING if message.get(key)), None)
    # A boolean is a switch, not a thought
    field = parsed.reasoning or (None if isinstance(field, bool) else field)
    if field and not isinstance(field, str):
        raise BadRowError(f"{name}: found the reasoning {shown(field)}, expected a string")
    if field and not parsed.text.lstrip().startswith("<think>"):
        return parsed.text, field
    block, text = split_reasoning(parsed.text)
    if field and block.strip() and field.strip() != block.strip():
        raise BadRowError(
            f"{name}: found two different thoughts, {shown(field.strip(), 30)} in a field and "
            f"{shown(block.strip(), 30)} in the <think> block, expected one"
        )
    return text, field or block
