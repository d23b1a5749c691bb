"""The same cleaning as datatrove pipelines, for several machines (the extra `data-cluster`).

`stages` returns pipelines to run one after the other, each with any of datatrove's executors
(Local, Slurm, Ray, Jobs); `clean_with_datatrove` runs them with the local one. Files are read by
this project's readers, and the steps for single rows are those of `minimind clean` with the same
result. The dedup steps are datatrove's, which work through files rather than memory, and differ:

- exact_dedup: datatrove's exact dedup over the hash of the same reduced text; of equal rows the
  first one in the order of ranks stays.
- near_dedup: datatrove's MinHash over the same character n-grams, with as many bands and values in
  a band; it clusters what shares a band without verifying the candidates, so it removes more near
  the threshold.

Ranks take the input files in turn, so give at least as many files as tasks. All tasks must see the
same file system.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimind.cleaning.counts import Counts
from minimind.cleaning.duplicates import ExactDedup, NearDedup
from minimind.cleaning.extras import require
from minimind.cleaning.procedure import Procedure, load_procedure
from minimind.cleaning.row_texts import RowTexts, check_row, split_row
from minimind.cleaning.segments import Item, run_segment, segments_of, to_line
from minimind.common.errors import BadRowError
from minimind.common.files import write_bytes
from minimind.data.files import parsables
from minimind.data.markers import Boundaries
from minimind.data.sources import expand

require("datatrove", "data-cluster")

from datatrove.data import Document, DocumentsPipeline  # noqa: E402
from datatrove.executor import LocalPipelineExecutor  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402
from datatrove.pipeline.dedup.exact_dedup import (  # noqa: E402
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (  # noqa: E402
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig  # noqa: E402

HASH = HashConfig(precision=64, hash_fc="sha1")  # datatrove 0.10's xxhash needs a version below 4


class ReadRows(PipelineStep):
    """Files of any format -> documents that carry their row; bad rows are counted and left
    out."""

    type, name = "📖 - READER", "minimind rows"

    def __init__(self, files: Sequence[str]):
        super().__init__()
        self.files = [str(file) for file in files]

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        """The documents of every `world_size`-th file from `rank` on."""
        for file in expand(self.files)[rank::world_size]:
            for place, parse in parsables(file, "file", None):
                try:
                    rows = split_row(check_row(parse()), Boundaries())
                except BadRowError:
                    self.stat_update("bad")
                else:
                    self.stat_update("rows")
                    for row in rows:
                        yield Document(
                            text=RowTexts(row).all_text, id=f"{file}:{place}", metadata={"row": row}
                        )


class ReadShard(PipelineStep):
    """What `WriteShard` of the same rank wrote."""

    type, name = "📖 - READER", "minimind shard"

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = str(directory)

    def run(
        self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        """The documents of one shard, in their order."""
        with _shard(self.directory, rank).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                row = json.loads(line)
                yield Document(
                    text=RowTexts(row).all_text, id=f"{rank}/{number}", metadata={"row": row}
                )


class WriteShard(PipelineStep):
    """Rows -> `data-RANK.jsonl`, complete or not at all; a `final` one only if it has a row."""

    type, name = "💽 - WRITER", "minimind shard"

    def __init__(self, directory: Path, final: bool):
        super().__init__()
        self.directory, self.final = str(directory), final

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Passes the documents on."""
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        lines = []
        for document in data:
            lines.append(to_line(document.metadata["row"]))
            yield document
        if lines or not self.final:  # an empty file would be refused as data
            write_bytes(_shard(self.directory, rank), b"".join(lines))


def _shard(directory: str, rank: int) -> Path:
    return Path(directory) / f"data-{rank:05d}.jsonl"


class RunSteps(PipelineStep):
    """The steps for single rows between two dedup steps; removals are counted by step and
    reason."""

    type, name = "🔻 - FILTER", "minimind steps"

    def __init__(self, procedure: Procedure, segment: int):
        super().__init__()
        self.procedure, self.segment = procedure.as_dict(), segment

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """The documents that stay, changed."""
        procedure = Procedure.from_dict(self.procedure)
        procedure.prepare()
        counts = Counts()
        for document in data:
            item = Item(0, document.id, document.metadata["row"])
            with self.track_time():
                result = run_segment(procedure, self.segment, [item], as_lines=False)
            counts.merge(result.counts, 0)
            for item in result.items:
                document.text, document.metadata["row"] = RowTexts(item.row).all_text, item.row
                yield document
        for label, step in counts.steps.items():
            for reason, count in step.reasons.items():
                self.stat_update(f"{label}: {reason}", value=count)


