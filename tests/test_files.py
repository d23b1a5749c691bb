import gzip
import json

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import GOOD, refusal, set_limit, write
from test_formats import zstd

from minimind.data.files import read_documents, read_rows
from minimind.data.sources import expand, total_size


def test_an_unknown_text_unit_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    assert "found 'word', expected file, paragraph, line" in refusal(
        lambda: read_rows([path], text_unit="word")
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


@pytest.mark.parametrize("content", ["\n\n", "[]"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    assert refusal(lambda: list(read_rows([path]))).startswith(f"{path}: found no rows, expected")


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
