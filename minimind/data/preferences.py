"""Preference pairs in the usual formats -> `{"prompt", "chosen", "rejected"}`, three lists of
messages, as in TRL."""

from collections.abc import Mapping

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.calls import EMPTY
from minimind.data.columns import NAMES, Fields
from minimind.data.conversations import (
    add_system,
    open_template_kwargs,
    parse_history,
    read_prompt,
    read_reply,
    read_tools,
    without_empty_system,
)
from minimind.data.dialogues import split_dialogue
from minimind.data.message_order import check_order
from minimind.data.messages import Message, parse_messages

PROMPTS = (
    *("prompt", "question", "query", "conversations", "messages", "conversation"),
    *("instruction", "problem", "input"),
)
RANKED, PREFERENCE = ("response1", "response2"), "overall_preference"


def to_preference(data: Mapping) -> dict[str, list]:
    """The prompt (the user or a tool last), chosen and rejected replies of a row in any of the
    formats, and its tools if it has any.

    The prompt is in a column, or is what two complete conversations have in common, or both. Raises
    BadRowError.
    """
    row = Fields.of(data)
    open_template_kwargs(row)
    open_ranked_responses(row)
    has_reply = row.find("messages") or row.find("response")  # ms-swift's, beside a rejected one
    if not row.find("rejected") or not (row.find("chosen") or has_reply):
        raise BadRowError(
            f"found keys {row.names}, expected 'chosen' and 'rejected', with a 'prompt' or within"
            " messages"
        )

    # The columns
    prompt, name = read_prompt_column(row)
    if row.find("chosen"):
        chosen = read_replies(row, "chosen")
    elif row.find("messages"):
        prompt, chosen = take_last_reply(prompt)
    else:
        chosen = read_reply(row)
    rejected = read_replies(row, "rejected")
    if rejected[0]["role"] != "assistant" and not row.find("chosen"):
        chosen = prompt + chosen
    if said(chosen) == said(rejected):
        raise BadRowError("found chosen equal to rejected, expected two different replies")

    # Two complete conversations: what they share is the prompt
    if not chosen or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        shared = split_prompt(chosen, rejected)
        check_same_prompt(prompt, chosen[:shared])
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt and (name := next((name for name in PROMPTS if name in row), None)):
        raise BadRowError(f"{name}: found {shown(row[name])}, expected a question")
    if not prompt:
        raise BadRowError(
            f"found keys {row.names}, expected one of {', '.join(PROMPTS)}, or complete"
            " conversations in chosen"
        )

    tools = read_tools(row, row.get(name or "chosen"), row.get(row.find("chosen")))
    prompt = add_system(row, without_empty_system(prompt, tools))
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for name in ("chosen", "rejected"):
        check_order(prompt + pair[name], f"(prompt + {name})")
    return {**pair, "tools": tools} if tools else pair


def open_ranked_responses(row: Fields) -> None:
    """Make a pair of two numbered replies of which a number says the better one (HelpSteer3).

    Raises:
        BadRowError: there is no number, or it is 0.
    """
    if not row.columns.keys() >= {*RANKED, PREFERENCE}:
        return
    preference = row.take(PREFERENCE)
    if isinstance(preference, bool) or not isinstance(preference, int | float) or not preference:
        raise BadRowError(
            f"{PREFERENCE}: found {shown(preference)}, expected a number below 0 where"
            f" {RANKED[0]} is the better reply, or above 0 where {RANKED[1]} is"
        )
    first, second = (row.columns.pop(name) for name in RANKED)
    better, worse = (first, second) if preference < 0 else (second, first)
    row.columns |= {"chosen": better, "rejected": worse}
    if isinstance(row.get("context"), list):
        row.columns["prompt"] = row.columns.pop("context")


def said(messages: list[Message]) -> list[dict]:
    """Messages without the white space around their words."""
    return [{**message, "content": message["content"].strip()} for message in messages]


def read_prompt_column(row: Fields) -> tuple[list[Message], str | None]:
    """The prompt of a row with its history, and its column; an empty list and None if none."""
    name = next((name for name in PROMPTS if row.get(name) not in EMPTY), None)
    if name is None:
        return [], None
    if name not in NAMES["messages"] and not isinstance(row[name], Mapping):
        return read_prompt(row), name
    value, history = row.take(name), row.take("history")
    # OpenAI's "input" holds the messages and the tools
    if isinstance(value, Mapping) and value.get("tools") not in EMPTY:
        row.columns.setdefault("tools", value["tools"])
    return parse_history(history) + parse_messages(value, name, "user", row), name


def read_replies(row: Fields, meaning: str) -> list[Message]:
    """The messages of the column "chosen" or "rejected": the reply alone, or the conversation."""
    name = row.find(meaning)
    value = row.take(name)
    dialogue = split_dialogue(value, name) if isinstance(value, str) else None
    return dialogue or parse_messages(value, name, "assistant", row)


def take_last_reply(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Split a conversation after its last question."""
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    end = questions[-1] + 1 if questions else 0
    return messages[:end], messages[end:]


def split_prompt(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages two conversations share, the last one the user's; raises BadRowError."""
    pairs = zip(chosen, rejected, strict=False)
    different = (index for index, (a, b) in enumerate(pairs) if a != b)
    shared = next(different, min(len(chosen), len(rejected)))
    is_within = shared == min(len(chosen), len(rejected))
    if shared and is_within and chosen[shared - 1]["role"] == "assistant":
        raise BadRowError(
            "found a conversation in chosen or rejected that is the beginning of the other,"
            f" {shared} messages, expected two different replies to one question"
        )
    if not shared or chosen[shared - 1]["role"] not in ("user", "tool"):
        raise BadRowError(
            f"found prompts that differ between chosen and rejected at message {shared}, "
            "expected the same messages up to a question, then two different replies"
        )
    return shared


def check_same_prompt(prompt: list[Message], repeated: list[Message]) -> None:
    """Raise BadRowError for a prompt with a message that is not in the shared beginning."""
    texts = {message["content"].strip() for message in repeated}
    if any(message["content"].strip() not in texts for message in prompt):
        raise BadRowError(
            "found a prompt that differs from the one within chosen and rejected, expected the same"
        )
