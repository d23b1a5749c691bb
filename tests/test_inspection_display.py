"""What an inspection shows in the terminal and on the page, and that the guides show it too."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inspecting import CONVERSATIONS, chat, rows_of, tokenized, tokens_of
from pipeline import run_cli

from minimind.data.packing import IGNORED
from minimind.data.world import write_world
from minimind.inspection import inspect_rows
from minimind.inspection.display import row_text
from minimind.inspection.readable import ReadableRows
from minimind.tokenizer import load_tokenizer, text_bytes

HOSTILE = (
    '<script>alert(1)</script> <img src=x onerror=alert(2)> & "quotes" </div> \x1b[31m\u202ered 🦊'
)


def test_the_page_holds_hostile_text_as_text_and_asks_nothing_of_the_network(
    tokenizer, tokenizer_dir, write_jsonl, capsys, tmp_path
):
    path = write_jsonl("chats.jsonl", rows_of(chat(HOSTILE, f"safe {HOSTILE}"), *CONVERSATIONS))
    run_cli(
        "inspect",
        path,
        "--tokenizer",
        tokenizer_dir,
        "--html",
        tmp_path / "out" / "page.html",
        "--rows",
        2,
    )
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["page.html"]
    tags, shown, titles, inside = Counter(), [], [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags[tag] += 1
            for name, value in attrs:
                assert not name.startswith("on")
                assert name not in ("src", "href", "srcset", "action", "xlink:href")
                assert name != "style" or "(" not in value
            if tag == "i":
                titles.append(dict(attrs)["title"])
                shown.append("")
            inside.append(tag)

        def handle_data(self, data):
            if inside[-1:] == ["i"]:
                shown[-1] += data

    Reader().feed(page)
    assert tags["script"] == 0
    assert tags["img"] == 0
    assert tags["svg"] == 1
    assert not re.search(r"https?:|url\(|@import", page)
    assert "\x1b" not in page
    assert "\u202e" not in page
    rows = tokenized([chat(HOSTILE, f"safe {HOSTILE}"), CONVERSATIONS[0]], tokenizer)
    assert len(shown) == sum(len(row["input_ids"]) for row in rows)
    expected = [
        f"id {token}, label {'ignored' if label == IGNORED else label}"
        for row in rows
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    ]
    assert [title.rsplit(", ", 1)[0] for title in titles] == expected
    assert "<script>alert(1)</script>" in "".join(shown)
    assert "\\x1b[31m" in "".join(shown)


def test_the_terminal_shows_each_token_once_and_trained_ones_on_colour():
    tokenizer = load_tokenizer()
    rows = tokenized([chat("你好 [bold]x[/bold]\n", "晒 done")], tokenizer)
    inspection = inspect_rows("sft", tokens_of(rows), tokenizer)
    text = row_text(ReadableRows(inspection, tokenizer), 0)
    plain = text.plain.replace("⏎\n", "⏎")
    parts = [
        piece
        for token in rows[0]["input_ids"]
        if (piece := text_bytes(tokenizer)[token]) and not _decodes(piece)
    ]
    assert parts
    for part in parts:
        assert "".join(f"<0x{byte:02X}>" for byte in part) in plain
    whole = re.sub(r"(<0x[0-9A-F]{2}>)+", "晒", plain)
    assert whole == tokenizer.decode(rows[0]["input_ids"]).replace("\n", "⏎")
    spans = [span for span in text.spans if text.plain[span.start : span.end]]
    assert len(spans) == len(rows[0]["input_ids"])
    for span, label in zip(spans, rows[0]["labels"], strict=True):
        assert (" on " in str(span.style)) is (label != IGNORED)


def _decodes(piece):
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_the_printed_report_tells_roles_lengths_and_findings(
    tokenizer_dir, write_jsonl, capsys, tmp_path
):
    path = write_jsonl("chats.jsonl", rows_of(*CONVERSATIONS, CONVERSATIONS[0]))
    run_cli(
        "inspect",
        path,
        "--tokenizer",
        tokenizer_dir,
        "--png",
        tmp_path / "lengths.png",
        "--rows",
        1,
    )
    said = capsys.readouterr().out
    assert "sft: 5 rows" in said
    assert "the end token of 7 of 7 trained replies" in said
    assert "0.0%" in re.search(r"^user .*$", said, re.MULTILINE).group()
    assert f"{path}:5 (as {path}:1)" in said
    assert "--max_length" in said
    assert "<|im_start|>user⏎" in said
    assert said.count(f"\n{path}:1\n") == 1
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("guide", ["inspect.md", "inspect_zh.md"])
def test_the_guide_shows_what_the_command_prints_and_names_every_finding(
    guide, monkeypatch, tmp_path, capsys
):
    root = Path(__file__).parent.parent
    text = (root / "docs" / guide).read_text(encoding="utf-8")
    source = "".join(
        file.read_text(encoding="utf-8") for file in (root / "minimind/inspection").glob("*.py")
    )
    in_code = set(re.findall(r'findings\.add\(\s*"(\w+)"', source)) | {"bad_rows"}
    in_guide = {
        name
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert in_guide == in_code
    monkeypatch.chdir(tmp_path)
    write_world(Path("world"))
    command, shown = re.search(
        r"<!-- minimind (.*?) -->\n```\n(.*?)\n```", text, re.DOTALL
    ).groups()
    run_cli(*command.split())
    assert [line.rstrip() for line in capsys.readouterr().out.rstrip().split("\n")] == shown.split(
        "\n"
    )
