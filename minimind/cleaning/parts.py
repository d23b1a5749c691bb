"""The finished parts of a cleaning on disk, from which an interrupted one resumes.

Part n is a shard, data-n.jsonl. Until all are finished they lie in a hidden directory beside the
destination, .NAME.partial, which becomes the destination by one rename:

    data-00000.jsonl         the rows of a part
    .state/key               the input and the procedure, hashed
    .state/00000-0.npz       what the first dedup step remembers of the part's rows
    .state/00000.json        size and hash of the shard, bad rows, and the counts so far
"""

import io
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from minimind.cleaning.counts import Counts
from minimind.cleaning.steps import Index
from minimind.common.errors import UserError
from minimind.common.files import sync_directory, sync_file, sync_files, write_json, write_text
from minimind.common.language import translated

logger = logging.getLogger(__name__)


class BadRowsOfPart(NamedTuple):
    """The bad rows of a part: their number, and place and problem of the first of them."""

    count: int = 0
    first: Sequence[tuple[str, str]] = ()


class Parts:
    """The parts of one cleaning; `shards` are the facts of those that are finished."""

    def __init__(self, destination: Path):
        self.destination = destination
        self.partial = destination.with_name(f".{destination.name}.partial")
        self.state = self.partial / ".state"
        self.shards: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        self.rows, self.bytes, self.hasher = 0, 0, xxhash.xxh3_128()

    def shard(self, part: int) -> Path:
        """The file of a part's rows."""
        return self.partial / f"data-{part:05d}.jsonl"

    def open(self, key: str) -> None:
        """Keep the directory of the same cleaning; delete that of another one.

        Raises:
            UserError: the directory holds something else.
        """
        manifest = self.state / "key"
        if manifest.is_file() and manifest.read_bytes() == key.encode():
            return
        if self.partial.exists():
            is_ours = self.state.exists() or not any(self.partial.iterdir())
            if self.partial.is_symlink() or not is_ours:
                raise UserError(
                    f"{self.partial} is in the way, and not of ours. Move it away, or give another"
                    " directory."
                )
            logger.warning(translated("another recipe or input was begun before: starting over"))
        self.remove()
        self.state.mkdir(parents=True)
        write_text(manifest, key)

    def restore(self, indexes: Sequence[Index]) -> tuple[Counts, BadRowsOfPart] | None:
        """Restore the next finished part: fill the `indexes` of the dedup steps, and return the
        counts so far and the bad rows; None if the part is not there, or damaged."""
        part = len(self.shards)
        try:
            facts = json.loads((self.state / f"{part:05d}.json").read_bytes())
            counts, count = Counts.from_dict(facts["counts"]), int(facts["bad"])
            first = [(str(where), str(problem)) for where, problem in facts["first_bad"]]
            if xxhash.xxh3_128_hexdigest(self.shard(part).read_bytes()) != facts["shard"]["hash"]:
                return None
            files = [self.state / f"{part:05d}-{number}.npz" for number in range(len(indexes))]
            remembered = [dict(np.load(io.BytesIO(file.read_bytes()))) for file in files]
        except Exception:  # whatever it holds: the part is cleaned again
            return None
        for index, arrays in zip(indexes, remembered, strict=True):
            index.restore(arrays)
        self.shards.append(facts["shard"])
        return counts, BadRowsOfPart(count, first)

    def write(self, lines: Sequence[bytes]) -> None:
        """Add rows to the part that is being written."""
        content = b"".join(lines)
        with building(self.shard(len(self.shards))).open("ab" if self.rows else "wb") as file:
            file.write(content)
        self.rows += len(lines)
        self.bytes += len(content)
        self.hasher.update(content)

    def finish(
        self, remembered: Sequence[dict[str, np.ndarray]], bad: BadRowsOfPart, counts: Counts
    ) -> None:
        """Finish the part that is being written."""
        part = len(self.shards)
        self.shards.append(
            {"rows": self.rows, "bytes": self.bytes, "hash": self.hasher.hexdigest()}
        )
        self._begin()
        _complete(self.shard(part))
        for number, arrays in enumerate(remembered):
            path = self.state / f"{part:05d}-{number}.npz"
            with building(path).open("wb") as file:
                np.savez(file, **arrays)
            _complete(path)
        # Written last, since it tells that everything else of the part is there.
        facts = {"shard": self.shards[-1], "bad": bad.count, "first_bad": bad.first}
        write_json(self.state / f"{part:05d}.json", {**facts, "counts": counts.as_dict()})

    def publish(self, report: dict[str, Any], page: str) -> None:
        """Turn the directory into the destination, with its report."""
        write_json(self.partial / "report.json", report)
        write_text(self.partial / "report.html", page)
        for part, shard in enumerate(self.shards):
            if not shard["rows"]:  # an empty file would be refused as data
                self.shard(part).unlink()
        state = self.destination.with_name(f".{self.destination.name}.state")
        shutil.rmtree(state, ignore_errors=True)
        self.state.replace(state)
        sync_files(self.partial)
        self.partial.replace(self.destination)
        sync_directory(self.destination.parent)
        shutil.rmtree(state)

    def remove(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.partial, ignore_errors=True)


def building(path: Path) -> Path:
    """Where a file lies until it is complete."""
    return Path(f"{path}.building")


def _complete(path: Path) -> None:
    sync_file(building(path))
    building(path).replace(path)
