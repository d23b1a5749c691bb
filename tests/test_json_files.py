import json

import pytest
from reading import TALK, refusal, rows_of, set_limit, write

from minimind.data.conversations import to_messages
from minimind.data.files import read_documents, read_rows


def test_a_jsonl_line_beyond_the_limit_is_a_bad_row(tmp_path, monkeypatch):
    set_limit(monkeypatch, "ROW_LIMIT", 40)
    # 12 bytes around each text
    lines = [json.dumps({"text": "x" * length}) for length in (1, 60, 200, 28, 27)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert [len(text) for text in read_documents([path], "skip")] == [1, 27]
    assert refusal(lambda: list(read_rows([path], "error"))).startswith(
        f"{path}:2: found a row of more than 40 bytes"
    )


def test_a_list_is_read_as_it_goes_and_its_values_may_be_larger_than_the_buffer(
    tmp_path, monkeypatch
):
    set_limit(monkeypatch, "BUFFER", 8)
    data = [
        {"text": "狐狸" * 100, "n": -12.5e-3},
        {"text": "\\u4e00 \\", "more": [1, [True, None]]},
    ]
    path = write(
        tmp_path / "a.json", "\ufeff \n[ \n" + ",\n\n".join(map(json.dumps, data)) + "\n ] \n"
    )
    assert rows_of(path) == [("3", data[0]), ("5", data[1])]


def test_a_mistake_in_a_list_is_found_where_it_is_whatever_the_buffer(tmp_path, monkeypatch):
    text = '[\n{"text": "one"},\n {"text": "two", "n": 17, "狐": tru},\n{"text": "three"}\n]'
    line, column = next(
        (i, row.index("tru") + 1) for i, row in enumerate(text.split("\n"), 1) if "狐" in row
    )
    for size in (1, 3, 16, 33, 1 << 20):
        set_limit(monkeypatch, "BUFFER", size)
        path = write(tmp_path / "a.json", text)
        assert f"{path}:{line}: not JSON at column {column} (Expecting value)" in refusal(
            lambda path=path: list(read_rows([path]))
        )


def test_escaped_complete_characters_are_not_taken_for_halves(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00 \\\\ud83d"}')
    assert list(read_documents([path])) == ["😀 \\ud83d"]


@pytest.mark.parametrize(
    "text",
    [
        '{\n "instruction": "hi",\n "output": "hello"\n}',
        '{"instruction": "hi", "output": "hello"}',
        '{"instruction": "hi", "output": "hello"},',
        '{"version": "1.0", "data": [{"instruction": "hi", "output": "hello"}]}',
        (
            '{\n"train": [{"instruction": "hi", "output": "hello"}],\n"test": [{"instruction": "x",'
            ' "output": "y"}]}'
        ),
        (
            '{"rows": [{"row_idx": 0, "row": {"instruction": "hi", "output": "hello"},'
            ' "truncated_cells": []}]}'
        ),
        '{"instruction": ["hi"], "output": ["hello"]}',
        '{"instruction": {"0": "hi"}, "output": {"0": "hello"}}',
        '{"columns": ["instruction", "output"], "index": [0], "data": [["hi", "hello"]]}',
        (
            '{"made_by": "us", "chats": [{"messages": [{"role": "user", "content": "hi"}, '
            '{"role": "assistant", "content": "hello"}]}]}'
        ),
    ],
)
def test_a_json_file_of_one_object_is_read_as_what_it_is(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert [row.data for row in read_rows([str(tmp_path / "a.json")], "error", to_messages)] == [
        TALK
    ]


def test_objects_over_several_lines_are_read_one_after_the_other(tmp_path):
    text = '{\n "instruction": "hi",\n "output": "hello"\n}\n'
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(text * 3, encoding="utf-8")
        rows = list(read_rows([str(tmp_path / name)], "error", to_messages))
        assert [row.where.rsplit(":", 1)[1] for row in rows] == ["1", "5", "9"]
        assert [row.data for row in rows] == [TALK] * 3
