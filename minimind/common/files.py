"""Our own small files: written at once and to the disk, read with one message about what is wrong
with them.

Loads no torch.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import xxhash

from minimind.common.errors import UserError

# JSON's kinds of values, by what Python makes of them.
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
}
KINDS |= {bool: "true or false", type(None): "null"}


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


def sync_files(directory: Path) -> None:
    """Wait until all files of a directory are on the disk: a library has written them, and it does
    not wait."""
    for path in (directory, *directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        elif path.is_file():
            sync_file(path)


def check_output(path: str | Path, directory: bool = False) -> None:
    """Look whether a file, or a `directory` of files, can be written, before the work that it is to
    hold.

    Raises:
        UserError: something else is there or in the way, it may not be written, or no file can have
        such a name.
    """
    place = Path(path).expanduser().absolute()
    try:
        # The name and what stands there until it is whole
        for name in (place.name, f".{place.name}.partial"):
            place.with_name(name).exists()
        missing = [each for each in (place, *place.parents) if not each.exists()]
        found = missing[-1].parent if missing else place if directory else place.parent
        if missing and place.is_symlink():
            problem = "it is a link to nothing"
        elif not found.is_dir():
            problem = f"{found} is no directory"
        elif not os.access(found, os.W_OK | os.X_OK):
            problem = f"{found} may not be written"
        elif place.is_dir() and not directory:
            problem = "it is a directory"
        elif place.exists() and not os.access(place, os.W_OK):
            problem = "it may not be written"
        else:
            return
    except (OSError, ValueError) as error:  # a name too long, a loop of links; a NUL in it
        problem = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{path} cannot be written: {problem}. Give another place.")


def hash_file(path: str | Path) -> str:
    """The xxh3 (128 bits) of a file's bytes, always read anew; raises OSError."""
    hasher = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


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


def read_file(path: str | Path, remedy: str) -> bytes:
    """What a file of texts holds; raises UserError where it cannot be read, or holds zeros and
    white space alone."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            found = "a directory" if path.is_dir() else "a device or a pipe"
            raise UserError(f"{path}: found {found}, expected a file. {remedy}")
        content = path.read_bytes()
    except FileNotFoundError:
        found = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise UserError(f"{path}: {found}. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    if not content.strip(b"\0 \t\r\n"):
        found = f"{len(content):,} bytes without any text" if content else "an empty file"
        raise UserError(f"{path}: found {found}, expected its content. {remedy}")
    return content


def read_json(
    path: str | Path, remedy: str, kind: type = dict, fields: Mapping[str, Any] | None = None
) -> Any:
    """The JSON value in a file of ours, which has to be of a `kind`; `fields`: the types of values
    in an object.

    A type such as `int | None` is that of a value that may be null or absent. Names that are not
    among `fields` may have any value.

    Raises:
        UserError: there is none, it cannot be read, or it is something else; `remedy` says what to
        do then.
    """
    try:
        value = json.loads(read_file(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, or cut off ({error}). {remedy}") from error
    if type(value) is not kind:
        raise UserError(f"{path}: found {KINDS[type(value)]}, expected {KINDS[kind]}. {remedy}")
    require_fields(path, value, fields or {}, remedy)
    return value


def beside(file: Path, name: Any) -> Path:
    """The path of a `name` that stands in a file and means one in the same directory.

    Raises:
        UserError: it would lead elsewhere.
    """
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise UserError(
            f"{file}: found {name!r}, expected the name of a file in the same directory."
        )
    return file.parent / name


def require_fields(where: str | Path, value: dict, fields: Mapping[str, Any], remedy: str) -> None:
    """Raises UserError where an object's values are of other types than `fields` names; see
    `read_json`."""
    for name, expected in fields.items():
        kinds = get_args(expected) or (expected,)
        if type(value.get(name)) not in kinds:
            found = KINDS[type(value[name])] if name in value else "missing"
            wanted = " or ".join(KINDS[each] for each in kinds)
            raise UserError(f"{where}: {name} is {found}, expected {wanted}. {remedy}")


def json_lines(path: str | Path) -> Iterator[dict]:
    """The objects in a JSON Lines file of ours; lines that a killed process left unfinished are
    left out.

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


def append_json(path: str | Path, value: Any) -> None:
    """Add a value to a JSON Lines file of ours, on a line of its own also where the last one was
    cut off.

    Raises:
        OSError: it cannot be written.
    """
    with Path(path).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(value).encode() + b"\n")
