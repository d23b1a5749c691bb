"""The one kind of error that is shown to a user without a traceback."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from minimind.language import make_output_printable, outlive_full_disks, say, translated

FAILED: set[str] = set()  # decorations that this process has said to have failed


class UserError(Exception):
    """A mistake the user can fix.

    The message says what was given (file and line for data), what was expected, and what to do.
    """


def install(extra: str) -> str:
    """How to install the libraries of an extra; the project itself is on no package index."""
    return f"pip install -e '.[{extra}]' in the project's directory"


def reason(error: Exception) -> str:
    """What a library says about a foreign file, without its advice to run the code that the file brings or names."""
    words = str(error)
    if "trust_remote_code" in words:
        return (
            "it asks for code that is not installed (auto_map), which is never run; expected a model of this project"
        )
    if named := re.search(r"GLOBAL (\S+)", words):
        return f"it needs the code {named[1]}, which is never run"
    if "weights_only" in words or "Weights only" in words:
        return "it is damaged, or a pickle with more than tensors in it"
    return words


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """A block that only tells about a run: whatever goes wrong in it is said in one line, and the run continues.

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

    With several processes only rank 0 of each machine prints, since all of them meet the same mistake.
    """

    @wraps(main)
    def wrapped(*args, **kwargs):
        make_output_printable()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal without Chinese gets escapes
        outlive_full_disks()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
                say(f"error: {translated(str(error))}", file=sys.stderr)
            else:
                time.sleep(5)  # a launcher stops all as soon as one is gone: rank 0 must have spoken before
            sys.exit(2)
        except KeyboardInterrupt:  # outside of training, which saves first (training/signals.py)
            if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
                say("interrupted: nothing more was saved", file=sys.stderr)
            sys.exit(130)

    return wrapped
