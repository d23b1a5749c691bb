"""Arbitrary input at every reader and converter: refused in words or read, and no row is lost
without being told."""

import codecs
import contextlib
import csv
import io
import json
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import arrow_bytes, packed, parquet_bytes

from minimind.common.errors import BadRowError, UserError
from minimind.data import formats, json_files, lines, tables
from minimind.data.conversations import to_messages, to_text
from minimind.data.files import read_rows, to_document
from minimind.data.messages import ROLES
from minimind.data.preferences import to_preference

deterministic = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)

KEYS = [
    "text",
    "content",
    "messages",
    "conversations",
    "role",
    "from",
    "value",
    "prompt",
    "completion",
    "instruction",
]
KEYS += [
    "input",
    "output",
    "history",
    "system",
    "chosen",
    "rejected",
    "question",
    "answer",
    "label",
    "tools",
    "weight",
]
KEYS += [
    "tool_calls",
    "function_call",
    "functions",
    "arguments",
    "name",
    "reasoning_content",
    "train",
    "id",
    "type",
]
WORDS = [
    *ROLES,
    "tool",
    "observation",
    "a fox",
    "",
    " ",
    "[]",
    "{}",
    "<think>",
    "</think>",
    "<tool_call>",
    "[{]",
    "\0",
]

# Half characters included
texts = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=()), max_size=8)
numbers = (
    st.integers() | st.floats() | st.sampled_from([2**63, 2**64, -(2**70), 10**400, 1e308, -0.0])
)
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=5)
    ),
    max_leaves=20,
)
rows = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", *ROLES, "tool"]), "content": texts | values}
    ),
    max_size=4,
)
chats = st.fixed_dictionaries(
    {},
    optional={
        "messages": messages | values,
        "tools": values,
        "prompt": texts | messages,
        "completion": texts | messages,
        "chosen": texts | messages,
        "rejected": texts | messages,
        "history": values,
        "system": texts | values,
        "instruction": texts | values,
        "output": texts | values,
    },
)


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def read(path, content: bytes, convert=None, **options):
    """-> the rows that came out and how many were reported as bad; None if the file was refused for
    its structure."""
    path.write_bytes(content)
    told, logger, seen = Told(), logging.getLogger("minimind.data.bad_rows"), []
    logger.addHandler(told)
    try:
        found = list(read_rows([str(path)], "skip", convert, progress=seen.append, **options))
    except UserError as error:
        assert str(path) in str(error)
        str(error).encode()  # can be printed
        none_left = re.search(r"No usable row is left of ([\d,]+)\.", str(error))
        return ([], int(none_left[1].replace(",", ""))) if none_left else None
    finally:
        logger.removeHandler(told)
    assert sum(seen) == len(content)
    assert len({row.where for row in found}) == len(found) or path.suffix == ".json"
    (skipped,) = [
        int(re.match(r"skipped ([\d,]+) of", m)[1].replace(",", "")) for m in told.messages
    ] or [0]
    return found, skipped


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def lines_of(content: bytes) -> list[bytes]:
    """The lines that are not blank, counted without the readers."""
    return [line for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]


