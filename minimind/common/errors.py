"""Errors that a user sees without a traceback, and blocks whose errors do not end a run."""

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
FAILED: set[str] = set()  # decorations whose failure this process has reported


class UserError(Exception):
    """A mistake the user can fix.

    The message names what was found (file and line for data), what was expected, and what to do.
    """


class BadRowError(ValueError):
    """A row that cannot be used; the message says what was found and what was expected."""


def install(extra: str) -> str:
    """How to install the libraries of an extra; the project is not on a package index."""
    return f"pip install -e '.[{extra}]' in the project's directory"


def reason(error: BaseException) -> str:
    """A library's message about a foreign file, with the error's class where the message alone says
    too little, and without its advice to run code that the file contains or names."""
    message = str(error)
    if "trust_remote_code" in message:
        return (
            "it requires code that is not installed (auto_map), which is never run; expected a"
            " model of this project"
        )
    if code := re.search(r"GLOBAL (\S+)", message):
        return f"it needs the code {code[1]}, which is never run"
    if "weights_only" in message or "Weights only" in message:
        return "it is damaged, or a pickle with more than tensors in it"
    error = error.__cause__ or error
    message = str(error).strip()
    is_clear = message and isinstance(error, ValueError | OSError | RuntimeError)
    return message if is_clear else f"{type(error).__name__}: {message}"


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Run a block that only informs about a run: an error in it becomes one notice, and the run
    continues.

    `what` names its product, such as "the report"; repeated failures are reported once.
    """
    try:
        yield
    except Exception as error:
        if what not in FAILED and os.environ.get("RANK", "0") == "0":
            problem = f"{type(error).__name__}: {first_line(error)}"
            say(f"notice: {what} failed ({problem}); the run continues", file=sys.stderr)
        FAILED.add(what)


def first_line(error: Exception) -> str:
    """The first line of an error's message, which may be empty."""
    return (str(error).strip().splitlines() or [""])[0]


def reports_user_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate an entry point: a `UserError` becomes one message on stderr and exit code 2.

    So does an error of the system about a named file or a full disk. With several processes only
    rank 0 of each machine prints, since all of them meet the same mistake.
    """

    @wraps(main)
    def wrapped(*args, **kwargs):
        prepare_streams()
        try:
            try:
                main(*args, **kwargs)
            except SystemExit:  # as after --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except UserError as error:
            stop(str(error))
        except OSError as error:
            if isinstance(error, BrokenPipeError) and has_no_reader(1):
                # The interpreter flushes once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.exit(128 + signal.SIGPIPE)
            if (problem := file_problem(error)) is None:
                raise
            stop(problem)
        except KeyboardInterrupt:  # outside of training, which saves first (training/signals.py)
            if is_local_main_process():
                say("interrupted: nothing more was saved", file=sys.stderr)
            sys.exit(130)

    return wrapped


def stop(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    if is_local_main_process():
        say(f"error: {translated(message)}", file=sys.stderr)
    else:
        time.sleep(5)  # a launcher stops all processes after the first exit: let rank 0 print first
    sys.exit(2)


def is_local_main_process() -> bool:
    """Whether this process prints for all processes of this machine."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def file_problem(error: OSError) -> str | None:
    """A message about a user's file or disk; None where the error is about something else."""
    name = "" if error.filename is None else os.fsdecode(error.filename)
    if error.errno in FULL:
        file = f"{name}: " if name else ""
        return f"{file}{error.strerror}. Free some space, or write to another disk."
    if not name or error.strerror is None:
        return None
    return (
        f"{name}: {error.strerror.lower()}. Check that it exists, what it is, and who may read and"
        " write it."
    )
