"""Data files and rows as they go wrong in the field, each with what has to come of it.

A case that is expected to "skip" holds rows that are usable and `skipped` rows that are not: with
on_bad_rows=skip exactly `kept` rows come out, and with on_bad_rows=error the first bad one is
refused by a message that matches `pattern`. A case that is expected to be an "error" is refused
whatever the policy, with such a message.
"""

import contextlib
import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

LONG_LINE = 50 * 2**20  # bytes


class Case(NamedTuple):
    """`kind`: document, conversation or preference. `pattern`: a regular expression, of the message
    from its start."""

    name: str
    paths: list[str]
    kind: str
    expected: str
    pattern: str
    skipped: int = 0
    kept: int = 0


def document(text: str = "the fox runs home") -> dict:
    return {"text": text}


def conversation(*contents, **more) -> dict:
    contents = contents or ("who runs?", "the fox")
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
        ]
    } | more


def preference(**more) -> dict:
    return {"prompt": "who runs?", "chosen": "the fox", "rejected": "the stone"} | more


GOOD = {"document": document(), "conversation": conversation(), "preference": preference()}


def dumped(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_bytes(value) -> bytes:
    return value if isinstance(value, bytes) else dumped(value).encode()


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position:][1:]


# One bad line of jsonl between two good ones: name, kind, the line, words of the message behind
# "file:2: ".
BAD_LINES = [
    (
        "truncated object",
        "document",
        '{"text": "cut he',
        r"found '.*cut he', which is not JSON \(Unterminated string",
    ),
    ("truncated escape", "document", '{"text": "cut \\u4e', r"found .*which is not JSON \(Invalid"),
    (
        "two objects on a line",
        "document",
        '{"text": "a"}{"text": "b"}',
        r"found .*not JSON \(Extra data",
    ),
    ("single quotes", "document", "{'text': 'a'}", r"found .*not JSON \(Expecting property name"),
    ("trailing comma", "document", '{"text": "a",}', r"found .*not JSON \("),
    ("a comment", "document", '// {"text": "a"}', r"found .*not JSON \(Expecting value"),
    ("an opened list", "document", "[", r"found '\[', which is not JSON .*may also be one list"),
    ("a bare string", "document", '"text"', r'found "text", expected a JSON object'),
    ("a bare number", "document", "17", r"found 17, expected a JSON object"),
    ("a bare null", "document", "null", r"found null, expected a JSON object"),
    (
        "a list of objects",
        "document",
        '[{"text": "a"}]',
        r'found \[{"text": "a"}\], expected a JSON object',
    ),
    (
        "a csv line",
        "document",
        "1,the fox,home",
        r"found '1,the fox,home', which is not JSON \(Extra data",
    ),
    (
        "control character",
        "document",
        b'{"text": "a\x01b"}',
        r"found .*not JSON \(Invalid control character",
    ),
    ("raw NUL", "document", b'{"text": "a\x00b"}', r"found .*not JSON \(Invalid control character"),
    (
        "escaped NUL",
        "document",
        r'{"text": "a\u0000b"}',
        r"text: found a NUL character at offset 1, expected text",
    ),
    ("NULs of a lost write", "document", b"\x00" * 64, r"found .*not JSON \(Expecting value"),
    (
        "gb18030",
        "document",
        '{"text": "狐狸"}'.encode("gb18030"),
        r"found byte 0xba at .*expected UTF-8.*iconv",
    ),
    (
        "latin-1",
        "document",
        '{"text": "café au lait"}'.encode("latin-1"),
        r"found byte 0xe9 at byte offset 13, exp",
    ),
    (
        "truncated character",
        "document",
        '{"text": "狐狸"}'.encode()[:-3] + b'"}',
        r"found byte 0xe7 at byte offset 13",
    ),
    (
        "UTF-8 of a surrogate",
        "document",
        b'{"text": "\xed\xa0\xbd"}',
        r"found byte 0xed at .*expected UTF-8",
    ),
    (
        "escape of a high surrogate",
        "document",
        r'{"text": "\ud83d"}',
        r"found half of a surrogate pair",
    ),
    (
        "escape of a low surrogate",
        "document",
        r'{"text": "x", "id": "\udc00 \ud83d\ude00"}',
        "found half of a surr",
    ),
    (
        "a key twice",
        "document",
        '{"text": "a", "id": 1, "text": "b"}',
        r'found the key "text" twice in one object',
    ),
    (
        "a key twice, spaced",
        "document",
        '{"text" : "a", "text"  : "b"}',
        r'found the key "text" twice',
    ),
    (
        "a key twice, within",
        "document",
        '{"text": "a", "meta": {"k": 1, "k": 1}}',
        r'found the key "k" twice',
    ),
    (
        "NaN",
        "document",
        '{"text": "a", "score": NaN}',
        r"found NaN, which is not JSON, expected a number or null",
    ),
    (
        "Infinity",
        "document",
        '{"text": "a", "score": -Infinity}',
        r"found -Infinity, which is not JSON",
    ),
    (
        "number beyond floats",
        "document",
        '{"text": "a", "score": 1e999}',
        r"found the number 1e999.*expected one wit",
    ),
    (
        "number of 5,000 digits",
        "document",
        '{"text": "a", "n": ' + "7" * 5000 + "}",
        r"found the number 7777777777",
    ),
    ("nested 100,000 deep", "document", '{"text": ' + "[" * 100_000, r"found .*not JSON \("),
    (
        "nested 500 deep",
        "document",
        '{"text": ' + "[" * 500 + "]" * 500 + "}",
        r"found lists and objects nested more",
    ),
    ("number as text", "document", {"text": 17}, r"found 'text': 17, expected a string"),
    ("true as text", "document", {"text": True}, r"found 'text': true, expected a string"),
    ("null as text", "document", {"text": None}, r"found 'text': null, expected 'text': a string"),
    (
        "list as text",
        "document",
        {"text": ["a", "b"]},
        r"found 'text': \[\"a\", \"b\"\], expected a string",
    ),
    (
        "object as text",
        "document",
        {"text": {"zh": "狐狸"}},
        r"found 'text': {\"zh\": \"狐狸\"}, expected a string",
    ),
    (
        "empty text",
        "document",
        {"text": ""},
        r"found 'text' without text, expected a string that is not empty",
    ),
    ("blank text", "document", {"text": " \n\t\u3000"}, r"found 'text' without text"),
    (
        "no text at all",
        "document",
        {"id": 1, "url": "x"},
        r'found keys \["id", "url"\], expected \'text\'',
    ),
    ("empty object", "document", {}, r"found keys \[\], expected 'text'"),
    (
        "a conversation among documents",
        "document",
        conversation(),
        r'found keys \["messages"\], expected \'text\'',
    ),
    (
        "a document among conversations",
        "conversation",
        document(),
        r'found keys \["text"\], expected',
    ),
    ("messages null", "conversation", {"messages": None}, r"found keys \[\], expected"),
    (
        "messages empty",
        "conversation",
        {"messages": []},
        r"messages: found \[\], expected a list of messages",
    ),
    ("messages as JSON text", "conversation", {"messages": "[{]"}, r"messages: found "),
    (
        "a message null",
        "conversation",
        {"messages": [None]},
        r"messages\[0\]: found null, expected an object",
    ),
    (
        "a role null",
        "conversation",
        {"messages": [{"role": None, "content": "a"}]},
        r"messages\[0\]: found .*'role'",
    ),
    (
        "a role as number",
        "conversation",
        {"messages": [{"role": 1, "content": "a"}]},
        r"messages\[0\]: found role 1",
    ),
    (
        "an unknown role",
        "conversation",
        {"messages": [{"role": "fox", "content": "a"}]},
        r"messages\[0\]: .*\"fox\"",
    ),
    (
        "content null",
        "conversation",
        conversation("a", None),
        r"messages\[1\]: found the content null",
    ),
    (
        "content as number",
        "conversation",
        conversation(5, "a"),
        r"messages\[0\]: found the content 5, expected",
    ),
    (
        "an empty reply",
        "conversation",
        conversation("a", " "),
        r"messages\[1\]: found an empty reply",
    ),
    ("no reply", "conversation", conversation("a"), r"messages\[0\]: found the role 'user' last"),
    (
        "a reply first",
        "conversation",
        {"messages": conversation()["messages"][::-1]},
        r"messages\[0\]: found the role",
    ),
    (
        "NUL in a message",
        "conversation",
        conversation("a", "b\x00"),
        r"messages\[1\].*found a NUL character",
    ),
    (
        "a document among pairs",
        "preference",
        document(),
        r'found keys \["text"\], expected \'chosen\' and',
    ),
    (
        "chosen null",
        "preference",
        preference(chosen=None),
        r"found keys .*expected 'chosen' and 'rejected'",
    ),
    ("chosen as number", "preference", preference(chosen=5), r"chosen: found 5, expected"),
    (
        "chosen equal to rejected",
        "preference",
        preference(rejected="the fox"),
        r"found chosen equal to rejected",
    ),
    ("chosen empty", "preference", preference(chosen=""), r".*found an empty reply"),
    (
        "prompt missing",
        "preference",
        {"chosen": "a", "rejected": "b"},
        r"found keys .*expected one of prompt",
    ),
    ("prompt null", "preference", preference(prompt=None), r"found keys .*expected one of prompt"),
]