def is_usable(value) -> bool:
    """Whether a value, as `json` made it, is an object that any JSON parser would read in the same
    way."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (UnicodeEncodeError, ValueError):
        return False
    return isinstance(value, dict) and not any(abs(number) > 1e308 for number in _numbers(value))


def _numbers(value):
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def as_floats(value):
    """The value with integers beyond 64 bits as floats."""
    if isinstance(value, dict):
        return {key: as_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


@given(
    st.lists(values | rows, min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([None, (",", ":"), (" , ", " : ")]),
)
@deterministic
def test_every_json_value_in_lines_comes_out_as_it_is_or_is_reported(
    tmp_path, given_values, ascii_only, separators
):
    lines = [
        json.dumps(value, ensure_ascii=ascii_only, separators=separators) for value in given_values
    ]
    found, reported = read(tmp_path / "a.jsonl", encoded("\n".join(lines)))
    usable = [as_floats(value) for value in given_values if is_usable(value)]
    assert [row.data for row in found] == usable
    assert reported == len(given_values) - len(usable)


@given(
    st.lists(values | rows, min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
    st.sampled_from([1, 7, 64, 1 << 20]),
)
@deterministic
def test_every_json_value_in_a_list_comes_out_as_it_is_or_is_reported(
    tmp_path, given_values, ascii_only, indent, size
):
    text = json.dumps(given_values, ensure_ascii=ascii_only, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(given_values, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        for module in (formats, json_files, lines, tables):
            patch.setattr(module, "BUFFER", size)
        found, reported = read(tmp_path / "a.json", text.encode())
    usable = [as_floats(value) for value in given_values if is_usable(value)]
    assert [row.data for row in found] == usable
    assert reported == len(given_values) - len(usable)


keys = st.sampled_from(['"text"', '"a"', '"a" ', '"\\u0061"', '"\\":"', '":"'])
pairs = st.lists(
    st.tuples(
        keys, st.sampled_from(['"x"', '":"', '"\\":"', "{}", '{"a":1}', '{"a":1,"a":2}', "[]"])
    )
)


@given(pairs)
@deterministic
def test_a_key_is_reported_as_repeated_exactly_where_it_is_repeated(tmp_path, pairs):
    line = "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
    names = [json.loads(key) for key, _ in pairs]
    twice = len(set(names)) < len(names) or any(value.count('"a"') == 2 for _, value in pairs)
    found, reported = read(tmp_path / "a.jsonl", line.encode())
    assert (len(found), reported) == ((0, 1) if twice else (1, 0))


noise = st.binary(max_size=60) | st.lists(
    st.sampled_from(
        [
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b":",
            b",",
            b"\n",
            b"\r",
            b"\\",
            b"text",
            b" ",
            b"\0",
            b"1",
            b"\xef",
        ]
    )
    | st.binary(max_size=2)
    | texts.map(encoded),
    max_size=20,
).map(b"".join)


@given(
    st.sampled_from([".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow"]),
    noise,
)
@settings(deterministic, max_examples=500)
def test_arbitrary_bytes_are_read_or_refused(tmp_path, suffix, content):
    for unit in ("file", "paragraph", "line") if suffix == ".txt" else ("file",):
        outcome = read(tmp_path / f"a{suffix}", content, text_unit=unit)
        if outcome is None:
            continue
        found, reported = outcome
        if suffix in (".jsonl", ".ndjson") or unit == "line":
            assert len(found) + reported == len(lines_of(content))
        elif suffix == ".txt" and unit == "file":
            assert len(found) + reported == 1
        if unit == "line" and not reported:
            assert [row.data["text"].encode() for row in found] == [
                line.rstrip(b"\r") for line in lines_of(content)
            ]


@given(
    st.text(st.sampled_from('",;\t\r\n ab1狐\0')), st.sampled_from([(".csv", ","), (".tsv", "\t")])
)
@deterministic
def test_every_row_of_a_table_of_text_comes_out_or_is_reported(tmp_path, text, kind):
    suffix, delimiter = kind
    outcome = read(tmp_path / f"a{suffix}", text.encode())
    try:
        header, *expected = filter(
            None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        )
    except (csv.Error, ValueError):
        assert outcome is None
        return
    if outcome is not None:
        found, reported = outcome
        assert [list(row.data.values()) for row in found] == [
            row for row in expected if len(row) == len(header)
        ]
        assert len(found) + reported == len(expected)


@given(st.lists(st.text(st.sampled_from("ab狐\n \t\r"), max_size=20), max_size=6))
@deterministic
def test_paragraphs_hold_every_line_that_is_not_blank(tmp_path, parts):
    content = "\n\n".join(parts).encode()
    outcome = read(tmp_path / "a.txt", content, text_unit="paragraph")
    if outcome is None:
        assert not lines_of(content)
        return
    found, reported = outcome
    assert not reported
    kept = [line.strip() for row in found for line in row.data["text"].split("\n")]
    assert kept == [line.decode().strip() for line in lines_of(content)]


LINES = b"".join(b'{"text": "the fox runs home %d times"}\n' % (i * 7919) for i in range(300))
WHOLE = {
    "a.jsonl.gz": packed(LINES),
    "a.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "a.parquet": parquet_bytes(),
    "b.parquet": parquet_bytes(compression="none", use_dictionary=False, data_page_version="2.0"),
    "a.arrow": arrow_bytes(),
}


@given(st.sampled_from(sorted(WHOLE)), st.data())
@settings(deterministic, max_examples=400)
def test_a_damaged_file_is_read_or_refused(tmp_path, name, data):
    content = bytearray(WHOLE[name])
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(
        st.lists(positions | positions.map(lambda p: len(content) - 1 - p % 400), max_size=4)
    ):
        content[position] = data.draw(st.integers(0, 255))
    read(tmp_path / name, bytes(content[: data.draw(st.just(None) | positions)] or b"x"))


@given(values.filter(lambda value: isinstance(value, dict)) | rows | chats)
@settings(deterministic, max_examples=400)
def test_a_converter_gives_what_it_promises_or_refuses_the_row(row):
    with contextlib.suppress(BadRowError):
        text = to_document(row)
        assert text.strip()
        assert "\0" not in text
    with contextlib.suppress(BadRowError):
        assert isinstance(to_text(row), str)
    with contextlib.suppress(BadRowError):
        check_messages(to_messages(row))
    with contextlib.suppress(BadRowError):
        pair = to_preference(row)
        assert pair["chosen"] != pair["rejected"]
        check_messages(pair["prompt"] + pair["chosen"])
        check_messages(pair["prompt"] + pair["rejected"])


def check_messages(found):
    assert found[-1]["role"] == "assistant"
    assert all(
        isinstance(message["content"], str) and "\0" not in message["content"] for message in found
    )


plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)


@given(st.lists(st.fixed_dictionaries({"text": plain, "n": plain}), min_size=1, max_size=8))
@deterministic
def test_every_row_of_a_parquet_file_comes_out_as_it_is(tmp_path, data):
    try:
        table = pa.Table.from_pylist(data)
    except (pa.ArrowException, TypeError, OverflowError):
        return  # no table has columns of such a mixture
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    found, reported = read(tmp_path / "a.parquet", sink.getvalue().to_pybytes())
    assert ([row.data for row in found], reported) == (data, 0)


@pytest.mark.parametrize("depth", [90, 99, 100, 101, 300, 1000, 5000])
def test_deep_nesting_is_refused_in_words_at_every_depth(tmp_path, depth):
    for text in (
        '{"text": ' + "[" * depth + "]" * depth + "}",
        '{"text": ' + '{"a":' * depth + "1" + "}" * depth + "}",
    ):
        found, reported = read(tmp_path / "a.jsonl", text.encode())
        assert (len(found), reported) == ((1, 0) if depth < 100 else (0, 1))
        outcome = read(tmp_path / "a.json", f"[{text}]".encode())
        assert outcome is None or (len(outcome[0]), outcome[1]) == (len(found), reported)
