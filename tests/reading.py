"""Files, rows and messages that the tests of reading share."""

import pytest
from pipeline import assistant, user

from minimind.common.errors import UserError
from minimind.data import formats, json_files, lines, tables
from minimind.data.columns import Columns
from minimind.data.conversations import to_conversation
from minimind.data.files import read_rows

TWO = [{"text": "一"}, {"text": "two"}]
GOOD = '{"text": "good"}\n'


def set_limit(monkeypatch, name, value):
    """Set ROW_LIMIT or BUFFER of all readers."""
    for module in (formats, json_files, lines, tables):
        monkeypatch.setattr(module, name, value, raising=False)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def rows_of(path, **kwargs):
    return [(row.where.removeprefix(f"{path}:"), row.data) for row in read_rows([path], **kwargs)]


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


TALK = [user("hi"), assistant("hello")]


def system(content):
    return {"role": "system", "content": content}


def call(**arguments):
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


def turn(who, value):
    return {"from": who, "value": value}


def unread(rows, convert=to_conversation, **options):
    """The columns with text that a reading of `rows` left out, each with the number of its rows."""
    columns = Columns(**options)
    for number, row in enumerate(rows, 1):
        fields = columns.fields(row)
        convert(fields)
        columns.count(f"a.jsonl:{number}", fields)
    return {name: count for name, count, *_ in columns.findings()}
