import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind.data import files
from minimind.data.files import BadRowError, BadRows, expand, read_documents, read_rows
from minimind.errors import UserError

GOOD = '{"text": "good"}\n'


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


TWO = [{"text": "一"}, {"text": "two"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", LINES, ["1", "2"]),
        ("a.jsonl", "\n" + LINES.replace("\n", "\r\n\r\n"), ["2", "4"]),
        ("a.JSONL", b"\xef\xbb\xbf" + LINES.encode(), ["1", "2"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode()), ["1", "2"]),
        ("a.json", LINES, ["1", "2"]),
        ("a.json", json.dumps(TWO), ["1", "1"]),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(TWO, indent=2, ensure_ascii=False).encode(), ["2", "5"]),
        ("a.csv", "text\n一\n\ntwo\n", ["2", "4"]),
        ("a.csv", b"\xef\xbb\xbf" + "text\r\n一\r\ntwo".encode(), ["2", "3"]),
        ("a.tsv.gz", gzip.compress("text\n一\ntwo\n".encode()), ["2", "3"]),
    ],
)
def test_every_text_format_gives_its_rows_with_their_line_numbers(tmp_path, name, content, places):
    path = write(tmp_path / name, content)
    assert rows_of(path) == list(zip(places, TWO, strict=True))


def test_parquet_gives_its_rows_with_their_row_numbers_across_batches(tmp_path):
    path = tmp_path / "a.parquet"
    data = [{"text": str(i), "messages": [{"role": "user"}]} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(data), path)
    assert rows_of(str(path)) == [(f"row {i + 1}", row) for i, row in enumerate(data)]


