"""One message in any of the usual forms -> OpenAI's: `{"role", "content", ...}`, checked.

{"role": "system" | "user", "content"}
{"role": "assistant", "content", "reasoning_content"?, "tool_calls"?, "weight"?}
{"role": "tool", "content", "name"?, "tool_call_id"?}
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minimind.data.calls import (
    EMPTY,
    bare_calls,
    parse_calls,
    parse_literal,
    split_calls,
    split_results,
)
from minimind.data.columns import FACTS, NAMES, Fields
from minimind.data.rows import BadRowError, check_text, shown

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "助手"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: the text of the message is the call
CONTENTS = ("content", "value", "text", "parts")
CALLS = ("tool_calls", "function_call")
REASONING = NAMES["reasoning_content"]
FLAGS = (  # whether a reply is trained
    *(
        "train",
        "training",
        "trainable",
        "train_on_turn",
        "loss",
        "learn",
        "loss_mask",
        "compute_loss",
        "supervised",
    ),
    *("include_in_loss", "use_for_training"),
)
MASKS = ("mask", "masked", "skip", "ignore", "exclude", "mask_loss", "no_loss")  # the opposite
WEIGHTS = ("weight", "loss_weight")
MARKS = {*FLAGS, *MASKS, *WEIGHTS, "train_detail"}
WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
TEXT_PARTS = ("text", "input_text", "output_text", None)
REASONING_PARTS = ("reasoning", "thinking")
CALL_PARTS = ("tool_use", "tool_call", "function_call")
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
VOICES = {
    "user": "human|user|用户|人类|问",
    "assistant": "assistant|ai|bot|gpt|chatgpt|助手|助理|答",
}
VOICE = re.compile(
    r"(?:(?:^|\n)[ \t]*(?:#{2,3}[ \t]*)?|#{3}[ \t]*)"
    + rf"(?:(?P<user>{VOICES['user']})|(?P<assistant>{VOICES['assistant']}))[ \t]*[:：]",
    re.IGNORECASE,
)


class Content(NamedTuple):
    """What stands in the content of one message."""

    text: str
    reasoning: str = ""
    calls: tuple = ()
    results: tuple = ()  # of tools, in a user's message as Anthropic writes them


def without_nulls(data: Mapping) -> dict:
    """A row or message -> itself without the null fields that HF datasets add."""
    return {key: value for key, value in data.items() if value is not None}


# Marks of what is trained


def parse_weight(message: Mapping, name: str) -> float | None:
    """The weight that marks of a row or message give it, 0 for "not trained"; None where there is
    none.

    Raises:
        BadRowError: a mark that is not understood.
    """
    if MARKS.isdisjoint(message):
        return None
    if message.get("train_detail") not in EMPTY:
        raise BadRowError(
            f"{name}: found 'train_detail', marks of parts of a reply, expected whole replies"
        )
    given = [
        (key, message[key])
        for key in (*FLAGS, *MASKS, *WEIGHTS)
        if message.get(key) not in (None, "")
    ]
    weights = [_parse_mark(key, value, name) for key, value in given]
    return 0.0 if 0.0 in weights else weights[-1] if weights else None


def _parse_mark(key: str, value: Any, name: str) -> float:
    value = WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if key not in WEIGHTS:
        if value not in (0, 1):  # also True and False
            raise BadRowError(f"{name}: found {key!r}: {shown(value)}, expected true or false")
        return float(value if key in FLAGS else not value)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise BadRowError(f"{name}: found {key!r}: {shown(value)}, expected a number from 0 up")
    return weight


# Reasoning and content


def split_reasoning(content: str) -> tuple[str, str]:
    """A reply -> the reasoning in the <think> block that opens it, and what follows.

    The opening tag may be missing, as in completions of DeepSeek-R1, whose prompt ends with it; a
    blank line then follows the closing one, unlike in a text about the tag.

    >>> split_reasoning("<think>\\n1 + 1\\n</think>\\n\\n2")
    ('1 + 1', '2')
    """
    text = content.lstrip()
    closing = "</think>" if text.startswith("<think>") else "</think>\n\n"
    if closing not in text or ("<think>" in text and not text.startswith("<think>")):
        return "", content
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return reasoning.strip("\n"), answer.lstrip("\n")


def parse_content(content: Any, name: str, separator: str = "") -> Content:
    """The content of a message: a string, or a list of typed parts; raises BadRowError."""
    if isinstance(content, str):
        return Content(content)
    if not isinstance(content, list) or not content:
        raise BadRowError(
            f"{name}: found the content {shown(content)}, expected 'content' (or 'value'): a string"
        )
    texts, reasoning, calls, results = [], [], [], []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in CALL_PARTS:
            calls += parse_calls(part.get("value", part), name)
        elif kind == "tool_result":
            inside = part.get("content", "")
            results.append(
                (
                    inside if isinstance(inside, str) else parse_content(inside, name, "\n").text,
                    part,
                )
            )
        elif kind in TEXT_PARTS or kind in REASONING_PARTS:
            text = next(
                (part[key] for key in (kind, *CONTENTS) if isinstance(part.get(key), str)), None
            )
            if text is None:
                raise BadRowError(
                    f"{name}: found the content {shown(content)}, expected a string or parts of"
                    " text"
                )
            (reasoning if kind in REASONING_PARTS else texts).append(text)
        else:
            raise BadRowError(
                f"{name}: found a part of type {shown(kind)} in the content, expected text only"
            )
    return Content(separator.join(texts), "\n".join(reasoning), tuple(calls), tuple(results))


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


def split_dialogue(text: str, name: str) -> list[Message] | None:
    """One string with both voices, "Human: ... Assistant: ...", -> its messages; None where it is
    no dialogue.

    A last, empty reply, which asks to be continued, is left out.

    Raises:
        BadRowError: the text begins as a dialogue, and its voices do not alternate.
    """
    found = list(VOICE.finditer(text))
    if (
        not found
        or text[: found[0].start()].strip()
        or not {"user", "assistant"} <= {m.lastgroup for m in found}
    ):
        return None
    ends = [*(match.start() for match in found[1:]), len(text)]
    messages = [
        {"role": match.lastgroup, "content": text[match.end() : end].strip()}
        for match, end in zip(found, ends, strict=True)
    ]
    expected = ("user", "assistant")
    if any(message["role"] != expected[index % 2] for index, message in enumerate(messages)):
        voices = ", ".join(match.group().strip() for match in found[:6])
        raise BadRowError(
            f"{name}: found a dialogue in one string with the voices {voices}, expected them in"
            " turn"
        )
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def check_order(messages: Sequence[Message], name: str = "messages") -> None:
    """Refuse (BadRowError) messages other than system?, user, assistant, user, assistant ...,
    replies with text.

    A reply may call tools instead; their results follow it, then the assistant again.
    """
    for index, message in enumerate(messages):
        for text in (message["content"], message.get("reasoning_content", "")):
            if "\0" in text:  # before the name is made, since there are many messages
                check_text(text, f"{name}[{index}]")
    first = 1 if messages and messages[0]["role"] == "system" else 0
    expected = ("user",)
    ids = set()
    for index, message in enumerate(messages[first:], first):
        role = message["role"]
        if role not in expected:
            wanted = " or ".join(map(repr, expected))
            found = f"the role {role!r}"
            if index:
                found = f"the role {role!r} after {_understood(messages[index - 1])}"
            raise BadRowError(f"{name}[{index}]: found {found}, expected {wanted} ({ORDER})")
        if role == "assistant":
            calls = message.get("tool_calls", [])
            if not message["content"].strip() and not calls:
                raise BadRowError(
                    f"{name}[{index}]: found an empty reply, expected text from the assistant"
                )
            ids = {call["id"] for call in calls if "id" in call}
            expected = ("tool",) if calls else ("user",)
        elif role == "tool":
            if ids and message.get("tool_call_id", next(iter(ids))) not in ids:
                found = f"found the tool_call_id {message['tool_call_id']!r}"
                raise BadRowError(
                    f"{name}[{index}]: {found}, expected one of the calls before: {', '.join(ids)}"
                )
            expected = ("tool", "assistant")
        else:
            expected = ("assistant",)
    if messages[-1]["role"] != "assistant":
        found = f"found the role {messages[-1]['role']!r} last"
        raise BadRowError(
            f"{name}[{len(messages) - 1}]: {found}, expected that the last message is the"
            " assistant's"
        )


ORDER = (
    "an optional system message, then user and assistant in turn, tool results after the calls they"
    " answer"
)


def _understood(message: Message) -> str:
    """What a message was taken for."""
    if calls := message.get("tool_calls"):
        return f"a call of {', '.join(call['function']['name'] for call in calls)}"
    kind = {"tool": "a tool's result", "assistant": "a reply that calls no tool"}
    return kind.get(message["role"], f"the role {message['role']!r}")
