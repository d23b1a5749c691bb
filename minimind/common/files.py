"""Our own small files: written atomically and to the disk, read with one message about a problem.

Loads no torch.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import xxhash

from minimind.common.errors import UserError

# JSON's kinds of values, by their Python types
KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
KINDS |= {int: "a whole number", float: "a number", type(None): "null"}


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that it appears complete or not at all, even after a power loss.

    Raises:
        OSError: it cannot be written; an earlier file is unchanged.
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
    """`write_bytes` for text; what UTF-8 cannot encode, such as a lone surrogate, is escaped."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """`write_text` for a value as JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def sync_file(path: str | Path) -> None:
    """Wait until a closed file is on the disk; raises OSError."""
    with Path(path).open("r+b") as file:
        os.fsync(file.fileno())


def sync_files(directory: Path) -> None:
    """Wait until all files of a directory, which a library wrote, are on the disk."""
    for path in (directory, *directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        elif path.is_file():
            sync_file(path)


def check_output(
    path: str | Path, directory: bool = False, inputs: Iterable[str | Path] = ()
) -> None:
    """Check that a file, or a `directory` of files, can be written, before its content is computed.

    Raises:
        UserError: something else is there or in the way, it may not be written, no file can have
        such a name, or it is one of the `inputs`, which would be lost.
    """
    output = Path(path).expanduser().absolute()
    try:
        # `exists` raises for an impossible name; the second is the file's until it is complete.
        for name in (output.name, f".{output.name}.partial"):
            output.with_name(name).exists()
        missing = [each for each in (output, *output.parents) if not each.exists()]
        nearest = missing[-1].parent if missing else output if directory else output.parent
        if missing and output.is_symlink():
            problem = "it is a link to nothing"
        elif not nearest.is_dir():
            problem = f"{nearest} is not a directory"
        elif not os.access(nearest, os.W_OK | os.X_OK):
            problem = f"{nearest} may not be written"
        elif output.is_dir() and not directory:
            problem = "it is a directory"
        elif output.exists() and any(
            each.exists() and each.samefile(output) for each in map(Path, inputs)
        ):
            problem = "it is read by this command, and would be overwritten"
        elif output.exists() and not os.access(output, os.W_OK):
            problem = "it may not be written"
        else:
            return
    except (OSError, ValueError) as error:  # too long a name, a loop of links; a NUL
        problem = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{path} cannot be written: {problem}. Give another path.")


def hash_file(path: str | Path) -> str:
    """The xxh3 (128 bits) of a file's bytes; raises OSError."""
    hasher = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk, where the file system can do that."""
    with suppress(OSError):  # Windows opens no directories
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(path: str | Path, remedy: str) -> bytes:
    """The content of a text file; raises UserError if it cannot be read, or holds only zeros and
    white space."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait
            problem = "a directory" if path.is_dir() else "a device or a pipe"
            raise UserError(f"{path}: found {problem}, expected a file. {remedy}")
        content = path.read_bytes()
    except FileNotFoundError:
        problem = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise UserError(f"{path}: {problem}. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    if not content.strip(b"\0 \t\r\n"):
        problem = f"{len(content):,} bytes without any text" if content else "an empty file"
        raise UserError(f"{path}: found {problem}, expected its content. {remedy}")
    return content


def read_json(
    path: str | Path, remedy: str, kind: type = dict, fields: Mapping[str, Any] | None = None
) -> Any:
    """The JSON value in a file of ours.

    Args:
        remedy: the sentence of an error that says what to do.
        kind: the type of the value.
        fields: types of an object's values, such as `int | None` for one that may be null or
            absent. Other names may have any value.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds something else.
    """
    try:
        value = json.loads(read_file(path, remedy))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, or cut off ({error}). {remedy}") from error
    if type(value) is not kind:
        raise UserError(f"{path}: found {KINDS[type(value)]}, expected {KINDS[kind]}. {remedy}")
    require_fields(path, value, fields or {}, remedy)
    return value


def sibling_path(file: Path, name: Any) -> Path:
    """The path of the file in `file`'s directory that `file` names.

    Raises:
        UserError: the name leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise UserError(
            f"{file}: found {name!r}, expected the name of a file in the same directory."
        )
    return file.parent / name


def require_fields(where: str | Path, value: dict, fields: Mapping[str, Any], remedy: str) -> None:
    """Raise UserError if an object's values are not of the types in `fields`; see `read_json`."""
    for name, type_ in fields.items():
        types = get_args(type_) or (type_,)
        if type(value.get(name)) not in types:
            actual = KINDS[type(value[name])] if name in value else "missing"
            expected = " or ".join(KINDS[each] for each in types)
            raise UserError(f"{where}: {name} is {actual}, expected {expected}. {remedy}")


def json_lines(path: str | Path) -> Iterator[dict]:
    """The objects in a JSON Lines file of ours, without lines that a killed process left
    unfinished.

    Only a line feed ends a line: texts may contain U+2028 and the like. A file that does not exist
    has no lines; raises OSError for one that cannot be read.
    """
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        for line in file:
            entry = None
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def write_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """Write the rows to a JSON Lines file, complete or not at all; raises OSError."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_json(path: str | Path, value: Any) -> None:
    """Add a value to a JSON Lines file of ours, on a new line even if the last one was cut off;
    raises OSError."""
    with Path(path).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(value).encode() + b"\n")
