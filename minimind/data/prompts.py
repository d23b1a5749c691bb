"""Files of prompts -> conversations that end with a question, ready for a reply."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minimind.common.errors import BadRowError
from minimind.data.calls import EMPTY
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.columns import Columns, Fields
from minimind.data.conversations import (
    Conversation,
    add_system,
    open_template_kwargs,
    read_prompt,
    read_tools,
    to_conversation,
    without_empty_system,
)
from minimind.data.files import read_rows, to_document
from minimind.data.formats import format_of
from minimind.data.message_order import check_order
from minimind.data.messages import parse_messages
from minimind.data.preferences import to_preference
from minimind.data.sources import File, expand

REPLY = {"role": "assistant", "content": "?"}  # stands for the reply, where the order is checked


def to_prompt(data: Mapping) -> Conversation:
    """A row up to its last question: a chat without its last reply, the prompt of a preference
    pair, or a prompt alone. Raises BadRowError."""
    row = Fields.of(data)
    if row.find("rejected"):
        pair = to_preference(row)
        return Conversation(pair["prompt"], pair.get("tools"))

    open_template_kwargs(row)
    name, value = row.find("messages"), None
    if name and (value := row.take(name)) not in EMPTY:
        messages = parse_messages(value, name, "user", row)
    elif not (messages := read_prompt(row)):
        messages, tools, _ = to_conversation(row)  # a dialogue in one text, or it says what is read
        return Conversation(messages[:-1], tools)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    check_order([*messages, REPLY], name or "prompt")
    tools = read_tools(row, value)
    return Conversation(add_system(row, without_empty_system(messages, tools)), tools)


def read_prompts(
    paths: Sequence[str | File],
    encoder: ChatEncoder,
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
) -> list[Conversation]:
    """The prompts of files, directories, globs and datasets of the Hub; each line of a txt file is
    one. A prompt that the template of `encoder` cannot express is a bad row.

    Raises:
        UserError: see `files.read_rows`; bad rows are judged file by file.
    """

    def checked(prompt: Conversation) -> Conversation:
        (ids,) = encoder.encode([prompt], prompt=True)
        if isinstance(ids, BadRowError):
            raise ids
        return prompt

    def of_line(data: Mapping) -> Conversation:
        return checked(Conversation([{"role": "user", "content": to_document(data)}]))

    def of_row(data: Mapping) -> Conversation:
        return checked(to_prompt(data))

    prompts = []
    for file in expand(paths):
        is_text = isinstance(file, Path) and format_of(file)[0] == ".txt"
        convert = of_line if is_text else of_row
        rows = read_rows([file], on_bad_rows, convert, "line", columns=columns)
        prompts += [row.data for row in rows]
    return prompts
