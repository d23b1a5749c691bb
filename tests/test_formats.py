import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import GOOD, TWO, refusal, rows_of, set_limit, write

from minimind.data.files import read_documents, read_rows

LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)
SKIPPABLE_FRAME = bytes.fromhex("502a4d18 04000000 00000000")  # RFC 8878, section 3.1.2


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", LINES, ["1", "2"]),
        ("a.jsonl", "\n" + LINES.replace("\n", "\r\n\r\n"), ["2", "4"]),
        ("a.JSONL", b"\xef\xbb\xbf" + LINES.encode(), ["1", "2"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), ["1", "2"]),
        ("a.ndjson", LINES, ["1", "2"]),
        (
            "a.JSONL.GZ",
            gzip.compress(LINES[:14].encode(), mtime=0)
            + gzip.compress(LINES[14:].encode(), mtime=0),
            ["1", "2"],
        ),
        ("a.jsonl.zst", zstd(LINES.encode()), ["1", "2"]),
        (
            "a.jsonl.zst",
            zstd(LINES[:14].encode()) + SKIPPABLE_FRAME + zstd(LINES[14:].encode()),
            ["1", "2"],
        ),
        ("a.json.zst", zstd(json.dumps(TWO, indent=2).encode()), ["2", "5"]),
        ("a.csv.zst", zstd("text\n一\ntwo\n".encode()), ["2", "3"]),
        ("a.json", LINES, ["1", "2"]),
        ("a.json", json.dumps(TWO), ["1", "1"]),
        (
            "a.json",
            b"\xef\xbb\xbf" + json.dumps(TWO, indent=2, ensure_ascii=False).encode(),
            ["2", "5"],
        ),
        ("a.csv", "text\n一\n\ntwo\n", ["2", "4"]),
        ("a.csv", b"\xef\xbb\xbf" + "text\r\n一\r\ntwo".encode(), ["2", "3"]),
        ("a.tsv.gz", gzip.compress("text\n一\ntwo\n".encode(), mtime=0), ["2", "3"]),
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


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_gives_its_rows_with_their_row_numbers_across_batches(tmp_path, make):
    path = tmp_path / "a.arrow"
    data = [{"text": str(i), "messages": [{"role": "user"}]} for i in range(2500)]
    table = pa.Table.from_pylist(data)
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    assert rows_of(str(path)) == [(f"row {i + 1}", row) for i, row in enumerate(data)]


def test_a_dataset_saved_to_disk_yields_its_rows_and_not_other_files_beside_it(tmp_path):
    datasets.Dataset.from_list(TWO).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by map")
    assert list(read_documents([str(tmp_path / "saved")])) == ["一", "two"]


TEXT = b"\xef\xbb\xbfone\r\n still one\r\n\r\n \r\n\r\ntwo\n\n"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", [("1", "one\n still one\n\n \n\ntwo\n\n")]),
        ("paragraph", [("1", "one\n still one"), ("6", "two")]),
        ("line", [("1", "one"), ("2", " still one"), ("6", "two")]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_txt_file_is_one_document_or_its_paragraphs_or_its_lines(tmp_path, name, unit, expected):
    path = write(tmp_path / name, gzip.compress(TEXT, mtime=0) if name.endswith(".gz") else TEXT)
    assert rows_of(path, text_unit=unit) == [(place, {"text": text}) for place, text in expected]


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_row_beyond_the_limit_is_refused_and_the_others_are_read(tmp_path, monkeypatch, unit):
    set_limit(monkeypatch, "ROW_LIMIT", 40)
    set_limit(monkeypatch, "BUFFER", 16)
    path = write(tmp_path / "a.txt", "one\n\n" + "x" * 100 + "\n\n" + "y\n" * 19 + "\nthree")
    if unit == "file":
        assert "--text_unit paragraph" in refusal(lambda: list(read_rows([path], "skip")))
    else:
        kept = list(read_documents([path], "skip", text_unit=unit))
        assert kept == [
            "one",
            *(["\n".join("y" * 19)] if unit == "paragraph" else "y" * 19),
            "three",
        ]
        message = refusal(lambda: list(read_rows([path], "error", text_unit=unit)))
        assert message.startswith(
            f"{path}:3: found a row of more than 40 bytes, expected shorter rows"
        )


def test_a_csv_row_over_several_lines_has_the_number_of_its_first_line(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path / "a.csv", f'text,n\n"one\ntwo",1\n{long},2\n')
    assert rows_of(path) == [("2", {"text": "one\ntwo", "n": "1"}), ("4", {"text": long, "n": "2"})]


@pytest.mark.parametrize(
    ("name", "content", "where", "words"),
    [
        (
            "a.jsonl",
            GOOD + "\n{'text': 1}\n",
            3,
            ["{'text': 1}", "not JSON", "column 2", "one JSON object per line"],
        ),
        ("a.jsonl", GOOD + '{"text": "cut', 2, ["cut", "Unterminated string", "expected"]),
        ("a.jsonl", GOOD + "[1, 2]\n", 2, ["found [1, 2]", "expected a JSON object"]),
        (
            "a.jsonl",
            GOOD.encode() + '{"text": "中"}'.encode("gb18030"),
            2,
            ["0xd6", "offset 10", "UTF-8", "iconv"],
        ),
        ("a.jsonl", GOOD + '{"text": "\\ud83d"}', 2, ["surrogate", "expected complete characters"]),
        ("a.jsonl", GOOD + "[" * 100_000, 2, ["not JSON", "expected"]),
        ("a.jsonl", GOOD + "1" * 5_000, 2, ["found the number", "expected one within"]),
        ("a.json", "{\n" + GOOD, 1, ["not JSON", "one list of objects"]),
        (
            "a.json",
            '[\n{"text": "good"},\n\n"plain"]',
            4,
            ['found "plain"', "expected a JSON object"],
        ),
        ("a.csv", "text,n\ngood,1\nbad\n", 3, ["found 1 fields", "expected 2: text, n"]),
        ("a.csv", b"text\ngood\n\xff\n", 3, ["0xff", "expected UTF-8"]),
        ("a.txt", "中".encode("gb18030"), 1, ["0xd6", "expected UTF-8"]),
    ],
)
def test_a_row_that_cannot_be_parsed_is_named_with_its_line_number(
    tmp_path, name, content, where, words
):
    path = write(tmp_path / name, content)
    message = refusal(lambda: list(read_rows([path], "error")))
    assert message.startswith(f"{path}:{where}: found ")
    assert all(word in message for word in [*words, "--on_bad_rows skip"])


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
        (
            "a.jsonl.gz",
            gzip.compress(GOOD.encode(), mtime=0)[:-9],
            ["cannot be read", "Check the file"],
        ),
    ],
)
def test_a_file_whose_structure_is_lost_is_refused_even_when_bad_rows_are_skipped(
    tmp_path, name, content, words
):
    path = write(tmp_path / name, content)
    message = refusal(lambda: list(read_rows([path], "skip")))
    assert path in message
    assert all(word in message for word in words)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)

    def no_permission(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", no_permission)
    assert refusal(lambda: list(read_rows([path]))).startswith(
        f"{path}: cannot be read ([Errno 13] Permission denied"
    )