def test_a_txt_file_is_one_document(tmp_path):
    assert list(read_documents([write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\n")])) == ["one\n\ntwo\n"]


def test_a_csv_row_over_several_lines_has_the_number_of_its_first_line(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'text,n\n"one\ntwo",1\n{long},2\n')
    assert rows_of(path) == [("2", {"text": "one\ntwo", "n": "1"}), ("4", {"text": long, "n": "2"})]


@pytest.mark.parametrize(
    ("name", "content", "where", "words"),
    [
        ("a.jsonl", GOOD + "\n{'text': 1}\n", 3, ["{'text': 1}", "not JSON", "column 2", "one JSON object per line"]),
        ("a.jsonl", GOOD + '{"text": "cut', 2, ["cut", "Unterminated string", "expected"]),
        ("a.jsonl", GOOD + "[1, 2]\n", 2, ["found [1, 2]", "expected a JSON object"]),
        ("a.jsonl", GOOD.encode() + '{"text": "中"}'.encode("gb18030"), 2, ["0xd6", "offset 10", "UTF-8", "iconv"]),
        ("a.jsonl", GOOD + '{"text": "\\ud83d"}', 2, ["surrogate", "expected whole characters"]),
        ("a.jsonl", GOOD + "[" * 100_000, 2, ["not JSON", "expected"]),
        ("a.jsonl", GOOD + "1" * 5_000, 2, ["found the number", "expected one within"]),
        ("a.json", "{\n" + GOOD, 1, ["not JSON", "one list of objects"]),
        ("a.json", '[\n{"text": "good"},\n\n"plain"]', 4, ['found "plain"', "expected a JSON object"]),
        ("a.csv", "text,n\ngood,1\nbad\n", 3, ["found 1 fields", "expected 2: text, n"]),
        ("a.csv", b"text\ngood\n\xff\n", 3, ["0xff", "expected UTF-8"]),
        ("a.txt", "中".encode("gb18030"), 1, ["0xd6", "expected UTF-8"]),
    ],
)
def test_a_row_that_cannot_be_parsed_is_named_with_its_line_number(tmp_path, name, content, where, words):
    path = write(tmp_path / name, content)
    message = refusal(lambda: list(read_rows([path], "error")))
    assert message.startswith(f"{path}:{where}: found ")
    assert all(word in message for word in [*words, "--on_bad_rows skip"])


def test_escaped_whole_characters_are_not_taken_for_halves(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00 \\\\ud83d"}')
    assert list(read_documents([path])) == ["😀 \\ud83d"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.json",
            '[\n{"text": "one"}\n{"text": "two"}]',
            [":2: not JSON at column 16", "expected a list of objects", ".jsonl"],
        ),
        ("a.json", '[{"text": "one"}] [{"text": "two"}]', [":1: not JSON", "end of the list"]),
        ("a.json", '[\n{"text": "one"},\n', [":3: not JSON", "Expecting value"]),
        ("a.json", b'[{"text": "\xff"}]', ["0xff", "expected UTF-8"]),
        ("a.json", "[" + "1" * 5_000 + "]", ["limit", "Save the file again"]),
        (
            "a.csv",
            'text\ngood\n"never closed\ngood\n',
            [":3: found a broken row", "expected fields with closed quotes"],
        ),
        ("a.csv", "text,text\n1,2\n", [":1: found the header", "expected each column name once"]),
        ("a.parquet", b"PAR1 not at all", ["after row 0", "not readable as parquet"]),
        ("a.jsonl.gz", b"not gzip", ["cannot be read", "Check the file"]),
        ("a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], ["cannot be read", "Check the file"]),
    ],
)
def test_a_file_whose_structure_is_lost_is_refused_even_when_bad_rows_are_skipped(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    message = refusal(lambda: list(read_rows([path], "skip")))
    assert path in message
    assert all(word in message for word in words)


def test_files_directories_and_globs_mix_and_give_each_file_once(tmp_path):
    names = ["b.jsonl", "a.jsonl", "deep/er/c.csv", "README.md", ".hidden/d.jsonl", "deep/.e.jsonl"]
    for name in names:
        write(tmp_path / name, GOOD)
    given = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path), str(tmp_path / "**" / "*.csv")]
    assert [str(path.relative_to(tmp_path)) for path in expand(given)] == ["b.jsonl", "a.jsonl", "deep/er/c.csv"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    assert [path.name for path in expand([write(tmp_path / "a[1].jsonl", GOOD)])] == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("absent.jsonl", ["does not exist", "expected a file, directory or glob"]),
        ("none", ["found no data file", ".jsonl", ".parquet"]),
        ("*.jsonlines", ["found no data file", "expected files with"]),
        ("notes.md", ["extension '.md'", "expected .jsonl"]),
        ("empty.jsonl", ["empty file", "expected rows"]),
    ],
)
def test_a_path_without_data_is_named_with_what_was_expected(tmp_path, given, words):
    (tmp_path / "none").mkdir()
    write(tmp_path / "notes.md", "notes")
    write(tmp_path / "empty.jsonl", "")
    message = refusal(lambda: read_rows([str(tmp_path / given)]))  # at once, not at the first row
    assert message.startswith(str(tmp_path / given))
    assert all(word in message for word in words)


def test_no_paths_at_all_are_refused():
    assert "expected at least one file" in refusal(lambda: expand([]))


@pytest.mark.parametrize("content", ["\n\n", "[]"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    assert refusal(lambda: list(read_rows([path]))).startswith(f"{path}: found no rows, expected")


@pytest.mark.parametrize("policy", [None, "skip"])
def test_reading_is_refused_if_no_usable_row_is_left(tmp_path, policy):
    path = write(tmp_path / "a.jsonl", "no\nnor this\n")
    message = refusal(lambda: list(read_rows([path], policy)))
    assert message.startswith(f"{path}:1: found 'no'")
    assert "No usable row is left of 2" in message


@pytest.mark.parametrize(("bad", "good", "accepted"), [(1, 998, False), (1, 999, True), (2, 1997, False)])
def test_without_a_policy_at_most_one_row_in_a_thousand_may_be_bad(tmp_path, caplog, bad, good, accepted):
    path = write(tmp_path / "a.jsonl", GOOD + "no\n" * bad + GOOD * (good - 1))
    if accepted:
        assert len(list(read_rows([path]))) == good
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"skipped {bad} of 1,000 rows: {path}:2: found 'no'")
    else:
        message = refusal(lambda: list(read_rows([path])))
        assert message.startswith(f"{path}:2: found 'no'")
        assert f"{bad} of {bad + good:,} rows are bad" in message


def test_the_first_bad_row_is_told_in_full_and_the_next_by_their_places(tmp_path):
    paths = [write(tmp_path / "a.jsonl", GOOD + "no\n" * 2), write(tmp_path / "b.jsonl", "no\n" * 6)]
    message = refusal(lambda: list(read_rows(paths)))
    a, b = paths
    assert message.startswith(f"{a}:2: found 'no', which is not JSON")
    assert f"(and 7 more: {a}:3, {b}:1, {b}:2, {b}:3, ...)\n8 of 9 rows are bad" in message


def test_skipping_keeps_the_good_rows_and_says_so_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "no\n" + GOOD + "nor\n" + GOOD)
    assert [where for where, _ in rows_of(path, on_bad_rows="skip")] == ["2", "4"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["skipped 2 of 4 rows"]


def test_a_reader_that_stops_early_still_says_what_was_skipped(tmp_path, caplog):
    rows = read_rows([write(tmp_path / "a.jsonl", "no\n" + GOOD * 3)])
    next(rows)
    rows.close()
    assert "skipped 1 of 2 rows" in caplog.text


def test_rows_that_the_caller_refuses_are_bad_rows_too(tmp_path):
    def convert(data):
        raise BadRowError("found a colour, expected a number")

    path = write(tmp_path / "a.jsonl", GOOD)
    message = refusal(lambda: list(read_rows([path], "error", convert)))
    assert message.startswith(f"{path}:1: found a colour, expected a number")


def test_an_unknown_policy_is_refused():
    assert "found 'ignore', expected error, skip" in refusal(lambda: BadRows("ignore"))


def test_documents_are_the_text_or_else_the_content(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"text": "t", "content": "c"}\n{"content": "c"}\n{"text": null, "content": "d"}'
    )
    assert list(read_documents([path])) == ["t", "c", "d"]


@pytest.mark.parametrize(
    ("row", "found", "expected"),
    [
        ('{"body": "x", "id": 1}', 'found keys ["body", "id"]', "expected 'text': a string"),
        ('{"text": ["x"]}', "found 'text': [\"x\"]", "expected a string"),
        ('{"text": null}', "found 'text': null", "expected a string"),
        ('{"content": " \\n"}', "found 'content' without text", "not empty"),
    ],
)
def test_a_row_without_a_document_is_named_with_its_line_number(tmp_path, row, found, expected):
    path = write(tmp_path / "a.jsonl", GOOD + row)
    message = refusal(lambda: list(read_documents([path], "error")))
    assert message.startswith(f"{path}:2: {found}")
    assert expected in message


def test_a_large_file_is_hashed_again_only_if_its_size_or_time_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 0)
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one")
    os.utime(path, ns=(10, 10))
    first = files.content_hash([path])
    path.write_bytes(b"two")
    os.utime(path, ns=(10, 10))
    assert files.content_hash([path]) == first  # the price of not reading it
    os.utime(path, ns=(10, 20))
    second = files.content_hash([path])
    assert second != first
    path.write_bytes(b"longer")
    os.utime(path, ns=(10, 20))
    assert files.content_hash([path]) not in (first, second)
