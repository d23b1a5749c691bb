"""The texts inside a row of any kind (document, conversation, preference pair), which steps read
and replace."""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

from minimind.data.columns import NAMES, Fields
from minimind.data.content import CONTENTS
from minimind.data.conversations import LETTERS, to_messages
from minimind.data.files import to_document
from minimind.data.markers import Boundaries
from minimind.data.messages import CALL_ROLES, REASONING, ROLES
from minimind.data.preferences import to_preference

# Meanings of columns whose text is trained, in the order in which a model reads them.
PROMPTS = ("prompt", "input", "context")
MEANINGS = {
    "conversation": (*PROMPTS, "choices", "reasoning_content", "response"),
    "preference": (*PROMPTS, "choices", "response", "chosen", "rejected"),
}
MACHINE_ROLES = {*CALL_ROLES, *(name for name, role in ROLES.items() if role == "tool")}


class Slot(NamedTuple):
    """The place of one text: `container[key]`.

    `machine`: written by and for programs (tool calls and their results), where only personal data
    is masked, since other changes would break its syntax. `rejected`: the reply of a pair that is
    meant to be worse.
    """

    container: Any
    key: Any
    machine: bool = False
    rejected: bool = False

    @property
    def text(self) -> str:
        """The text; of a tool call that is not a string, its JSON."""
        value = self.container[self.key]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def kind_of(row: dict) -> str:
    """The kind of a row by its columns: "document", "conversation" or "preference"."""
    fields = Fields(row)
    # A number or a flag in such a column is the mark of a reply.
    is_pair = isinstance(fields.get(fields.find("rejected")), str | list | dict)
    if is_pair and any(map(fields.find, ("chosen", "messages", "response"))):
        return "preference"
    if fields.get(fields.find("messages")):
        return "conversation"
    has_prompt = fields.find("prompt") or fields.find("input")
    has_thoughts = fields.find("reasoning_content") and "content" in fields
    if has_prompt and (fields.find("response") or has_thoughts):
        return "conversation"
    return "conversation" if "instruction" in fields and "text" not in fields else "document"


def check_row(row: dict) -> dict:
    """The row itself if training could use it; otherwise raises BadRowError."""
    convert = {"document": to_document, "conversation": to_messages, "preference": to_preference}
    convert[kind_of(row)](row)
    return row


def split_row(row: dict, boundaries: Boundaries) -> list[dict]:
    """A row for each part of a document between the boundary markers spelled out in it; any other
    row stays one. Raises BadRowError as `Boundaries.split`."""
    if kind_of(row) != "document":
        return [row]
    ((_, name, *_),) = _slots(row)
    return [{**row, name: document} for document in boundaries.split(row[name])]


class RowTexts:
    """The texts of one row; `replace` and `mask` change them in place, and no other field."""

    def __init__(self, row: dict):
        self.slots = list(_slots(row))

    @cached_property
    def prose(self) -> str:
        """What training should imitate, joined by newlines: filters judge this."""
        return "\n".join(slot.text for slot in self.slots if not slot.machine and not slot.rejected)

    @cached_property
    def all_text(self) -> str:
        """All texts joined by newlines, for lengths, duplicates and evaluation sets."""
        return "\n".join(slot.text for slot in self.slots)

    def replace(self, change: Callable[[str], str]) -> tuple[bool, bool]:
        """Put each text through `change`; returns whether any changed, and whether any lost all its
        text."""
        changes = self._put(change, machine=False)
        return bool(changes), any(not after.strip() and before.strip() for before, after in changes)

    def mask(self, change: Callable[[str], str]) -> tuple[bool, bool]:
        """Identical to `replace`, except that it reaches strings in machine-written JSON too."""
        changed, emptied = self.replace(change)
        changes = self._put(lambda value: _map_strings(value, change), machine=True)
        return changed or bool(changes), emptied

    def _put(self, change: Callable[[Any], Any], machine: bool) -> list[tuple[Any, Any]]:
        """Put the texts that are (not) machine-written through `change`; returns what changed, as
        pairs of before and after."""
        changes = []
        for slot in self.slots:
            before = slot.container[slot.key]
            if slot.machine == machine and (after := change(before)) != before:
                slot.container[slot.key] = after
                changes.append((before, after))
        if changes:
            self.__dict__.pop("prose", None)
            self.__dict__.pop("all_text", None)
        return changes


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Put every string in a JSON value through `change`, also those inside a string of JSON."""
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    # A phone number may be written as a number
    if isinstance(value, int) and not isinstance(value, bool):
        after = change(str(value))
        return value if after == str(value) else after
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return change(value)
        after = _map_strings(inner, change)
        return value if after == inner else json.dumps(after, ensure_ascii=False)
    return change(value)


def _slots(row: dict) -> Iterator[Slot]:
    kind = kind_of(row)
    if kind == "document":
        # The same choice as `files.to_document`.
        name = "text" if row.get("text") is not None or row.get("content") is None else "content"
        yield Slot(row, name)
        return
    fields = Fields(row)
    names = {str(name).strip().lower(): name for name in row}
    if isinstance(fields.get(system := fields.find("system")), str):
        yield Slot(row, names[system])
    history = row.get("history")
    for turn in history if isinstance(history, list) else ():
        if isinstance(turn, dict):
            yield from _message(turn)
        else:
            yield from (Slot(turn, index) for index in range(len(turn)))
    for name in _read_columns(fields, kind):
        for slot in _value(row, names.get(name, name)):
            yield slot._replace(rejected=kind == "preference" and name in NAMES["rejected"])


def _read_columns(fields: Fields, kind: str) -> Iterator[str]:
    """The columns of a conversation or pair whose texts are trained, each once."""
    messages = fields.find("messages")
    if messages and fields[messages]:
        yield messages
        if kind == "conversation":
            return
    for meaning in MEANINGS[kind]:
        if name := fields.find(meaning):
            yield name
        elif meaning == "response" and "content" in fields:
            yield "content"
        if meaning == "choices":
            yield from (letter for letter in LETTERS.lower() if letter in fields)


def _value(row: dict, name: str) -> Iterator[Slot]:
    """A field that is a text, a message or a list of messages."""
    value = row.get(name)
    if isinstance(value, str):
        yield Slot(row, name, machine=value.lstrip()[:2] in ("[{", '{"'))  # messages as JSON
    elif isinstance(value, dict):
        yield from _message(value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield from _message(item)
            elif isinstance(item, str):  # a choice
                yield Slot(value, index)


def _message(message: dict) -> Iterator[Slot]:
    machine = message.get("role", message.get("from")) in MACHINE_ROLES
    for name in (*REASONING, *CONTENTS):
        value = message.get(name)
        if isinstance(value, str) or (machine and value):
            yield Slot(message, name, machine)
        elif isinstance(value, list):  # content in parts, some of them texts
            for index, part in enumerate(value):
                if isinstance(part, dict):
                    keys = (key for key in CONTENTS if isinstance(part.get(key), str))
                    yield from (Slot(part, key) for key in keys)
                elif isinstance(part, str):
                    yield Slot(value, index)
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            yield Slot(message, name, machine=True)
