"""The order of the messages of a conversation."""

from collections.abc import Sequence

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import check_text
from minimind.data.messages import Message

ORDER = (
    "an optional system message, then user and assistant in turn, tool results after the calls they"
    " answer"
)


def check_order(messages: Sequence[Message], name: str = "messages") -> None:
    """Raise BadRowError unless messages are system?, user, assistant, user, assistant ..., the
    replies with text.

    A reply may call tools instead; their results follow it, then the assistant again.
    """
    for index, message in enumerate(messages):
        for text in (message["content"], message.get("reasoning_content", "")):
            if "\0" in text:  # formatting the name of every message would take time
                check_text(text, f"{name}[{index}]")

    first = 1 if messages and messages[0]["role"] == "system" else 0
    expected, ids = ("user",), set()
    for index, message in enumerate(messages[first:], first):
        role = message["role"]
        if role not in expected:
            found = f"the role {role!r}"
            if index:
                found = f"the role {role!r} after {_description(messages[index - 1])}"
            wanted = " or ".join(map(repr, expected))
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


def _description(message: Message) -> str:
    """What a message was understood as, for a message."""
    if calls := message.get("tool_calls"):
        return f"a call of {', '.join(call['function']['name'] for call in calls)}"
    kinds = {"tool": "a tool's result", "assistant": "a reply that calls no tool"}
    return kinds.get(message["role"], f"the role {message['role']!r}")
