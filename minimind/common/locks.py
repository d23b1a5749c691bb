"""Locks for one process at a time, which end with the process that holds them, however it ends.

Loads no torch.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from minimind.common.errors import UserError, is_local_main_process
from minimind.common.files import read_json
from minimind.common.language import say

UNSUPPORTED = (OSError, NotImplementedError)  # what filelock raises where there are no locks


def lock(file: Path, what: str) -> BaseFileLock | None:
    """Lock `file`, which says who holds it, until `unlock` or the end of this process.

    Returns None, with a notice, where the file system has no locks.

    Raises:
        UserError: another process holds it; `what` it works on.
    """
    file_lock = _file_lock(file)
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{what} is being written by {_holder(file)}. Wait for it to finish, or stop it."
        ) from None
    except UNSUPPORTED as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = f"notice: {file} cannot be locked ({reason}): do not start another run there"
        say(text, file=sys.stderr)
        return None

    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with suppress(OSError):  # a full disk
        # In place: the lock is on this very file
        file.write_text(json.dumps(holder), encoding="utf-8")
    return file_lock


def unlock(file_lock: BaseFileLock | None) -> None:
    """Release a lock and remove its file."""
    if file_lock is not None and file_lock.is_locked:
        with suppress(OSError):
            Path(file_lock.lock_file).unlink(missing_ok=True)
        file_lock.release()


@contextmanager
def wait_for_lock(file: Path | str) -> Iterator[bool]:
    """Lock `file` for a block, after waiting for the process that holds it; yields whether the file
    system has locks and this user may write the file.

    Without a lock several processes do the same work, and the first to finish wins.
    """
    file_lock = _file_lock(file)
    with suppress(*UNSUPPORTED):
        try:
            file_lock.acquire(blocking=False)
        except Timeout:
            if is_local_main_process():
                say(f"waiting for another process that prepares this ({file})", file=sys.stderr)
            file_lock.acquire()
    try:
        yield file_lock.is_locked
    finally:
        file_lock.release()


def _file_lock(file: Path | str) -> BaseFileLock:
    # A soft lock would outlive a process that was killed.
    return FileLock(file, thread_local=False, fallback_to_soft=False)


def _holder(file: Path) -> str:
    try:
        holder = read_json(file, "")
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (UserError, KeyError):  # it has only just begun
        return "another process"