# A whole file with bad rows: name, file name, content, words behind the path, rows skipped, rows
# kept.
BAD_ROWS = [
    ("BOM in front of every part of joined files", "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": 1}\n'
     b'\xef\xbb\xbf{"text": "b"}\n', r":2: found 'text': 1", 1, 2),
    ("no line end at the last row", "a.jsonl", '{"text": "a"}\n{"text": "b"', r":2: found .*not JSON", 1, 1),
    ("carriage returns alone", "a.jsonl", '{"text": "a"}\r{"text": "b"}\n{"text": "c"}', r":1: .*Extra data", 1, 1),
    ("a list with other values", "a.json", '[{"text": "a"},\n3, null,\n{"text": ""}]', r":2: found 3, expected", 3, 1),
    ("a list with a key twice", "a.json", '[\n{"text": "a"},\n{"text": "b", "text": "c"}]', r":3: found the", 1, 1),
    ("a list with NaN", "a.json", '[{"text": "a"},\n{"text": "b", "n": NaN}]', r":2: found NaN, which", 1, 1),
    ("a list with half a character", "a.json", '[{"text": "a"}, {"text": "\\ud800"}]', r":1: found half of", 1, 1),
    ("csv with too few fields", "a.csv", "text,n\na,1\nb\nc,3\n", r":3: found 1 fields, expected 2: text, n", 1, 2),
    ("csv with an unquoted comma", "a.csv", "text,n\na, b,1\nc,3\n", r":2: found 3 fields, expected 2", 1, 1),
    ("csv with empty fields", "a.csv", "text,n\n,1\nc,3\n", r":2: found 'text' without text", 1, 1),
    ("csv with latin-1", "a.csv", "text\ncafé\na\n".encode("latin-1"), r":2: found byte 0xe9 at byte offset 3", 1, 1),
    ("csv with NUL", "a.csv", b"text,n\na\x00b,1\nc,3\n", r":2: text: found a NUL character at offset 1", 1, 1),
    ("csv without the text column", "a.csv", "body,n\na,1\n", r':2: found keys \["body", "n"\], expected', 1, 0),
    ("tsv with too many fields", "a.tsv", "text\tn\na\t1\t\nb\t2\n", r":2: found 3 fields, expected 2", 1, 1),
    ("txt of another encoding", "a.txt", "狐狸".encode("gb18030"), r":1: found byte 0xba at byte offset 0", 1, 0),
    ("txt that is binary", "a.txt", b"MZ\x90\x00\x03\x00\x00\x00", r":1: found byte 0x90 at byte offset 2", 1, 0),
    ("txt with NUL", "a.txt", b"the fox\x00runs", r":1: text: found a NUL character at offset 7", 1, 0),
    ("blank txt", "a.txt", b" \n\n", r":1: found 'text' without text", 1, 0),
    ("bad row within gzip", "a.jsonl.gz", packed(b'{"text": "a"}\n{"text"\n'), r":2: found .*not JSON", 1, 1),
]  # fmt: skip

