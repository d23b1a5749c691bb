"""Our own small files: written at once and to the disk, read with one message about what is wrong with them.

Loads no torch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind.errors import UserError

KINDS = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that it appears complete or not at all, also after a power loss.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of a text; what UTF-8 cannot say, such as half a surrogate pair, is escaped."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def sync_file(path: str | Path) -> None:
    """Wait until a file that was written and closed is on the disk; raises OSError."""
    with Path(path).open("r+b") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk, where the file system can do that."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def read_json(path: str | Path, remedy: str, kind: type = dict) -> Any:
    """The JSON value in a file of ours, which has to be of a `kind`.

    Raises:
        UserError: there is none, it cannot be read, or it is something else; `remedy` says what to do then.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    if not content.strip():
        found = f"{len(content):,} bytes of white space" if content else "an empty file"
        raise UserError(f"{path}: found {found}, expected JSON. {remedy}")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, or cut off ({error}). {remedy}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: found {KINDS.get(type(value), 'null')}, expected {KINDS[kind]}. {remedy}")
    return value


def json_lines(path: str | Path) -> Iterator[dict]:
    """The objects in a JSON Lines file of ours; lines that a killed process left unfinished are left out.

    Only a line feed ends a line: U+2028 and its like stand in texts.

    Raises:
        OSError: the file cannot be read; one that does not exist has no lines.
    """
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry
