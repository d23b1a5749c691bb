"""One message in any of the usual forms -> OpenAI's: `{"role", "content", ...}`, checked.

{"role": "system" | "user", "content"}
{"role": "assistant", "content", "reasoning_content"?, "tool_calls"?, "weight"?}
{"role": "tool", "content", "name"?, "tool_call_id"?}
"""

import json
import re
from collections.abc import Mapping
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
from minimind.data.marks import FLAGS, MASKS, WEIGHTS, parse_weight

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
UNREAD = {
    *ROLES,
    "role",
    "from",
    *CONTENTS,
    *CALLS,
    *REASONING,
    *FLAGS,
    *MASKS,
    *WEIGHTS,
    "tool_call_id",
    "tools",
}
LEADING = re.compile(r"\A(?:[^\S\n]*\n)+|\A (?=\S)")  # not an indentation


def without_nulls(data: Mapping) -> dict:
    """A row or message -> itself without the null fields that HF datasets add."""
    return {key: value for key, value in data.items() if value is not None}


# Messages


def role_of(raw: Any) -> str | None:
    """The role of a message in our words; None where there is none that is known."""
    role = raw.get("role", raw.get("from")) if isinstance(raw, Mapping) else None
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def parse_message(
    raw: Any, name: str, row: Fields | None = None, calls_expected: bool = False
) -> list[Message]:
    """A message, also as ShareGPT's {"from", "value"} -> one in the form above, or several; raises
    BadRowError.

    Several: results of tools that stand in one message, and {"human", "assistant"}, a whole turn.

    Args:
        row: learns which texts of the message are not read.
        calls_expected: a tool's result follows.
    """
    if not isinstance(raw, Mapping):
        raise BadRowError(
            f"{name}: found {shown(raw)}, expected an object with 'role' and 'content'"
        )
    message = without_nulls(raw)
    role = role_of(message)
    if row is not None and not message.keys() <= UNREAD:
        _note_unread(message, row)
    if role is None:
        if voices := [
            key for key in message if ROLES.get(str(key).lower()) in ("user", "assistant")
        ]:
            return [
                m
                for key in voices
                for m in parse_message({"role": key, "content": message[key]}, name)
            ]
        given = message.get("role", message.get("from"))
        found = f"role {shown(given)}" if given is not None else f"keys {shown(list(raw))}"
        raise BadRowError(
            f"{name}: found {found}, expected a 'role' (or 'from') of system, user, assistant or"
            " tool"
        )
    content = next((message[key] for key in CONTENTS if key in message), None)
    calls = next((message[key] for key in CALLS if message.get(key) not in EMPTY), None)
    if str(message.get("role", message.get("from"))).strip().lower() in CALL_ROLES:
        content, calls = "", content
    if role == "assistant":
        return [_parse_reply(message, content, calls, name, calls_expected)]
    if calls is not None:
        raise BadRowError(
            f"{name}: found tool calls of the role {role!r}, expected them of the assistant"
        )
    if parse_weight(message, name):
        mark = next(key for key in (*FLAGS, *MASKS, *WEIGHTS) if key in message)
        found = f"found {mark!r}: {shown(message[mark])} for the role {role!r}"
        raise BadRowError(f"{name}: {found}, expected it of the assistant only")
    return (
        _parse_results(message, content, name)
        if role == "tool"
        else _parse_words(role, content, name)
    )


def _note_unread(message: Mapping, row: Fields) -> None:
    inside = Fields(
        {
            key: value
            for key, value in message.items()
            if key not in UNREAD and not FACTS.fullmatch(key)
        }
    )
    row.unread_inside += [
        f"messages.{key}" for key in inside.unread() if f"messages.{key}" not in row.unread_inside
    ]


def _parse_words(role: str, content: Any, name: str) -> list[Message]:
    parsed = parse_content(content, name)
    if parsed.calls or parsed.reasoning:
        raise BadRowError(
            f"{name}: found calls or reasoning of the role {role!r}, expected them of the assistant"
        )
    results = [
        {"role": "tool", "content": text}
        | (
            {"tool_call_id": part["tool_use_id"]}
            if isinstance(part.get("tool_use_id"), str)
            else {}
        )
        for text, part in parsed.results
    ]
    return results + (
        [{"role": role, "content": parsed.text}] if parsed.text or not results else []
    )


def _parse_results(message: Mapping, content: Any, name: str) -> list[Message]:
    kept = {
        key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)
    }
    if isinstance(content, list):
        try:
            content = parse_content(content, name, "\n").text
        except BadRowError:  # a result that is a list of something else
            content = json.dumps(content, ensure_ascii=False)
    elif not isinstance(content, str) and content is not None:
        content = json.dumps(content, ensure_ascii=False)
    if content is None:
        parse_content(content, name)
    return [{"role": "tool", "content": result, **kept} for result in split_results(content)]


def _parse_reply(
    message: Mapping, content: Any, calls: Any, name: str, calls_expected: bool
) -> Message:
    parsed = parse_content("" if content is None and calls is not None else content, name)
    if parsed.results:
        raise BadRowError(
            f"{name}: found a tool's result of the role 'assistant', expected it of a tool"
        )
    text, reasoning = _parse_reasoning(message, parsed, name)
    reason = None
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


def _parse_reasoning(message: Mapping, parsed: Content, name: str) -> tuple[str, str]:
    """The words of a reply and its reasoning, which may stand in a field, in a <think> block, or in
    both alike."""
    given = next((message[key] for key in REASONING if message.get(key)), None)
    # A switch, not a thought
    given = parsed.reasoning or (None if isinstance(given, bool) else given)
    if given and not isinstance(given, str):
        raise BadRowError(f"{name}: found the reasoning {shown(given)}, expected a string")
    if given and not parsed.text.lstrip().startswith("<think>"):
        return parsed.text, given
    inside, text = split_reasoning(parsed.text)
    if given and inside.strip() and given.strip() != inside.strip():
        raise BadRowError(
            f"{name}: found two different thoughts, {shown(given.strip(), 30)} in a field and "
            f"{shown(inside.strip(), 30)} in the <think> block, expected one"
        )
    return text, given or inside


def parse_messages(
    value: Any, name: str, role: str | None = None, row: Fields | None = None
) -> list[Message]:
    """A list of messages, one message, or a string where its `role` is given -> messages; raises
    BadRowError.

    The list may be JSON in a string, or a dict of lists, as `datasets` stores a sequence of
    objects.
    """
    if isinstance(value, str) and role and not _is_list_of_messages(value):
        return parse_message({"role": role, "content": value}, name)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_literal(value, name)
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if (
        isinstance(value, Mapping)
        and value
        and all(isinstance(column, list) for column in value.values())
    ):
        value = _transposed(value, name)
    if isinstance(value, Mapping):
        return parse_message(value, name, row)
    if not isinstance(value, list | tuple) or not value:
        raise BadRowError(
            f"{name}: found {shown(value)}, expected {'a string or ' if role else ''}a list of"
            " messages"
        )
    answered = [*map(_is_result, value[1:]), False]
    messages: list[Message] = []
    for index, raw in enumerate(value):
        for message in parse_message(raw, f"{name}[{index}]", row, answered[index]):
            if messages and _continues(messages[-1], message):
                messages[-1] = _joined(messages[-1], message)
            else:
                messages.append(message)
    return messages


def _is_list_of_messages(text: str) -> bool:
    """Whether a string is the JSON of a list of messages, as pandas and CSV keep it."""
    start = text[:200].lstrip()
    return start.startswith(("[{", "[ {")) and bool(
        re.match(r"\[\s*\{\s*[\"'](role|from|content|value)[\"']", start)
    )


def _is_result(raw: Any) -> bool:
    """Whether a message is a tool's result, or has one within, as Anthropic writes it."""
    content = raw.get("content") if isinstance(raw, Mapping) else None
    parts = content if isinstance(content, list) else ()
    return role_of(raw) == "tool" or any(
        isinstance(p, Mapping) and p.get("type") == "tool_result" for p in parts
    )


def _transposed(columns: Mapping[str, list], name: str) -> list[dict]:
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise BadRowError(
            f"{name}: found lists of {shown(sorted(lengths))} items, expected as many of each key"
        )
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _continues(before: Message, message: Message) -> bool:
    """Whether a reply that calls tools goes on with what the assistant said before, in a message of
    its own."""
    return before["role"] == message["role"] == "assistant" and "tool_calls" in message


def _joined(before: Message, message: Message) -> Message:
    joined = {**before, **message}
    for key, separator in (("content", "\n"), ("reasoning_content", "\n")):
        texts = [part[key] for part in (before, message) if part.get(key)]
        if texts or key == "content":
            joined[key] = separator.join(texts)
    joined["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
    weights = [part["weight"] for part in (before, message) if "weight" in part]
    return joined | ({"weight": min(weights)} if weights else {})
