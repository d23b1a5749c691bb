"""What is kept between runs, and found again only where it is what was written.

    $MINIMIND_CACHE, or ~/.cache/minimind
        blocks/KEY/     packed rows, with sizes and hashes of the files in a manifest.json, which is written last
        clean/KEY/      cleaned data, with sizes and hashes of its shards in report.json
        world/          the embedded corpus
        hashes/         the hashes of large files, each valid until the file is touched
        chat_history    what was typed in chats

What does not fit its hash is made again. Where the directory cannot be used, a temporary one does
for this launch.
"""

import atexit
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import xxhash
from filelock import FileLock, Timeout

from minimind.common.errors import UserError
from minimind.common.files import (
    hash_file,
    read_json,
    sync_directory,
    sync_file,
    write_json,
    write_text,
)
from minimind.common.language import say

LARGE = 2**26  # bytes of a file that is not hashed again at every start
MANIFEST = "manifest.json"
REMEDY = "Set MINIMIND_CACHE to a directory that can be written and has space."
# The directory that stands for one that cannot be used, in this process
TEMPORARY: dict[str, Path] = {}


# Where


def chosen_directory() -> Path:
    """$MINIMIND_CACHE, or ~/.cache/minimind, whether it can be used or not.

    Raises:
        OSError, RuntimeError: there is no working directory to start from, or no home.
    """
    given = os.environ.get("MINIMIND_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "minimind").absolute()


def cache_directory(kind: str = "", kept: bool = False) -> Path:
    """A directory for prepared things of a `kind` that can be written: in $MINIMIND_CACHE or
    ~/.cache/minimind, else a temporary one, which is said once, shared by the processes of a launch
    on this machine and deleted at their end.

    Raises:
        UserError: there is neither; or no other than a temporary one, and what is written shall be
        `kept`.
    """
    chosen = os.environ.get("MINIMIND_CACHE") or "~/.cache/minimind"
    try:
        chosen = str(chosen_directory())
        directory = Path(chosen) / kind
        chosen.encode()  # pyarrow opens no path that is not UTF-8
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
        return directory
    except UnicodeError:
        reason = "its name is not UTF-8"
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
    if kept:
        raise UserError(f"{chosen}: nothing can be kept there ({reason}). {REMEDY}")
    with refusing(chosen):
        directory = _temporary_directory(chosen, reason) / kind
        directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def refusing(directory: Path | str) -> Iterator[None]:
    """A block that writes into a directory of the cache: what the disk refuses becomes one
    UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{directory}: nothing can be kept there ({_reason(error)}). {REMEDY}"
        ) from error


def _temporary_directory(chosen: str, reason: str) -> Path:
    """The directory in place of the chosen one; the processes that one launcher started here have
    the same."""
    if chosen in TEMPORARY:
        return TEMPORARY[chosen]
    if int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1) > 1:
        launch = f"{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
        directory = Path(tempfile.gettempdir()) / f"minimind-{os.getuid()}-{launch}"
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        if (
            not stat.S_ISDIR(status.st_mode)
            or status.st_uid != os.getuid()
            or status.st_mode & 0o022
        ):
            raise PermissionError(0, f"{directory} is not this user's alone")
    else:
        directory = Path(tempfile.mkdtemp(prefix="minimind-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    TEMPORARY[chosen] = directory
    if _speaks():
        say(
            f"notice: {chosen} cannot be used as the cache ({reason}). What is prepared lies in"
            f" {directory} and is deleted at the end. {REMEDY}",
            file=sys.stderr,
        )
    return directory


def _reason(error: Exception) -> str:
    """What the system says of an error; pyarrow puts more around it."""
    return os.strerror(error.errno) if getattr(error, "errno", None) else str(error)


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


@contextmanager
def lock(path: Path | str) -> Iterator[bool]:
    """One process at a time, where the file system has locks and this user may write the file;
    gives whether so.

    A killed process holds none. Without a lock several do the same work, and the first that is done
    wins.
    """
    # A soft one is held for ever by a process that was killed
    file = FileLock(path, fallback_to_soft=False)
    with ExitStack() as held:
        locked = False
        with suppress(OSError):
            try:
                held.enter_context(file.acquire(blocking=False))
            except Timeout:
                if _speaks():
                    say(
                        f"waiting for another process that prepares the same ({path})",
                        file=sys.stderr,
                    )
                held.enter_context(file)
            locked = True
        yield locked


# Hashes


class Dataset(Protocol):
    """Data that is not a file, such as a dataset of the Hub; its fingerprint changes with it."""

    fingerprint: str


class Contents:
    """What is in some files, or datasets of the Hub, when this is made: one `hash` over all, in
    their order."""

    def __init__(self, files: Iterable[Path | Dataset]):
        self.known = []  # of each file on the disk
        hashes = []
        for file in files:
            if not isinstance(file, Path):
                hashes.append(file.fingerprint)
                continue
            status = _status(file)
            hashes.append(file_hash(file))
            self.known.append((file, status, hashes[-1]))
        self.hash = _hash("\n".join(hashes))

    def check(self) -> None:
        """Raises UserError if a file was written to since; one of another owner or name alone is
        the same."""
        for file, status, digest in self.known:
            try:
                same = _status(file)[:2] == status[:2] and file_hash(file) == digest
            except UserError:
                same = False
            if not same:
                raise UserError(
                    f"{file}: changed while it was read, so nothing was kept of it. Run the command"
                    " again when nothing writes to the file."
                )


def content_hash(files: Iterable[Path | Dataset]) -> str:
    """One hash over the contents of some files, in their order; for a dataset of the Hub over its
    revision."""
    return Contents(files).hash


def file_hash(path: Path) -> str:
    """The xxh3 (128 bits) of a file's bytes; that of a large one is remembered until the file is
    touched.

    The time of the last change of status cannot be set back, unlike that of the last writing.
    Raises UserError.
    """
    status = _status(path)
    known, memory = " ".join(map(str, status)), None
    if status[0] >= LARGE:
        with suppress(OSError, RuntimeError):
            memory = chosen_directory() / "hashes" / _hash(os.path.realpath(path))
            remembered = re.fullmatch(rf"{known} ([0-9a-f]{{32}})\s*".encode(), memory.read_bytes())
            if remembered:
                return remembered[1].decode()
    try:
        digest = hash_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from None
    if memory:
        with suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text(memory, f"{known} {digest}\n")
    return digest


def _status(path: Path) -> tuple[int, int, int, int]:
    """Bytes, the times of the last writing and of the last change of status, the inode; raises
    UserError."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


# Entries


def find(kind: str, key: dict) -> tuple[Path, dict] | None:
    """What `find_or_build` gives, where it was built before and nothing of it has changed."""
    for place in places(kind):
        with suppress(UserError, OSError):
            return _opened(place / _name(key))
    return None


def find_or_build(kind: str, key: dict, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """The directory of the files that `build` writes for a `key`, and the facts that it returns.

    It is built once, beside its place, which it takes complete and on the disk; what is there and
    is not what was written is built again, which is said.

    Raises:
        UserError: it cannot be written, or what `build` raises; nothing of it is left then.
    """
    if found := find(kind, key):
        return found
    directory = cache_directory(kind) / _name(key)
    with refusing(directory), lock(f"{directory}.lock") as locked:
        if found := find(kind, key):  # built by the process that this one waited for
            return found
        discard(directory, _opened)
        if locked:
            for leftover in directory.parent.glob(f"{directory.name}.*.building"):
                shutil.rmtree(leftover, ignore_errors=True)
        building = Path(f"{directory}.{uuid4().hex[:8]}.building")
        building.mkdir()
        try:
            facts = build(building)
            _seal(building, key, facts)
            building.rename(directory)
            sync_directory(directory.parent)
        except OSError:
            with suppress(UserError, OSError):  # without a lock another process may have been first
                return _opened(directory)
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return directory, facts


def places(kind: str) -> Iterator[Path]:
    """Where things of a kind may lie: the chosen directory, also one that can only be read, and the
    one in use."""
    with suppress(OSError, RuntimeError):
        yield chosen_directory() / kind
    yield cache_directory(kind)


def _name(key: dict) -> str:
    return _hash(json.dumps(key, sort_keys=True))


def _seal(directory: Path, key: dict, facts: dict) -> None:
    """Bring the files of a directory to the disk and note what they are."""
    files = {}
    for path in sorted(directory.iterdir()):
        sync_file(path)
        files[path.name] = {"size": path.stat().st_size, "xxh3_128": file_hash(path)}
    manifest = {"key": key, "facts": facts, "files": files}
    write_json(directory / MANIFEST, {**manifest, "checksum": _name(manifest)})


def _opened(directory: Path) -> tuple[Path, dict]:
    """An entry that is what was written; raises UserError or OSError for another, and for none."""
    manifest = read_json(directory / MANIFEST, "")
    checksum = manifest.pop("checksum", None)
    if checksum != _name(manifest) or _name(manifest["key"]) != directory.name:
        raise UserError(f"{directory / MANIFEST} is not what was written")
    for name, expected in manifest["files"].items():
        check_file(directory / name, expected["size"], expected["xxh3_128"])
    return directory, manifest["facts"]


def check_file(path: Path, size: int, digest: str) -> None:
    """Raises UserError where a file is not of this size and hash, OSError where that cannot be
    seen."""
    if not path.is_file():
        raise UserError(f"{path} is gone")
    if (found := path.stat().st_size) != size:
        raise UserError(f"{path} has {found:,} bytes, was written with {size:,}")
    if file_hash(path) != digest:
        raise UserError(f"{path} is not what was written: it has another hash")


def discard(directory: Path, check: Callable[[Path], Any]) -> None:
    """Remove what stands in the place of an entry and what `check` refuses with an error, which is
    said.

    Raises:
        OSError: it cannot be removed.
    """
    if not os.path.lexists(directory):
        return
    try:
        check(directory)
    except (UserError, OSError) as problem:
        say(f"notice: {str(problem).strip().rstrip('.')}: preparing it again", file=sys.stderr)
        remove(directory)


def remove(path: Path) -> None:
    """Delete a directory, a file or a link of ours; raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
