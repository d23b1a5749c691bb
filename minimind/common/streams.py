"""The standard streams: what goes through them cannot control a terminal, and nothing that happens
to them ends a run.

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

# Control characters but tab and line feed (C0 and C1 of ECMA-48), marks that reorder text, half
# surrogate pairs.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""A text as a terminal may have it: what could control the terminal, turn the direction of
    writing or not be encoded is shown as an escape.

    >>> print(printable("a\x1b[2J\u202e\ud83d"))
    a\x1b[2J\u202e\ud83d
    """
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_text(value: Any, indent: int | None = None) -> str:
    r"""A value as JSON that a terminal may have: what `printable` escapes is escaped as JSON reads
    it back.

    >>> print(json_text({"a": "中\x9b"}))
    {"a": "中\u009b"}
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class PrintableRecord(logging.LogRecord):
    """A line of a log, this package's or a library's: what it names of files and data cannot
    control the terminal."""

    def getMessage(self) -> str:  # noqa: N802 (the library's name)
        """The line."""
        return printable(super().getMessage())


def make_output_printable() -> None:
    """Let what libraries say of this process, log lines, warnings and tracebacks, be `printable`
    from here on."""
    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = lambda *args, **options: printable(format_warning(*args, **options))
    sys.excepthook = lambda *error: print(
        printable("".join(format_exception(*error))), end="", file=sys.stderr
    )


def prepare_streams() -> None:
    """Let the standard streams exist, also where the process was started without them, and take any
    text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        # A file's name may be no text, and a terminal know no Chinese
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    make_output_printable()
    outlive_full_disks()


class Output(io.FileIO):
    """A file that output goes to: what its full disk does not take is lost. A reader that is gone
    stays an error."""

    def write(self, data) -> int | None:
        """`io.FileIO.write`, except that an error of the disk counts as written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            return len(data)


def outlive_full_disks() -> None:
    """Let no full disk behind `> run.log` end the program, in the midst of a run or with a code of
    its own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__") or stream.isatty():
            continue
        stream.flush()
        file = io.BufferedWriter(Output(stream.fileno(), "wb", closefd=False))
        options = {"errors": stream.errors, "line_buffering": stream.line_buffering}
        setattr(
            sys,
            name,
            io.TextIOWrapper(file, stream.encoding, write_through=stream.write_through, **options),
        )


def keep_output_writable() -> None:
    """Send output nowhere where nobody takes it: the Ctrl-C that reaches a run also ends the `tee`
    behind it, a closed terminal takes no more lines, nor does a log on a full disk. A print must
    cost neither the checkpoint nor, in the interpreter's last flush, the exit code."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None:  # closed from the beginning: the number may be another file's by now
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
