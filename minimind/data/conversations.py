"""Chat data in the usual formats -> one form, OpenAI's: `{"role", "content", ...}` messages and tools, checked.

    {"role": "system" | "user", "content"}
    {"role": "assistant", "content", "reasoning_content"?, "tool_calls"?, "weight"?}
    {"role": "tool", "content", "name"?, "tool_call_id"?}

The format of a row is recognised by its keys, so one file may mix them.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from minimind.data.files import BadRowError, check_text, shown, to_document

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's: the text of the message is the call
REASONING = ("reasoning_content", "reasoning", "thinking")
FORMATS = (
    "'messages' or 'conversations' (a list), 'instruction' and 'output', or a pair such as 'prompt' and 'completion'"
)
PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer")]
TURNS = ("user", "assistant")
ORDER = "an optional system message, then user and assistant in turn, tool results after the calls they answer"
EMPTY = (None, "", "[]", "{}", [], {})


class Conversation(NamedTuple):
    """Messages in order, the tools they may call (OpenAI's schemas), and the row's weight in a weighted loss."""

    messages: list[Message]
    tools: list[dict] | None = None
    weight: float = 1.0


def without_nulls(data: dict) -> dict:
    """A row or message -> itself without the null fields that HF datasets add."""
    return {key: value for key, value in data.items() if value is not None}


def parse_json(value: Any, name: str) -> Any:
    """JSON in a string -> its value, anything else as it is; raises BadRowError."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value, parse_constant=lambda word: int(word))  # int("NaN") is the ValueError it should be
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise BadRowError(f"{name}: found {shown(value)}, expected JSON") from None
    return parsed


def parse_tools(value: Any, name: str = "tools") -> list[dict] | None:
    """Tool schemas, also bare or as JSON in a string -> [{"type": "function", "function": {"name", ...}}] or None."""
    value = parse_json(value, name) if value not in EMPTY else None
    if value in EMPTY:
        return None
    tools = []
    for index, raw in enumerate(value if isinstance(value, list) else [value]):
        tool = parse_json(raw, f"{name}[{index}]")
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{name}[{index}]: found {shown(raw)}, expected a function with a 'name'")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def parse_calls(value: Any, name: str) -> list[dict]:
    """Calls, also bare or as JSON in a string -> [{"type": "function", "function": {"name", "arguments"}}, ...].

    `arguments` is an object; "id" is kept. Raises BadRowError.
    """
    value = parse_json(value, name)
    calls = []
    for index, raw in enumerate(value if isinstance(value, list) else [value]):
        where = f"{name}[{index}]"
        call = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadRowError(f"{where}: found {shown(raw)}, expected a call with 'name' and 'arguments'")
        arguments = call.get("arguments", call.get("parameters"))
        arguments = {} if arguments in EMPTY else parse_json(arguments, f"{where}: arguments")
        if not isinstance(arguments, dict):
            raise BadRowError(f"{where}: found the arguments {shown(arguments)}, expected an object")
        called = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        calls.append({"id": raw["id"]} | called if isinstance(raw.get("id"), str) else called)
    return calls


def parse_weight(message: dict, name: str) -> float | None:
    """The weight a row or message names ("weight", or "train": false for 0), None where it names none."""
    if (train := message.get("train")) is not None and not isinstance(train, bool):
        raise BadRowError(f"{name}: found 'train': {shown(train)}, expected true or false")
    weight = message.get("weight", None if train is None else 1)
    if weight is None:
        return None
    try:
        weight = float(weight)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise BadRowError(f"{name}: found 'weight': {shown(message['weight'])}, expected a number from 0 up")
    return 0.0 if train is False else weight


def split_reasoning(content: str) -> tuple[str, str]:
    """A reply -> the reasoning in the <think> block that opens it, and what follows.

    The opening tag may be missing, as in completions of DeepSeek-R1, whose prompt ends with it.

    >>> split_reasoning("<think>\\n1 + 1\\n</think>\\n\\n2")
    ('1 + 1', '2')
    """
    text = content.lstrip()
    closing = "</think>" if text.startswith("<think>") else "</think>\n"
    if closing not in text or ("<think>" in text and not text.startswith("<think>")):
        return "", content
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return reasoning.strip("\n"), answer.lstrip("\n")


def split_calls(content: str, name: str) -> tuple[str, list[dict]]:
    """A reply -> its text and the calls in the <tool_call> blocks that end it; as it is where there are none."""
    text, *blocks = content.split("<tool_call>")
    calls = []
    for block in blocks:
        call, closed, rest = block.partition("</tool_call>")
        try:
            calls += parse_calls(call.strip(), name) if closed and not rest.strip() else parse_calls(None, name)
        except BadRowError:
            return content, []
    return (text.strip(), calls) if calls else (content, [])


def parse_content(content: Any, name: str) -> str:
    """The text of a message, also as OpenAI's list of text parts; raises BadRowError."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
    if not isinstance(content, str):
        raise BadRowError(f"{name}: found the content {shown(content)}, expected 'content' (or 'value'): a string")
    return content


def parse_message(raw: Any, name: str) -> Message:
    """A message, also as ShareGPT's {"from", "value"} -> one in the form above; raises BadRowError."""
    if not isinstance(raw, dict):
        raise BadRowError(f"{name}: found {shown(raw)}, expected an object with 'role' and 'content'")
    message = without_nulls(raw)
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        found = f"role {shown(role)}" if role is not None else f"keys {shown(list(raw))}"
        raise BadRowError(f"{name}: found {found}, expected a 'role' (or 'from') of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    calls = next((message[key] for key in ("tool_calls", "function_call") if message.get(key) not in EMPTY), None)
    if role in CALL_ROLES:
        content, calls = "", content
    role = ROLES[role]
    if role == "assistant":
        return _parse_reply(message, content, calls, name)
    if calls is not None:
        raise BadRowError(f"{name}: found tool calls of the role {role!r}, expected them of the assistant")
    if message.get("train") is True:
        raise BadRowError(f"{name}: found 'train': true for the role {role!r}, expected it of the assistant only")
    if role == "tool" and not isinstance(content, str) and content is not None:
        content = json.dumps(content, ensure_ascii=False)
    parsed = {"role": role, "content": parse_content(content, name)}
    if role == "tool":
        parsed |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    return parsed


def _parse_reply(message: dict, content: Any, calls: Any, name: str) -> Message:
    content = parse_content("" if content is None and calls is not None else content, name)
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    if reasoning is None:
        reasoning, content = split_reasoning(content)
    elif not isinstance(reasoning, str):
        raise BadRowError(f"{name}: found the reasoning {shown(reasoning)}, expected a string")
    if calls is None:
        content, calls = split_calls(content, name)
    else:
        calls = parse_calls(calls, f"{name}: tool_calls")
    parsed = {"role": "assistant", "content": content}
    if reasoning.strip():
        parsed |= {"content": content.lstrip("\n"), "reasoning_content": reasoning.strip("\n")}
    if calls:
        parsed["tool_calls"] = calls
    if (weight := parse_weight(message, name)) is not None:
        parsed["weight"] = weight
    return parsed


def parse_messages(value: Any, name: str, role: str | None = None) -> list[Message]:
    """A list of messages, one message, or a string where its `role` is given -> messages; raises BadRowError."""
    if isinstance(value, str) and role:
        return [parse_message({"role": role, "content": value}, name)]
    if isinstance(value, dict):
        return [parse_message(value, name)]
    if not isinstance(value, list | tuple) or not value:
        raise BadRowError(f"{name}: found {shown(value)}, expected {'a string or ' if role else ''}a list of messages")
    return [parse_message(raw, f"{name}[{index}]") for index, raw in enumerate(value)]


def parse_history(value: Any) -> list[Message]:
    """Earlier turns, as messages or as [user, assistant] pairs, perhaps none -> messages; raises BadRowError."""
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) for pair in value):
        return parse_messages(value, "history")
    for index, pair in enumerate(value):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRowError(f"history[{index}]: found {shown(pair)}, expected a pair of strings [user, assistant]")
    return [
        parse_message({"role": role, "content": text}, f"history[{index}]")
        for index, pair in enumerate(value)
        for role, text in zip(TURNS, pair, strict=True)
    ]


