"""What the program says, in Chinese too: under MINIMIND_LANG=zh, or where the locale is Chinese.

The code speaks English. What is meant for a person goes through `translated` on its way out, which looks it up in one
table, messages_zh.yaml: English templates, with {} for what changes, and their Chinese. A text that is not in it stays
English. A test holds every template against the texts in the code, so that none is left behind when they change.
"""

import errno
import io
import json
import logging
import os
import re
import select
import sys
import warnings
from functools import cache
from pathlib import Path
from traceback import format_exception
from typing import Any
from warnings import formatwarning as format_warning

TABLE = Path(__file__).with_name("messages_zh.yaml")
# Where texts are put together from several: lines and indents; a place or a name, and sentences; the items of a list.
BORDERS = re.compile(r"\n|^ +"), re.compile(r": |\. "), re.compile(r"; |, ")
# Control characters but tab and line feed (C0 and C1 of ECMA-48), marks that reorder text, half surrogate pairs.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CHINESE_MARKS = {": ": "：", ". ": "。", "\n": "\n", "; ": "；", ", ": "，"}


def is_chinese() -> bool:
    """Whether the user asked for Chinese, or the locale does, and the terminal can show it."""
    names = ("MINIMIND_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    asked = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return asked.lower().startswith("zh") and _can_show("中")


def _can_show(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@cache
def table() -> dict[str, str]:
    """English templates and their Chinese, in the order of the file: the first that fits is taken."""
    import yaml

    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def _fit(template: str, text: str) -> re.Match | None:
    """What fills the gaps of a template that the text is an instance of.

    It is within one line, unless the template itself has several, and begins no text with an indent.
    """
    words = template.split("{}")
    if not all(word in text for word in words) or (text[0].isspace() and not words[0]):
        return None
    return re.fullmatch("(.*?)".join(map(re.escape, words)), text, re.DOTALL if "\n" in template else 0)


def translated(text: str) -> str:
    """A text for a person, in the user's language as far as the table has it, what fills its gaps included."""
    if not text.strip() or not is_chinese():
        return text
    for english, chinese in table().items():
        if match := _fit(english, text):
            return chinese.format(*map(translated, match.groups()))
    for borders in BORDERS:
        if border := borders.search(text):
            first, mark, rest = text[: border.start()], border.group(), text[border.end() :]
            said = translated(first)
            return said + (mark if said == first else CHINESE_MARKS[mark]) + translated(rest)
    return text


def printable(text: str) -> str:
    r"""A text as a terminal may have it: what could control the terminal, turn the direction of writing or not be
    encoded is shown as an escape.

    >>> print(printable("a\x1b[2J\u202e\ud83d"))
    a\x1b[2J\u202e\ud83d
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_text(value: Any, indent: int | None = None) -> str:
    r"""A value as JSON that a terminal may have: what `printable` escapes is escaped as JSON reads it back.

    >>> print(json_text({"a": "中\x9b"}))
    {"a": "中\u009b"}
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class PrintableRecord(logging.LogRecord):
    """A line of a log, this package's or a library's: what it names of files and data cannot control the terminal."""

    def getMessage(self) -> str:  # noqa: N802 (the library's name)
        """The line."""
        return printable(super().getMessage())


def make_output_printable() -> None:
    """Let what libraries say of this process, log lines, warnings and tracebacks, be `printable` from here on."""
    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = lambda *args, **options: printable(format_warning(*args, **options))
    sys.excepthook = lambda *error: print(printable("".join(format_exception(*error))), end="", file=sys.stderr)


def say(text: str, **options) -> None:
    """Print a text for a person, at once; `options` are those of `print`.

    Words that nobody can take, since the log's disk is full or its reader gone, end nothing.
    """
    try:
        print(printable(translated(text)), **{"flush": True, **options})
    except (OSError, ValueError):  # the latter of a stream that is closed
        return


class Output(io.FileIO):
    """A file that output goes to: what its full disk does not take is lost. A reader that is gone stays an error."""

    def write(self, data) -> int | None:
        """`io.FileIO.write`, except that an error of the disk counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            return len(data)


def outlive_full_disks() -> None:
    """Let no full disk behind `> run.log` end the program, in the midst of a run or with a code of its own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__") or stream.isatty():
            continue
        stream.flush()
        file = io.BufferedWriter(Output(stream.fileno(), "wb", closefd=False))
        options = {"errors": stream.errors, "line_buffering": stream.line_buffering}
        setattr(sys, name, io.TextIOWrapper(file, stream.encoding, write_through=stream.write_through, **options))


def keep_output_writable() -> None:
    """Send output nowhere where nobody takes it: the Ctrl-C that reaches a run also ends the `tee` behind it, a closed
    terminal takes no more lines, nor does a log on a full disk. A print must cost neither the checkpoint nor, in the
    interpreter's last flush, the exit code."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None:  # closed from the beginning: the number may be another file's by now
            continue
        if _has_no_reader(number) or not _flushes(stream):
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), number)


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return False
    broken = select.poll()
    broken.register(descriptor, 0)
    return bool(broken.poll(0))


def _flushes(stream) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True
