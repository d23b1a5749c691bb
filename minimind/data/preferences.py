"""Preference pairs in the usual formats -> `{"prompt", "chosen", "rejected"}`, three lists of messages, as in TRL."""

from minimind.data.conversations import (
    Message,
    add_system,
    check_order,
    find_tools,
    parse_history,
    parse_instruction,
    parse_messages,
    without_empty_system,
    without_nulls,
)
from minimind.data.files import BadRowError, shown

PROMPTS = ("prompt", "question", "conversations", "messages", "instruction")


def parse_prompt(data: dict) -> list[Message]:
    """The prompt that a row spells out, with its history; empty if it spells out none."""
    name = next((name for name in PROMPTS if name in data), None)
    if name is None:
        return []
    prompt = parse_instruction(data) if name == "instruction" else parse_messages(data[name], name, "user")
    return parse_history(data.get("history")) + prompt


def split_prompt(chosen: list[Message], rejected: list[Message]) -> int:
    """Two whole conversations -> how many messages they share, the last one the user's; raises BadRowError."""
    pairs = zip(chosen, rejected, strict=False)
    shared = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if not shared or chosen[shared - 1]["role"] not in ("user", "tool"):
        raise BadRowError(
            f"found prompts that differ between chosen and rejected at message {shared}, "
            "expected the same messages up to a question, then two different replies"
        )
    return shared


def to_preference(data: dict) -> dict[str, list]:
    """One row in any of the formats -> prompt (the user or a tool last), chosen and rejected (replies), tools if any.

    The prompt is spelled out, or is what two whole conversations have in common, or both. Raises BadRowError.
    """
    data = without_nulls(data)
    if "chosen" not in data or "rejected" not in data:
        raise BadRowError(
            f"found keys {shown(list(data))}, expected 'chosen' and 'rejected', with a 'prompt' or within messages"
        )
    prompt = parse_prompt(data)
    chosen = parse_messages(data["chosen"], "chosen", "assistant")
    rejected = parse_messages(data["rejected"], "rejected", "assistant")
    if chosen == rejected:
        raise BadRowError("found chosen equal to rejected, expected two different replies")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        shared = split_prompt(chosen, rejected)
        repeated, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if prompt and repeated[-len(prompt) :] != prompt:
            raise BadRowError("found a prompt that differs from the one within chosen and rejected, expected the same")
        prompt = repeated
    if not prompt:
        raise BadRowError(
            f"found keys {shown(list(data))}, expected one of {', '.join(PROMPTS)}, or whole conversations in chosen"
        )
    name = next((name for name in PROMPTS if name in data), "chosen")
    tools = find_tools(data, data[name], data["chosen"])
    prompt = add_system(data, without_empty_system(prompt, tools))
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        check_order(prompt + reply, f"(prompt + {name})")
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {**pair, "tools": tools} if tools else pair