# A file that is refused whatever the policy: name, file name, content, words behind the path.
LINES = b'{"text": "the fox runs home"}\n' * 2000
NOISE = b"".join(
    json.dumps(document(f"{i * 7919 % 104729:x} fox")).encode() + b"\n" for i in range(2000)
)


BROKEN_FILES = [
    ("UTF-16 with a mark", "a.jsonl", LINES.decode().encode("utf-16"), r":1: found UTF-16 text .*iconv -f UTF-16"),
    ("UTF-16 without a mark", "a.jsonl", LINES.decode().encode("utf-16-le"), r":1: found UTF-16 text"),
    ("UTF-16 big-endian csv", "a.csv", "text\na\n".encode("utf-16-be"), r":1: found UTF-16 text"),
    ("UTF-32 txt", "a.txt", "狐狸".encode("utf-32"), r":1: found UTF-32 text .*iconv -f UTF-32"),
    ("no bytes", "a.jsonl", b"", r": found an empty file, expected rows"),
    ("blank lines", "a.jsonl", b"\n \n\n", r": found no rows, expected at least one"),
    ("a BOM and nothing else", "a.jsonl", b"\xef\xbb\xbf", r": found no rows, expected at least one"),
    ("an empty list", "a.json", b"[ ]\n", r": found no rows, expected at least one"),
    ("a csv of a header", "a.csv", b"text,n\n", r": found no rows, expected at least one"),
    ("a csv header twice", "a.csv", b"text,text\na,b\n", r":1: found the header .*each column name once"),
    ("a csv header not UTF-8", "a.csv", b"te\xe9t\na\n", r":1: found byte 0xe9 at byte offset 2"),
    ("a csv with tabs", "a.csv", b"id\ttext\n1\ta\n", r":1: found the header .*with tabs .*Name the file \.tsv"),
    ("a csv with semicolons", "a.csv", b"id;text\n1;a\n", r":1: found the header 'id;text', with semicolons"),
    ("a tsv with commas", "a.tsv", b"id,text\n1,a\n", r":1: found the header .*with commas .*Name the file \.csv"),
    ("a csv with an open quote", "a.csv", b'text\na\n"b\nc\n', r":3: found a broken row \(unexpected end of data\)"),
    ("a csv with a stray quote", "a.csv", b'text\na\n"b" c\n', r":3: found a broken row .*quotes inside"),
    ("a list without a comma", "a.json", b'[\n{"text": "a"}\n{"text": "b"}]', r":2: not JSON at column 14 \("),
    ("a list cut off", "a.json", b'[{"text": "a"},\n{"text": "b', r":2: not JSON at column 10 \(Unterminated string"),
    ("a list not closed", "a.json", b'[{"text": "a"}', r":1: not JSON at column 15 \("),
    ("a list with a comma too many", "a.json", b'[{"text": "a"},\n]', r":2: not JSON at column 1 \("),
    ("two lists", "a.json", b'[{"text": "a"}]\n[{"text": "b"}]', r":2: not JSON at column 1 \(more text"),
    ("a list not UTF-8", "a.json", b'[{"text": "a"},\n{"text": "\xe9"}]', r":2: found byte 0xe9.*expected UTF-8"),
    ("a list of 100,000 brackets", "a.json", b"[" * 100_000, r":1: .*recursion"),
    ("gzip by name only", "a.jsonl.gz", LINES, r": cannot be read \(.*Check the file, or download it again"),
    ("gzip cut off", "a.jsonl.gz", packed(NOISE)[:-1000], r": cannot be read \(Truncated"),
    ("gzip cut off in its check sum", "a.jsonl.gz", packed(NOISE)[:-4], r": cannot be read \(Truncated"),
    ("gzip with a flipped byte", "a.jsonl.gz", flipped(packed(NOISE), 3000), r": cannot be read \("),
    ("gzip with a wrong check sum", "a.jsonl.gz", flipped(packed(NOISE), -6), r": cannot be read \("),
    ("gzip with more behind it", "a.jsonl.gz", packed(LINES) + LINES, r": cannot be read \("),
    ("zstd by name only", "a.jsonl.zst", LINES, r": cannot be read \("),
    ("zstd cut off", "a.jsonl.zst", pa.compress(NOISE, codec="zstd", asbytes=True)[:-1000], r": cannot be read"),
    ("zstd with a cut second frame", "a.jsonl.zst", pa.compress(LINES, codec="zstd", asbytes=True) * 2
     + pa.compress(NOISE, codec="zstd", asbytes=True)[:9], r": cannot be read \(Truncated"),
    ("parquet by name only", "a.parquet", LINES, r": after row 0 not readable as parquet"),
    ("parquet within gzip", "a.parquet.gz", packed(LINES), r": found \.parquet inside \.gz"),
    ("arrow by name only", "a.arrow", LINES, r": after row 0 not readable as arrow"),
    ("an unknown extension", "a.xlsx", LINES, r": found the extension '\.xlsx', expected \.jsonl"),
    ("an unknown extension within gzip", "a.xml.gz", packed(LINES), r": found the extension"),
]  # fmt: skip


