"""The cache: what is kept between runs, and used again only if it is unchanged.

    $MINIMIND_CACHE, or ~/.cache/minimind
        blocks/KEY/     packed rows, with sizes and hashes of the files in a manifest.json, written
                        last
        chats/KEY/      tokenised conversations or preference pairs, likewise
        references/KEY/ log-probabilities of DPO's reference model, with a manifest.json as well
        clean/KEY/      cleaned data, with sizes and hashes of its shards in report.json
        exports/KEY/    served models in the stock layout, with a manifest.json
        world/          the embedded corpus
        wllama/         the npm package of llama.cpp for the browser
        hashes/         the hashes of large files, each valid until the file is touched
        chat_history    the messages typed in chats

What does not match its hash is prepared again. Where the directory cannot be used, a temporary one
takes its place for this launch.
"""

import atexit
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import xxhash

from minimind.common.errors import UserError, is_local_main_process
from minimind.common.files import (
    hash_file,
    read_json,
    sync_directory,
    sync_file,
    write_json,
    write_text,
)
from minimind.common.language import say
from minimind.common.locks import wait_for_lock

LARGE = 2**26  # bytes of a file that is not hashed again at every start
MANIFEST = "manifest.json"
REMEDY = "Set MINIMIND_CACHE to a directory that can be written and has space."
# This process's temporary directory for each configured one that cannot be used
TEMPORARY: dict[str, Path] = {}


# Directories


def configured_directory() -> Path:
    """$MINIMIND_CACHE, or ~/.cache/minimind, usable or not.

    Raises:
        OSError, RuntimeError: there is no working directory to start from, or no home.
    """
    path = os.environ.get("MINIMIND_CACHE")
    return (Path(path).expanduser() if path else Path.home() / ".cache" / "minimind").absolute()


def cache_directory(kind: str = "", permanent: bool = False) -> Path:
    """A writable directory for entries of a `kind`: in $MINIMIND_CACHE or ~/.cache/minimind, else a
    temporary one.

    The temporary directory is announced once, shared by the processes of a launch on this machine
    and deleted when they end.

    Raises:
        UserError: there is neither; or only a temporary one, and a `permanent` one is needed.
    """
    root = os.environ.get("MINIMIND_CACHE") or "~/.cache/minimind"
    try:
        root = str(configured_directory())
        directory = Path(root) / kind
        root.encode()  # pyarrow opens no path that is not UTF-8
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
        return directory
    except UnicodeError:
        reason = "its name is not UTF-8"
    except (OSError, RuntimeError) as error:
        reason = _system_message(error)
    if permanent:
        raise UserError(f"{root}: nothing can be kept there ({reason}). {REMEDY}")
    with report_cache_errors(root):
        directory = _temporary_directory(root, reason) / kind
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def shown(directory: Path) -> Path:
    """A directory as messages name it: without the working directory, if it lies in that."""
    with suppress(ValueError, OSError):
        return directory.relative_to(Path.cwd())
    return directory


@contextmanager
def report_cache_errors(directory: Path | str) -> Iterator[None]:
    """Turn an OSError in a block that writes into a directory of the cache into one UserError."""
    try:
        yield
    except OSError as error:
        reason = _system_message(error)
        raise UserError(f"{directory}: nothing can be kept there ({reason}). {REMEDY}") from error


