"""The one kind of error that is shown to a user without a traceback."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn

from minimind.common.language import say, translated
from minimind.common.streams import has_no_reader, prepare_streams

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILED: set[str] = set()  # decorations that this process has said to have failed


class UserError(Exception):
    """A mistake the user can fix.

    The message says what was given (file and line for data), what was expected, and what to do.
    """


class BadRowError(ValueError):
    """A row that cannot be used; the message says what was found and what was expected."""


def install(extra: str) -> str:
    """How to install the libraries of an extra; the project itself is on no package index."""
    return f"pip install -e '.[{extra}]' in the project's directory"


def reason(error: BaseException) -> str:
    """What a library says about a foreign file, with the error's kind where the words alone tell
    nothing, and without advice to run the code that the file brings or names."""
    words = str(error)
    if "trust_remote_code" in words:
        return (
            "it asks for code that is not installed (auto_map), which is never run; expected a"
            " model of this project"
        )
    if named := re.search(r"GLOBAL (\S+)", words):
        return f"it needs the code {named[1]}, which is never run"
    if "weights_only" in words or "Weights only" in words:
        return "it is damaged, or a pickle with more than tensors in it"
    error = error.__cause__ or error
    words = str(error).strip()
    telling = words and isinstance(error, ValueError | OSError | RuntimeError)
    return words if telling else f"{type(error).__name__}: {words}"


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """A block that only tells about a run: whatever goes wrong in it is said in one line, and the
    run continues.

    `what` it makes, such as "the report", is named once, however often it fails.
    """
    try:
        yield
    except Exception as error:
        if what not in FAILED and os.environ.get("RANK", "0") == "0":
            said = f"{type(error).__name__}: {first_line(error)}"
            say(f"notice: {what} failed ({said}); the run continues", file=sys.stderr)
        FAILED.add(what)


def first_line(error: Exception) -> str:
    """The first line of what an error says, which may be nothing."""
    return (str(error).strip().splitlines() or [""])[0]


def reports_user_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate an entry point: a `UserError` becomes one message on stderr and exit code 2.

    So does an error of the system about a file, which its name tells, or about a full disk.

    With several processes only rank 0 of each machine prints, since all of them meet the same
    mistake.
    """

    @wraps(main)
    def wrapped(*args, **kwargs):
        prepare_streams()
        try:
            main(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            stop(str(error))
        except OSError as error:
            if isinstance(error, BrokenPipeError) and has_no_reader(1):
                # For what the interpreter still flushes
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.exit(128 + signal.SIGPIPE)
            if (problem := file_problem(error)) is None:
                raise
            stop(problem)
        except KeyboardInterrupt:  # outside of training, which saves first (training/signals.py)
            if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
                say("interrupted: nothing more was saved", file=sys.stderr)
            sys.exit(130)

    return wrapped


def stop(message: str) -> NoReturn:
    """Say what is wrong and exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
        say(f"error: {translated(message)}", file=sys.stderr)
    else:
        time.sleep(5)  # a launcher stops all as soon as one is gone: rank 0 must have spoken before
    sys.exit(2)


def file_problem(error: OSError) -> str | None:
    """What is wrong with a user's file or disk; None where an error is about something else."""
    name = "" if error.filename is None else os.fsdecode(error.filename)
    if error.errno in FULL:
        return (
            f"{name + ': ' if name else ''}{error.strerror}. Free some space, or write to another"
            " disk."
        )
    if not name or error.strerror is None:
        return None
    return (
        f"{name}: {error.strerror.lower()}. Check that it exists, what it is, and who may read and"
        " write it."
    )