def table(rows: int = 1000) -> pa.Table:
    return pa.table({"text": [f"{i} fox" for i in range(rows)], "n": range(rows)})


def parquet_bytes(**options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(), sink, **options)
    return sink.getvalue().to_pybytes()


def arrow_bytes(batches: int = 10) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=1000 // batches)
    return sink.getvalue().to_pybytes()


def damaged_text_column(valid: list[str], index: int) -> pa.Array:
    """A string column whose row `index` is not UTF-8."""
    raw = [text.encode() for text in valid]
    raw[index] = b"\xff\xfe"
    column = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers())


def _columnar(directory: Path) -> list[Case]:
    cases = []

    def case(name: str, file: str, content: bytes, pattern: str) -> None:
        path = directory / name.replace(" ", "-") / file
        path.parent.mkdir()
        path.write_bytes(content)
        cases.append(Case(name, [str(path)], "document", "error", pattern))

    whole = parquet_bytes()
    case("parquet cut off", "a.parquet", whole[:-20], r".*: after row 0 not readable as parquet")
    pages = parquet_bytes(write_page_checksum=True, compression="none", use_dictionary=False)
    case(
        "parquet with a flipped byte",
        "a.parquet",
        flipped(pages, 200),
        r".*: after row \d+ not readable as parquet",
    )
    case(
        "arrow cut off",
        "a.arrow",
        arrow_bytes()[:-2000],
        r".*: after row [1-9]\d* not readable as arrow",
    )
    empty = pa.BufferOutputStream()
    pq.write_table(table(0), empty)
    case(
        "parquet without rows",
        "a.parquet",
        empty.getvalue().to_pybytes(),
        r".*: found no rows, expected at least one",
    )

    path = directory / "parquet-with-text-not-UTF-8" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": damaged_text_column(["a", "b", "c"], 1)}), path)
    cases.append(
        Case(
            "parquet with text not UTF-8",
            [str(path)],
            "document",
            "skip",
            r".*:row 2: found values that",
            1,
            2,
        )
    )
    path = directory / "parquet-with-nulls" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": ["a", None, ""], "n": [1.0, None, float("nan")]}), path)
    cases.append(
        Case(
            "parquet with nulls",
            [str(path)],
            "document",
            "skip",
            r".*:row 2: found 'text': null",
            2,
            1,
        )
    )
    path = directory / "parquet-with-text-as-numbers" / "a.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": [1, 2]}), path)
    cases.append(
        Case(
            "parquet with text as numbers",
            [str(path)],
            "document",
            "skip",
            r".*:row 1: found 'text': 1",
            2,
        )
    )
    return cases


