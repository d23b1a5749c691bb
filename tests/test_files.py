import gzip
import json
import logging
import os
import shutil
import socket
from pathlib import Path

import datasets
import huggingface_hub
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimind.common.cache import content_hash
from minimind.common.errors import BadRowError, UserError
from minimind.data import formats, json_files, lines, tables
from minimind.data.bad_rows import BadRows
from minimind.data.files import read_documents, read_rows
from minimind.data.sources import expand, total_size

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


TWO = [{"text": "一"}, {"text": "two"}]
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


def test_a_dataset_saved_to_disk_gives_its_rows_and_not_what_else_lies_there(tmp_path):
    datasets.Dataset.from_list(TWO).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by map")
    assert list(read_documents([str(tmp_path / "saved")])) == ["一", "two"]


def test_a_saved_dataset_of_several_splits_is_refused_with_their_names(tmp_path):
    split = datasets.Dataset.from_list(TWO)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "saved")
    message = refusal(lambda: expand([str(tmp_path / "saved")]))
    assert all(str(tmp_path / "saved" / name) in message for name in ("train", "test"))
    assert list(read_documents([str(tmp_path / "saved" / "train")])) == ["一", "two"]


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


def test_an_unknown_text_unit_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    assert "found 'word', expected file, paragraph, line" in refusal(
        lambda: read_rows([path], text_unit="word")
    )


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