def parse_instruction(data: dict) -> list[Message]:
    """Alpaca's instruction and optional input -> one user message, joined by a newline as in LLaMA-Factory."""
    for name in ("instruction", "input"):
        if not isinstance(data.get(name, ""), str):
            raise BadRowError(f"{name}: found {shown(data[name])}, expected a string")
    texts = [data["instruction"], data.get("input", "")]
    return [{"role": "user", "content": "\n".join(text for text in texts if text)}]


def add_system(data: dict, messages: list[Message]) -> list[Message]:
    """A row's optional top-level "system" and its messages -> the messages with it in front; raises BadRowError."""
    system = data.get("system", "")
    if not isinstance(system, str):
        raise BadRowError(f"system: found {shown(system)}, expected a string")
    check_text(system, "system")
    if not system.strip():
        return messages
    if messages[0]["role"] == "system" and messages[0]["content"] != system:
        raise BadRowError("found two system prompts, in 'system' and in the first message, expected one")
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def find_tools(data: dict, *lists: Any) -> list[dict] | None:
    """The tools of a row: its own "tools" or "functions", or those that minimind hangs on the system message.

    Tools that the system prompt spells out already are not given twice. Raises BadRowError.
    """
    found = [parse_tools(data.get(key), key) for key in ("tools", "functions")]
    systems = [m for value in lists if isinstance(value, list | tuple) for m in value[:1] if isinstance(m, dict)]
    found += [parse_tools(message.get("tools"), "messages[0]: tools") for message in systems]
    found = [tools for tools in found if tools]
    if any(tools != found[0] for tools in found):
        raise BadRowError("found two different lists of tools, in the row and in its system message, expected one")
    texts = [data.get("system"), *(message.get("content", message.get("value")) for message in systems)]
    if any(isinstance(text, str) and "<tools>" in text for text in texts):
        return None
    return found[0] if found else None