def _in_directories(directory: Path) -> list[Case]:
    """Things that are found rather than given; each is a directory with one good file beside what
    is wrong."""
    cases = []

    def case(name: str, make: Callable[[Path], object], pattern: str) -> None:
        folder = directory / name.replace(" ", "-")
        folder.mkdir()
        (folder / "good.jsonl").write_bytes(LINES)
        make(folder)
        cases.append(Case(name, [str(folder)], "document", "error", pattern))

    def listen(folder: Path) -> None:
        # A path of a socket has to be short, so it is bound from within its directory.
        with contextlib.chdir(folder), contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
            bound.bind("a.jsonl")

    def saved(folder: Path) -> None:
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text(
            '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'
        )

    def broken_state(folder: Path) -> None:
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text('{"_data_files": ')

    case(
        "a pipe",
        lambda folder: os.mkfifo(folder / "a.jsonl"),
        r".*a\.jsonl: found a pipe, expected a regular file",
    )
    case("a socket", listen, r".*a\.jsonl: found a socket, expected a regular file")
    case(
        "a link to nothing",
        lambda folder: (folder / "a.csv").symlink_to("gone"),
        r".*a\.csv: found a link to noth",
    )
    case(
        "a link to itself",
        lambda folder: (folder / "a.txt").symlink_to("a.txt"),
        r".*a\.txt: found a link to noth",
    )
    case(
        "an empty file beside a good one",
        lambda folder: (folder / "b.csv").touch(),
        r".*b\.csv: found an empty file",
    )
    case(
        "parquet within zstd",
        lambda folder: (folder / "a.parquet.zst").write_bytes(b"x"),
        r".*found \.parquet ins",
    )
    case("a saved dataset without its shard", saved, r".*00001\.arrow: found nothing, expected")
    case(
        "a saved dataset with a broken state",
        broken_state,
        r".*state\.json: not the state of a saved dataset",
    )
    case(
        "a saved DatasetDict",
        lambda f: (f / "dataset_dict.json").write_text("{}"),
        r".*found a saved DatasetDict",
    )

    def loop(folder: Path) -> None:
        (folder / "again").symlink_to(folder, target_is_directory=True)
        (folder / "once-more").symlink_to(folder, target_is_directory=True)
        (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')

    case("links that go round", loop, r".*bad\.jsonl:2: found 'text': 1")
    cases[-1] = cases[-1]._replace(expected="skip", skipped=1, kept=2001)

    def named_like_a_file(folder: Path) -> None:
        (folder / "a.jsonl").mkdir()
        (folder / "a.jsonl" / "b.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')

    case(
        "a directory named like a file",
        named_like_a_file,
        r".*a\.jsonl/b\.jsonl:2: found 'text': 1",
    )
    cases[-1] = cases[-1]._replace(expected="skip", skipped=1, kept=2001)
    return cases


def malformed(directory: Path) -> list[Case]:
    """Write all malformed files below `directory`, each in a directory of its own -> the cases,
    with unique names."""
    cases = []

    def write(name: str, file: str, content: bytes) -> str:
        path = directory / name.replace(" ", "-").replace(",", "") / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return str(path)

    for name, kind, line, words in BAD_LINES:
        path = write(name, "a.jsonl", b"\n".join(map(as_bytes, [GOOD[kind], line, GOOD[kind], ""])))
        cases.append(Case(name, [path], kind, "skip", rf".*a\.jsonl:2: {words}", 1, 2))
    for name, file, content, words, skipped, kept in BAD_ROWS:
        path = write(name, file, as_bytes(content))
        cases.append(Case(name, [path], "document", "skip", rf".*{file}{words}", skipped, kept))
    for name, file, content, words in BROKEN_FILES:
        cases.append(
            Case(name, [write(name, file, content)], "document", "error", rf".*{file}{words}")
        )
    cases += _columnar(directory) + _in_directories(directory)

    long = b'{"text": "' + b"fox " * (LONG_LINE // 4)
    path = write("a long line cut off", "a.jsonl", LINES + long)
    cases.append(
        Case(
            "a long line cut off",
            [path],
            "document",
            "skip",
            r".*a\.jsonl:2001: found .*not JSON",
            1,
            2000,
        )
    )
    path = write(
        "a long line that is a number", "a.jsonl", b'{"text": ' + b"7" * LONG_LINE + b"}\n" + LINES
    )
    cases.append(
        Case(
            "a long line that is a number",
            [path],
            "document",
            "skip",
            r".*:1: found the number 777",
            1,
            2000,
        )
    )
    cases.append(
        Case(
            "nothing there",
            [str(directory / "gone.jsonl")],
            "document",
            "error",
            r".*gone.*does not exist",
        )
    )
    cases.append(
        Case(
            "a name no file can have",
            ["a\0b.jsonl"],
            "document",
            "error",
            r"(files|a(\0|\\x00)b\.jsonl): ",
        )
    )
    cases.append(
        Case("a name too long", ["x" * 5000], "document", "error", r"x+: cannot be looked up")
    )
    cases.append(Case("a device", ["/dev/null"], "document", "error", r"/dev/null: "))
    cases.append(
        Case(
            "a glob of nothing",
            [f"{directory}/*.gone"],
            "document",
            "error",
            r".*found no data file",
        )
    )
    cases.append(
        Case(
            "a glob that is none",
            [f"{directory}/**.jsonl"],
            "document",
            "error",
            r".*cannot be looked up",
        )
    )
    return cases