def test_the_memory_of_reading_does_not_grow_with_the_files(tmp_path):
    def make(directory, rows):
        data = [{"text": f"{i} " + "the fox runs home " * 200} for i in range(rows)]
        table, lines = pa.Table.from_pylist(data), "".join(json.dumps(row) + "\n" for row in data)
        for name, content in [
            ("a.jsonl", lines.encode()),
            ("a.jsonl.gz", gzip.compress(lines.encode(), 1, mtime=0)),
            ("a.jsonl.zst", zstd(lines.encode())),
            ("a.json", json.dumps(data).encode()),
            ("a.csv", b"text\n" + "\n".join(row["text"] for row in data).encode()),
            ("a.txt", "\n".join(row["text"] for row in data).encode()),
        ]:
            write(directory / name, content)
        pq.write_table(table, directory / "a.parquet", compression="none", use_dictionary=False)
        with (
            pa.OSFile(str(directory / "a.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=500)
        return str(directory)

    def growth(directory):
        process = psutil.Process()
        before, sizes, rows = process.memory_info().rss, [], 0
        for rows, _ in enumerate(read_documents([directory], text_unit="line"), 1):
            if rows % 50 == 0:
                sizes.append(process.memory_info().rss)
        return max(sizes) - before, rows

    small, large = make(tmp_path / "small", 1_000), make(tmp_path / "large", 10_000)
    growth(small)  # fills buffers that are kept
    grown, rows = growth(large)
    assert rows == 8 * 10_000
    assert grown < 18e6 < (tmp_path / "large" / "a.json").stat().st_size / 2


def test_progress_adds_up_to_the_size_of_the_files_as_they_lie_on_the_disk(tmp_path, monkeypatch):
    set_limit(monkeypatch, "BUFFER", 4096)
    lines = "".join(
        json.dumps({"text": f"{i * 7919 % 10007} fox"}) + "\n" for i in range(40_000)
    ).encode()
    write(tmp_path / "a.jsonl", lines)
    write(tmp_path / "b.jsonl.gz", gzip.compress(lines, mtime=0))
    write(tmp_path / "c.jsonl.zst", zstd(lines))
    table = pa.Table.from_pylist([json.loads(line) for line in lines.splitlines()])
    pq.write_table(table, tmp_path / "d.parquet")
    with (
        pa.OSFile(str(tmp_path / "e.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=1000)
    with (
        pa.OSFile(str(tmp_path / "f.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=1000)
    for path in sorted(tmp_path.glob("?.*")):
        steps, done, at = [], [], []
        for row, _ in enumerate(read_rows([str(path)], progress=steps.append), 1):
            if row in (10_000, 30_000):
                done.append(sum(steps) / path.stat().st_size)
                at.append(row / 40_000)
        assert sum(steps) == path.stat().st_size
        assert all(step > 0 for step in steps)
        # What is read ahead
        slack = 0.05 + (2**16 / path.stat().st_size if path.suffix in (".gz", ".zst") else 0)
        assert all(
            abs(share - expected) <= slack for share, expected in zip(done, at, strict=True)
        ), path
    everything = expand([str(tmp_path)])
    steps = []
    assert sum(1 for _ in read_rows([str(tmp_path)], progress=steps.append)) == 6 * 40_000
    assert sum(steps) == total_size(everything) == sum(path.stat().st_size for path in everything)


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


def test_files_directories_and_globs_mix_and_give_each_file_once(tmp_path):
    names = ["b.jsonl", "a.jsonl", "deep/er/c.csv", "README.md", ".hidden/d.jsonl", "deep/.e.jsonl"]
    for name in names:
        write(tmp_path / name, GOOD)
    given = [
        str(tmp_path / "b.jsonl"),
        str(tmp_path / "*.jsonl"),
        str(tmp_path),
        str(tmp_path / "**" / "*.csv"),
    ]
    assert [str(path.relative_to(tmp_path)) for path in expand(given)] == [
        "b.jsonl",
        "a.jsonl",
        "deep/er/c.csv",
    ]


def test_links_are_followed_and_give_each_file_once_even_where_they_go_round(tmp_path):
    write(tmp_path / "store" / "a.jsonl", GOOD)
    write(tmp_path / "store" / "deep" / "b.jsonl", GOOD)
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "store")
    (data / "linked-again").symlink_to(tmp_path / "store")
    (data / "c.jsonl").symlink_to(tmp_path / "store" / "a.jsonl")
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    (tmp_path / "store" / "self").symlink_to(tmp_path / "store")
    for given in ([str(data)], [str(data), str(tmp_path)], [f"{tmp_path}/**"], [f"{data}/*"]):
        assert {file.resolve().name for file in expand(given)} == {"a.jsonl", "b.jsonl"}
        assert len(expand(given)) == 2


def test_a_glob_gives_directories_as_a_shell_would_and_hidden_names_only_where_it_spells_them(
    tmp_path,
):
    for name in ["one/a.jsonl", ".hidden/b.jsonl", "two.jsonl/c.csv", "two.jsonl/.d.csv"]:
        write(tmp_path / name, GOOD)
    expected = {
        "*": ["a.jsonl", "c.csv"],
        "*.jsonl": ["c.csv"],
        ".hid*/*": ["b.jsonl"],
        ".hidden/*": ["b.jsonl"],
    }
    assert {
        pattern: [f.name for f in expand([f"{tmp_path}/{pattern}"])] for pattern in expected
    } == expected


def test_what_cannot_be_looked_into_is_refused_and_not_left_out(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", GOOD)
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def no_permission(path):  # modes do not bind every user who runs tests
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", no_permission)
    message = refusal(lambda: expand([str(tmp_path)]))
    assert message.startswith(f"{tmp_path}: cannot be looked up")
    assert "Permission denied" in message
    assert str(closed) in message


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)

    def no_permission(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", no_permission)
    assert refusal(lambda: list(read_rows([path]))).startswith(
        f"{path}: cannot be read ([Errno 13] Permission denied"
    )


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


@pytest.mark.parametrize(
    ("bad", "good", "accepted"), [(1, 998, False), (1, 999, True), (2, 1997, False)]
)
def test_without_a_policy_at_most_one_row_in_a_thousand_may_be_bad(
    tmp_path, caplog, bad, good, accepted
):
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
    paths = [
        write(tmp_path / "a.jsonl", GOOD + "no\n" * 2),
        write(tmp_path / "b.jsonl", "no\n" * 6),
    ]
    message = refusal(lambda: list(read_rows(paths)))
    a, b = paths
    assert message.startswith(f"{a}:2: found 'no', which is not JSON")
    assert f"(and 7 more: {a}:3, {b}:1, {b}:2, {b}:3, ...)\n8 of 9 rows are bad" in message


def test_skipping_keeps_the_good_rows_and_says_so_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "no\n" + GOOD + "nor\n" + GOOD)
    assert [where for where, _ in rows_of(path, on_bad_rows="skip")] == ["2", "4"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "skipped 2 of 4 rows"
    ]


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
        tmp_path / "a.jsonl",
        '{"text": "t", "content": "c"}\n{"content": "c"}\n{"text": null, "content": "d"}',
    )
    assert list(read_documents([path])) == ["t", "c", "d"]


@pytest.mark.parametrize(
    ("row", "found", "expected"),
    [
        ('{"body": "x", "id": 1}', 'found keys ["body", "id"]', "expected 'text': a string"),
        ('{"text": ["x"]}', "found 'text': [\"x\"]", "expected a string"),
        ('{"text": null}', "found 'text': null", "expected 'text': a string"),
        ('{"content": " \\n"}', "found 'content' without text", "not empty"),
    ],
)
def test_a_row_without_a_document_is_named_with_its_line_number(tmp_path, row, found, expected):
    path = write(tmp_path / "a.jsonl", GOOD + row)
    message = refusal(lambda: list(read_documents([path], "error")))
    assert message.startswith(f"{path}:2: {found}")
    assert expected in message


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """owner/name with the config "zh" and the splits train and test, as `datasets` keeps it after a
    download."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    splits = {
        name: write(tmp_path / f"{name}.jsonl", f'{{"text": "{name}"}}\n' + GOOD)
        for name in ("train", "test")
    }
    builder = datasets.load_dataset_builder(
        "json", "zh", data_files=splits, cache_dir=str(tmp_path / "built")
    )
    builder.download_and_prepare()
    cached = tmp_path / "hub" / "owner___name" / "zh" / "0.0.0" / "0123abcd"
    shutil.copytree(builder.cache_dir, cached)
    for path in cached.glob("json-*"):
        path.rename(cached / path.name.replace("json-", "name-"))
    facts = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(
        json.dumps(facts | {"config_name": "zh", "dataset_name": "name"})
    )


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ("", "train"),
        (":zh", "train"),
        (":zh:test", "test"),
        ("::test", "test"),
        ("@0123abcd", "train"),
    ],
)
def test_a_dataset_of_the_hub_gives_the_rows_of_one_split(cached_dataset, given, split):
    spelling = f"hf://datasets/owner/name{given}"
    found = list(read_rows([spelling], "skip", progress=pytest.fail))
    assert found == [
        (f"{spelling}:row 1", {"text": split}),
        (f"{spelling}:row 2", {"text": "good"}),
    ]
    (file,) = expand([spelling])
    assert str(file) == spelling
    assert total_size([file]) == 0
    assert list(read_rows([file])) == found


def test_the_hash_of_a_dataset_of_the_hub_follows_its_split_and_revision(cached_dataset, tmp_path):
    def hash_of(given):
        return content_hash(expand([f"hf://datasets/owner/name{given}"]))

    first = hash_of("")
    assert first == hash_of(":zh:train") != hash_of(":zh:test")
    (cached,) = (tmp_path / "hub" / "owner___name" / "zh" / "0.0.0").iterdir()
    cached.rename(cached.with_name("4567ef"))
    assert hash_of("") != first


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "hf://datasets/owner/other",
            [
                *(
                    "Couldn't reach 'owner/other'",
                    "HF_HUB_OFFLINE is set",
                    "HF_ENDPOINT=https://hf-mirror.com",
                ),
                *("https://huggingface.co/datasets/owner/other", "modelscope download --dataset"),
            ],
        ),
        (
            "hf://datasets/owner/name:en",
            ["ValueError", "'en'", "'zh'", "Check the name, config and split"],
        ),
        ("hf://datasets/owner/name:zh:dev", ["Bad split: dev", "['train', 'test']"]),
        ("hf://datasets/owner/name@v2", ["only revision 0123abcd is in the cache"]),
        ("hf://datasets/json", ["not the name of a dataset"]),
        (
            "hf://datasets/owner/name/train.jsonl",
            ["not the name of a dataset", "expected hf://datasets/OWNER/NAME"],
        ),
        ("hf://datasets/", ["not the name of a dataset"]),
        ("owner/name", ["does not exist", "or hf://datasets/OWNER/NAME"]),
    ],
)
def test_a_dataset_out_of_reach_is_one_clear_message(cached_dataset, given, words):
    message = refusal(lambda: list(read_rows([given])))
    assert message.startswith(f"{given}: ")
    assert all(word in message for word in words), message


@pytest.fixture
def dead_hub(monkeypatch):
    """The address of a Hub that refuses connections; waiting for it fails."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for config, name in (
            (datasets.config, "HF_ENDPOINT"),
            (huggingface_hub.constants, "ENDPOINT"),
        ):
            monkeypatch.setattr(config, name, address)
        for config in (datasets.config, huggingface_hub.constants):
            monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
        yield address


def test_a_hub_out_of_reach_is_asked_once_and_the_message_names_the_ways_round_it(
    dead_hub, cached_dataset
):
    message = refusal(lambda: expand(["hf://datasets/owner/other"]))
    assert f"{dead_hub} does not answer" in message
    assert "HF_HUB_OFFLINE" not in message
    assert "HF_ENDPOINT=https://hf-mirror.com" in message


def test_a_dataset_in_the_cache_is_read_without_waiting_for_a_hub_out_of_reach(
    dead_hub, cached_dataset
):
    rows = [
        row
        for _, row in read_rows(["hf://datasets/owner/name::test"], "skip", progress=pytest.fail)
    ]
    assert rows == [{"text": "test"}, {"text": "good"}]
    assert not datasets.config.HF_HUB_OFFLINE
