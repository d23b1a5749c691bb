"""Chat data in the usual formats -> `{"messages": [{"role", "content"}, ...]}`, checked.

The format of a row is recognised by its keys, so one file may mix them.
"""

from collections.abc import Sequence
from typing import Any

from minimind.data.files import BadRowError, check_text, shown, to_document

Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"}
# What would be lost without a word if the key were ignored.
UNSUPPORTED = {
    "tools": "tool conversations",
    "functions": "tool conversations",
    "tool_calls": "tool conversations",
    "function_call": "tool conversations",
    "reasoning_content": "replies with separate reasoning",
}
FORMATS = (
    "'messages' or 'conversations' (a list), 'instruction' and 'output', or a pair such as 'prompt' and 'completion'"
)
PAIRS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer")]
TURNS = ("user", "assistant")
ORDER = "an optional system message, then user and assistant in turn"


def without_nulls(data: dict, where: str = "") -> dict:
    """A row or message -> itself without the null fields HF datasets add; BadRowError for unsupported features."""
    for key, feature in UNSUPPORTED.items():
        if data.get(key) not in (None, "", "[]", "{}", [], {}):
            raise BadRowError(f"{where}found {key!r}, but {feature} are not supported yet, expected plain messages")
    return {key: value for key, value in data.items() if value is not None}


def parse_message(raw: Any, name: str) -> Message:
    """A message, also as ShareGPT's {"from", "value"} -> {"role", "content"}; raises BadRowError."""
    if not isinstance(raw, dict):
        raise BadRowError(f"{name}: found {shown(raw)}, expected an object with 'role' and 'content'")
    message = without_nulls(raw, f"{name}: ")
    role = message.get("role", message.get("from"))
    if isinstance(role, str) and role in TOOL_ROLES:
        raise BadRowError(f"{name}: found the role {role!r}, but tool conversations are not supported yet")
    if not isinstance(role, str) or role not in ROLES:
        found = f"role {shown(role)}" if role is not None else f"keys {shown(list(raw))}"
        raise BadRowError(f"{name}: found {found}, expected a 'role' (or 'from') of {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if not isinstance(content, str):
        raise BadRowError(f"{name}: found the content {shown(content)}, expected 'content' (or 'value'): a string")
    return {"role": ROLES[role], "content": content}


def parse_messages(value: Any, name: str, role: str | None = None) -> list[Message]:
    """A list of messages, one message, or a string where its `role` is given -> messages; raises BadRowError."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
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
    return [{"role": role, "content": text} for pair in value for role, text in zip(TURNS, pair, strict=True)]


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


def check_order(messages: Sequence[Message], name: str = "messages") -> None:
    """Refuse (BadRowError) messages other than system?, user, assistant, user, assistant ..., replies with text."""
    for index, message in enumerate(messages):
        if "\0" in message["content"]:  # before the name is made, since there are many messages
            check_text(message["content"], f"{name}[{index}]")
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for index, message in enumerate(messages[first:], first):
        expected = TURNS[(index - first) % 2]
        if message["role"] != expected:
            raise BadRowError(f"{name}[{index}]: found the role {message['role']!r}, expected {expected!r} ({ORDER})")
        if expected == "assistant" and not message["content"].strip():
            raise BadRowError(f"{name}[{index}]: found an empty reply, expected text from the assistant")
    if messages[-1]["role"] != "assistant":
        found = f"found the role {messages[-1]['role']!r} last"
        raise BadRowError(f"{name}[{len(messages) - 1}]: {found}, expected that the last message is the assistant's")


def to_messages(data: dict) -> list[Message]:
    """One row in any of the formats -> its messages, checked by `check_order`; raises BadRowError."""
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
    return add_system(data, messages)


def to_text(data: dict) -> str:
    """A document or a conversation -> its text, for training a tokenizer; raises BadRowError."""
    if "text" in data or "content" in data:
        return to_document(data)
    return "\n".join(message["content"] for message in to_messages(data))
