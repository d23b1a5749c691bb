"""The standard streams: output cannot control a terminal, and a failing stream does not end a run.

Loads no torch.
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
from pathlib import Path
from traceback import format_exception
from typing import Any
from warnings import formatwarning as format_warning

# Control characters (C0 and C1 of ECMA-48) except tab and line feed, marks that reorder text, half
# surrogate pairs.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A text that is safe in a terminal: what could control it, reorder the text or not be encoded
    becomes an escape.

    >>> print(printable("a\x1b[2J\u202e\ud83d"))
    a\x1b[2J\u202e\ud83d
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_text(value: Any, indent: int | None = None) -> str:
    r"""A value as JSON that is safe in a terminal: what `printable` escapes becomes a JSON escape.

    >>> print(json_text({"a": "中\x9b"}))
    {"a": "中\u009b"}
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class PrintableRecord(logging.LogRecord):
    """A log record whose message, with names of files and data in it, is `printable`."""

    def getMessage(self) -> str:  # noqa: N802 (the library's name)
        """The message."""
        return printable(super().getMessage())


def make_output_printable() -> None:
    """Make log lines, warnings and tracebacks of all libraries `printable` from here on."""
    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = lambda *args, **options: printable(format_warning(*args, **options))
    sys.excepthook = lambda *error: print(
        printable("".join(format_exception(*error))), end="", file=sys.stderr
    )


def prepare_streams() -> None:
    """Open standard streams that the process was started without, and let all accept any text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        # A file's name may not be valid text, and a terminal may not support Chinese
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    make_output_printable()
    ignore_full_disks()


class Output(io.FileIO):
    """An output file: what a full disk rejects is lost; a reader that is gone stays an error."""

    def write(self, data) -> int | None:
        """`io.FileIO.write`, except that data lost to an error of the disk counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            return len(data)


def ignore_full_disks() -> None:
    """Keep a full disk behind `> run.log` from ending the program or changing its exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__") or stream.isatty():
            continue
        stream.flush()
        file = io.BufferedWriter(Output(stream.fileno(), "wb", closefd=False))
        names = ("encoding", "errors", "line_buffering", "write_through")
        options = {each: getattr(stream, each) for each in names}
        setattr(sys, name, io.TextIOWrapper(file, **options))


def keep_output_writable() -> None:
    """Discard the output of streams that accept none.

    The Ctrl-C that reaches a run also ends the `tee` behind it; a closed terminal, or a log on a
    full disk, accepts no more lines. A print must cost neither the checkpoint nor, in the
    interpreter's last flush, the exit code.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None:  # closed from the start: the number may be another file's by now
            continue
        if has_no_reader(number) or not _flushes(stream):
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), number)


def has_no_reader(descriptor: int) -> bool:
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
