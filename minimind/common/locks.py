"""One process at a time: a lock that ends with the process that holds it, however that ends. Loads
no torch."""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.common.language import say


def lock(file: Path, what: str) -> BaseFileLock | None:
    """Lock `file`, which says who holds it, until `unlock` or the end of this process.

    Returns None, with a notice, where the file system has no locks.

    Raises:
        UserError: another process holds it; `what` it works on.
    """
    # A soft lock would be held for ever by a process that was killed.
    held = FileLock(file, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(
            f"{what} is being written by {_holder(file)}. Wait for its end, or stop it."
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        say(
            f"notice: {file} cannot be locked ({reason}): do not start another run there",
            file=sys.stderr,
        )
        return None
    words = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # a full disk
        # In place: the lock is on this very file
        file.write_text(json.dumps(words), encoding="utf-8")
    return held


def unlock(held: BaseFileLock | None) -> None:
    """Release a lock and remove its file."""
    if held is not None and held.is_locked:
        with suppress(OSError):
            Path(held.lock_file).unlink(missing_ok=True)
        held.release()


def _holder(file: Path) -> str:
    try:
        words = read_json(file, "")
        return f"process {words['pid']} on {words['host']} since {words['since']}"
    except (UserError, KeyError):  # it has only just begun
        return "another process"