def without_empty_system(messages: list[Message], tools: list[dict] | None) -> list[Message]:
    """Messages without a system message that has no words but only carries the tools, as minimind's does."""
    return messages[1:] if tools and messages[0] == {"role": "system", "content": ""} else messages


def check_order(messages: Sequence[Message], name: str = "messages") -> None:
    """Refuse (BadRowError) messages other than system?, user, assistant, user, assistant ..., replies with text.

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
            raise BadRowError(f"{name}[{index}]: found the role {role!r}, expected {wanted} ({ORDER})")
        if role == "assistant":
            calls = message.get("tool_calls", [])
            if not message["content"].strip() and not calls:
                raise BadRowError(f"{name}[{index}]: found an empty reply, expected text from the assistant")
            ids = {call["id"] for call in calls if "id" in call}
            expected = ("tool",) if calls else ("user",)
        elif role == "tool":
            if ids and message.get("tool_call_id", next(iter(ids))) not in ids:
                found = f"found the tool_call_id {message['tool_call_id']!r}"
                raise BadRowError(f"{name}[{index}]: {found}, expected one of the calls before: {', '.join(ids)}")
            expected = ("tool", "assistant")
        else:
            expected = ("assistant",)
    if messages[-1]["role"] != "assistant":
        found = f"found the role {messages[-1]['role']!r} last"
        raise BadRowError(f"{name}[{len(messages) - 1}]: {found}, expected that the last message is the assistant's")


def to_conversation(data: dict) -> Conversation:
    """One row in any of the formats -> its messages, checked by `check_order`, and tools; raises BadRowError."""
    data = without_nulls(data)
    if data.get("label") is False:  # KTO's mark of a reply that nobody should learn
        raise BadRowError("found 'label': false, a rejected reply, expected replies to learn from")
    pair = next((pair for pair in PAIRS if pair[0] in data and pair[1] in data), None)
    if name := next((name for name in ("messages", "conversations") if name in data), None):
        messages = parse_messages(data[name], name)
    elif "instruction" in data and "output" in data:
        name = "messages"
        reply = parse_messages(data["output"], "output", "assistant")
        messages = parse_history(data.get("history")) + parse_instruction(data) + reply
    elif pair:
        name = "messages"
        prompt = parse_messages(data[pair[0]], pair[0], "user")
        messages = parse_history(data.get("history")) + prompt + parse_messages(data[pair[1]], pair[1], "assistant")
    else:
        raise BadRowError(f"found keys {shown(list(data))}, expected {FORMATS}")
    check_order(messages, name)
    tools = find_tools(data, data.get(name))
    weight = parse_weight(data, "the row")
    return Conversation(
        add_system(data, without_empty_system(messages, tools)), tools, 1.0 if weight is None else weight
    )


def to_messages(data: dict) -> list[Message]:
    """`to_conversation` without tools and weight; raises BadRowError."""
    return to_conversation(data).messages


def to_text(data: dict) -> str:
    """A document or a conversation -> its text, for training a tokenizer; raises BadRowError."""
    if "text" in data or "content" in data:
        return to_document(data)
    messages, tools, _ = to_conversation(data)
    texts = [json.dumps(tool, ensure_ascii=False) for tool in tools or ()]
    for message in messages:
        texts += [message.get("reasoning_content", ""), message["content"]]
        texts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(text for text in texts if text)