def _temporary_directory(root: str, reason: str) -> Path:
    """The directory in place of an unusable root; the processes of one launcher here share it."""
    if root in TEMPORARY:
        return TEMPORARY[root]
    if int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1) > 1:
        launch = f"{os.getppid()}-{os.environ.get('MASTER_PORT', '')}"
        directory = Path(tempfile.gettempdir()) / f"minimind-{os.getuid()}-{launch}"
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not is_ours or status.st_mode & 0o022:
            raise PermissionError(0, f"{directory} is not this user's alone")
    else:
        directory = Path(tempfile.mkdtemp(prefix="minimind-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    TEMPORARY[root] = directory
    if is_local_main_process():
        say(
            f"notice: {root} cannot be used as the cache ({reason}). Prepared data goes to"
            f" {directory} and is deleted at the end. {REMEDY}",
            file=sys.stderr,
        )
    return directory


def _system_message(error: Exception) -> str:
    """The system's message for an error, without what pyarrow puts around it."""
    return os.strerror(error.errno) if getattr(error, "errno", None) else str(error)


# Hashes


class Dataset(Protocol):
    """Data that is not a file, such as a dataset of the Hub; its fingerprint changes with it."""

    fingerprint: str


class Contents:
    """The contents of files, or datasets of the Hub, at this moment: one `hash` over all, in their
    order."""

    def __init__(self, files: Iterable[Path | Dataset]):
        self.known = []  # file, status and hash of each file on the disk
        hashes = []
        for file in files:
            if not isinstance(file, Path):
                hashes.append(file.fingerprint)
                continue
            status = _status(file)
            hashes.append(remembered_hash(file))
            self.known.append((file, status, hashes[-1]))
        self.hash = _hash("\n".join(hashes))

    def check(self) -> None:
        """Raise UserError if a file was written to since; a change of its owner or links alone does
        not count."""
        for file, status, digest in self.known:
            try:
                unchanged = _status(file)[:2] == status[:2] and remembered_hash(file) == digest
            except UserError:
                unchanged = False
            if not unchanged:
                raise UserError(
                    f"{file}: changed while it was read, so nothing of it was kept. Run the command"
                    " again when nothing is writing to the file."
                )


def content_hash(files: Iterable[Path | Dataset]) -> str:
    """One hash over the contents of files, in their order, and the revisions of datasets of the
    Hub."""
    return Contents(files).hash


def join_hashes(hashes: Sequence[str]) -> str | None:
    """One hash over those of several sources; that of one as it is, None for none."""
    if len(hashes) < 2:
        return hashes[0] if hashes else None
    return xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def remembered_hash(path: Path) -> str:
    """The hash of a file as `hash_file` computes it; that of a large file is remembered until the
    file is touched.

    What shows a touch is the time of the last status change, which, unlike that of the last write,
    cannot be set back. Raises UserError.
    """
    status = _status(path)
    known, memory = " ".join(map(str, status)), None
    if status[0] >= LARGE:
        with suppress(OSError, RuntimeError):
            memory = configured_directory() / "hashes" / _hash(os.path.realpath(path))
            entry = re.fullmatch(rf"{known} ([0-9a-f]{{32}})\s*".encode(), memory.read_bytes())
            if entry:
                return entry[1].decode()
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
    """Bytes, times of the last write and of the last status change, inode; raises UserError."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


# Entries


def find(kind: str, key: dict) -> tuple[Path, dict] | None:
    """The result of `find_or_build` if it was built before and is unchanged."""
    for location in cache_locations(kind):
        with suppress(UserError, OSError):
            return _open_entry(location / _entry_name(key))
    return None


def find_or_build(kind: str, key: dict, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """The directory of the files that `build` writes for a `key`, and the facts that it returns.

    They are built once, in a directory that gets its name when it is complete and on the disk. An
    entry that is not what was written is built again, with a notice.

    Raises:
        UserError: it cannot be written, or what `build` raises; nothing of it is left then.
    """
    if entry := find(kind, key):
        return entry
    directory = cache_directory(kind) / _entry_name(key)
    with report_cache_errors(directory), wait_for_lock(f"{directory}.lock") as locked:
        if entry := find(kind, key):  # built by the process that this one waited for
            return entry
        remove_invalid(directory, _open_entry)
        if locked:
            for leftover in directory.parent.glob(f"{directory.name}.*.building"):
                shutil.rmtree(leftover, ignore_errors=True)

        building = Path(f"{directory}.{uuid4().hex[:8]}.building")
        building.mkdir()
        try:
            facts = build(building)
            _write_manifest(building, key, facts)
            building.rename(directory)
            sync_directory(directory.parent)
        except OSError:
            with suppress(UserError, OSError):  # without a lock another process may have been first
                return _open_entry(directory)
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return directory, facts


def cache_locations(kind: str) -> Iterator[Path]:
    """The directories that may hold entries of a kind: the configured one, which may be read-only,
    and the one in use."""
    with suppress(OSError, RuntimeError):
        yield configured_directory() / kind
    yield cache_directory(kind)


def _entry_name(key: dict) -> str:
    return _hash(json.dumps(key, sort_keys=True))


def _write_manifest(directory: Path, key: dict, facts: dict) -> None:
    """Bring the files of a directory to the disk and record their sizes and hashes."""
    files = {}
    for path in sorted(directory.iterdir()):
        sync_file(path)
        files[path.name] = {"size": path.stat().st_size, "xxh3_128": remembered_hash(path)}
    manifest = {"key": key, "facts": facts, "files": files}
    write_json(directory / MANIFEST, {**manifest, "checksum": _entry_name(manifest)})


def _open_entry(directory: Path) -> tuple[Path, dict]:
    """An entry that is what was written; raises UserError or OSError for another, or none."""
    manifest = read_json(directory / MANIFEST, "")
    checksum = manifest.pop("checksum", None)
    if checksum != _entry_name(manifest) or _entry_name(manifest["key"]) != directory.name:
        raise UserError(f"{directory / MANIFEST} is not what was written")
    for name, expected in manifest["files"].items():
        check_file(directory / name, expected["size"], expected["xxh3_128"])
    return directory, manifest["facts"]


def check_file(path: Path, size: int, digest: str) -> None:
    """Raise UserError if a file lacks this size or hash, OSError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} is gone")
    if (actual := path.stat().st_size) != size:
        raise UserError(f"{path} has {actual:,} bytes, was written with {size:,}")
    if remembered_hash(path) != digest:
        raise UserError(f"{path} is not what was written: it has another hash")


def remove_invalid(path: Path, check: Callable[[Path], Any]) -> None:
    """Remove whatever is at an entry's path if `check` raises an error for it, with a notice.

    Raises:
        OSError: it cannot be removed.
    """
    if not os.path.lexists(path):
        return
    try:
        check(path)
    except (UserError, OSError) as problem:
        say(f"notice: {str(problem).strip().rstrip('.')}: preparing it again", file=sys.stderr)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