class CharacterSignature(MinhashDedupSignature):
    """datatrove's MinHash signature over our character n-grams instead of words, which Chinese does
    not separate."""

    def __init__(self, output_folder: str, config: MinhashConfig, step: NearDedup):
        # Not the parent's own: that loads a word tokenizer, which is another dependency.
        PipelineStep.__init__(self)
        from datatrove.io import get_datafolder
        from datatrove.utils.hashing import create_hash_func

        self.output_folder, self.config, self.step = get_datafolder(output_folder), config, step
        self.num_hashes = config.num_buckets * config.hashes_per_bucket
        self._parameters, self._hash_func = None, create_hash_func(config.hash_config)
        self.language, self.skip_existing_sigs = "", False

    def get_shingles(self, text: str) -> np.ndarray:
        """(n-grams, 1) of 64-bit hashes."""
        hashes = [self._hash_func(shingle) for shingle in self.step.shingles(text)]
        return np.fromiter(hashes, dtype=np.uint64).reshape(-1, 1)


class ClusterJob(NamedTuple):
    """A pipeline, and the number of tasks it must be run with."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int


def stages(
    files: Sequence[str],
    working: str | Path,
    output: str | Path,
    recipe: str | Path | Procedure,
    tasks: int,
) -> list[ClusterJob]:
    """The jobs of a recipe, in their order; each starts when the one before is done.

    Args:
        files: files, directories and globs.
        working: a directory for what lies between the jobs; can be removed afterwards.
        output: gets one `data-RANK.jsonl` for each task.
        recipe: a YAML file, or a Procedure.
        tasks: parts the work is cut into.

    Raises:
        UserError: unusable files or recipe.
    """
    procedure, working = load_procedure(recipe), Path(working)
    jobs: list[ClusterJob] = []
    start: list[PipelineStep] = [ReadRows(list(map(str, expand(files))))]
    for number, segment in enumerate(segments_of(procedure)):
        is_last = segment.dedup is None
        rows = Path(output) if is_last else working / f"rows-{number}"
        pipeline = [*start, RunSteps(procedure, number), WriteShard(rows, is_last)]
        jobs.append(ClusterJob(f"rows-{number}", pipeline, tasks))
        if not is_last:
            label, step = segment.dedup
            dedup_jobs = _exact_jobs if isinstance(step, ExactDedup) else _near_jobs
            between, keep = dedup_jobs(label, step, rows, working / label, tasks)
            jobs += between
            start = [ReadShard(rows), keep]
    return jobs


def _exact_jobs(label: str, step: ExactDedup, rows: Path, folder: Path, tasks: int):
    def content(document: Document) -> str:
        return f"{step.key(document.text):032x}"

    config = ExactDedupConfig(content_getter=content, hash_config=HASH)
    signatures, duplicates = str(folder / "signatures"), str(folder / "duplicates")
    sign = [ReadShard(rows), ExactDedupSignature(signatures, config)]
    find = [ExactFindDedups(signatures, duplicates, config)]
    jobs = [ClusterJob(f"{label}-1", sign, tasks), ClusterJob(f"{label}-2", find, 1)]
    return jobs, ExactDedupFilter(duplicates, config)


def _near_jobs(label: str, step: NearDedup, rows: Path, folder: Path, tasks: int):
    config = MinhashConfig(
        n_grams=step.ngram,
        num_buckets=step.bands,
        hashes_per_bucket=step.num_perm // step.bands,
        hash_config=HASH,
    )
    signatures, buckets, removed = (str(folder / n) for n in ("signatures", "buckets", "removed"))
    sign = [ReadShard(rows), CharacterSignature(signatures, config, step)]
    band = [MinhashDedupBuckets(signatures, buckets, config=config)]
    cluster = [MinhashDedupCluster(buckets, removed, config=config)]
    jobs = [
        ClusterJob(f"{label}-1", sign, tasks),
        ClusterJob(f"{label}-2", band, step.bands),
        ClusterJob(f"{label}-3", cluster, 1),
    ]
    return jobs, MinhashDedupFilter(removed)


def clean_with_datatrove(
    files: Sequence[str],
    working: str | Path,
    output: str | Path,
    recipe: str | Path | Procedure,
    tasks: int = 1,
    workers: int = -1,
) -> None:
    """Run the jobs on this machine, `workers` tasks at a time; finished tasks are not run again."""
    for job in stages(files, working, output, recipe, tasks):
        logs = str(Path(working) / "logs" / job.name)
        LocalPipelineExecutor(job.pipeline, job.tasks, workers, logging_dir=logs).run()
