"""Write a directory so that it appears complete or not at all. Loads no torch."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minimind.common.errors import UserError
from minimind.common.files import sync_files
from minimind.common.locks import lock, unlock

MARK = ".minimind"  # marks what a killed process left behind as ours


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a hidden directory beside `path` to write into; on success it becomes `path`, on
    failure it is removed.

    Raises:
        UserError: `path` exists and is not an empty directory, or cannot be written.
    """
    path = Path(path).absolute()
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".{path.name}.partial")
    with ExitStack() as cleanup:
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(
                    f"{path} exists and is not empty. Give a directory that does not exist yet, or"
                    " remove it."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            cleanup.callback(unlock, lock(path.with_name(f".{path.name}.lock"), str(path)))
            if os.path.lexists(partial) and not _is_leftover(partial):
                raise UserError(
                    f"{partial} is in the way, and not one of ours. Move it away, or give another"
                    " directory."
                )
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
            (partial / MARK).touch()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error

        yield partial
        sync_files(partial)
        partial.replace(path)
        (path / MARK).unlink()


def _is_leftover(partial: Path) -> bool:
    """Whether a directory holds our mark, which is the first thing written into it, or nothing."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return os.path.lexists(partial / MARK) or not any(partial.iterdir())
