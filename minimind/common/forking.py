"""Functions in forks of a process that has loaded the libraries already: torch, transformers and
TRL take 5 to 10 s to load on two cores, in each process anew."""

import os
import signal
import sys
from collections.abc import Callable


def run_forked(function: Callable[..., None], *arguments) -> int:
    """Call a function in a fork of this process; returns the exit code as `subprocess.run` does.

    The caller must not have computed with torch nor have touched a GPU: neither its threads nor a
    GPU's context survive a fork. The fork ends as any Python process does, by its SystemExit or
    exception, and runs the `finally` blocks and exit functions of the caller too. Ctrl-C is the
    fork's to handle.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGINT, handler)
        function(*arguments)
        sys.exit()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    finally:
        signal.signal(signal.SIGINT, handler)
