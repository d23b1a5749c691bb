"""Documents -> packed rows on disk, prepared once and found again.

    files -> documents -> held out or not -> ids, each document ended by EOS -> rows -> Arrow files
                          held_out.py        block_writer.py                   packing.py

The files are mapped into memory, so a corpus may be larger than it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.common.cache import Contents, find_or_build, join_hashes, shown
from minimind.common.errors import UserError
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process
from minimind.data.block_writer import BlockWriter
from minimind.data.columns import Columns
from minimind.data.files import read_documents
from minimind.data.held_out import HoldOut
from minimind.data.markers import Boundaries
from minimind.data.mixing import (
    add_counts,
    epoch_rows,
    parse_sources,
    source_facts,
)
from minimind.data.sources import expand, total_size
from minimind.tokenizer import token_byte_lengths, tokenizer_hash
from minimind.tokenizer.encoding import DocumentEncoder, WrongIdsError

FORMAT_VERSION = 3  # part of the cache key: raise it when the same input results in other rows
# Options of the data that decide the rows
DECISIVE = ("eval_ratio", "max_eval_rows", "on_bad_rows", "text_unit", "boundary_markers")
DECISIVE += ("columns", "unread_columns")
EARLY = 10_000  # rows after which unread columns stop the preparation, not only at its end


class Blocks(NamedTuple):
    """Packed rows on disk. `facts`: files, documents, tokens, dropped tokens, of both parts."""

    train: Dataset
    eval: Dataset | None
    facts: dict


class Preparation(NamedTuple):
    """What is to be prepared: the files of each source, and the `key` of everything that decides
    the rows (contents of the files, tokenizer, options)."""

    key: dict
    sources: list
    files: list[list]
    held_out: list[list]
    contents: list[Contents]


def preparation(data_args, tokenizer: PreTrainedTokenizerFast, **packing) -> Preparation:
    """Return what `load_blocks` prepares or finds.

    Raises:
        UserError: the tokenizer has no end token, or `expand` or `parse_sources` refuses the files.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token, so documents cannot be separated. Name one of its"
            " tokens as eos_token in tokenizer_config.json."
        )
    sources = parse_sources(data_args.train_files, data_args.mixing_temperature)
    files = [data_args.expand(source.paths) for source in sources]
    held_out = [expand([word]) for word in data_args.eval_files or ()]
    contents = [Contents(paths) for paths in (*files, *held_out)]
    hashes = [each.hash for each in contents]
    options = {**packing, **{name: getattr(data_args, name) for name in DECISIVE}}
    if held_out:
        options["eval_ratio"] = 0.0
    # The hash of a tokenizer does not depend on which of its tokens is the end token
    options["eos_token_id"] = tokenizer.eos_token_id
    key = {
        "version": FORMAT_VERSION,
        "files": {"train": hashes[: len(files)], "eval": hashes[len(files) :]},
        "tokenizer": tokenizer_hash(tokenizer),
        "options": options,
    }
    return Preparation(key, sources, files, held_out, contents)


def load_blocks(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    packing_strategy: str = "wrapped",
    document_mask: bool = False,
    seed: int = 42,
) -> Blocks:
    """Return the packed rows of documents, found by the content of files, tokenizer and options, or
    prepared.

    Of several processes, the first prepares under a file lock and the others find the result, so
    that none waits in a collective operation. Damaged rows are prepared again; see cache.py. The
    sources are mixed after the preparation, so that other weights need no new one.

    Raises:
        UserError: see `files.read_documents`, `mixing.parse_sources` and `cache.find_or_build`;
            there is too little text for one row; a file changed while it was read.
    """
    packing = {
        "block_size": block_size,
        "packing_strategy": packing_strategy,
        "document_mask": document_mask,
    }
    key, sources, files, held_out, contents = preparation(data_args, tokenizer, **packing)

    def build(directory: Path) -> dict:
        arguments = directory, files, held_out, tokenizer, key["options"]
        try:
            facts = _prepare(*arguments)
        except WrongIdsError as error:
            say(f"{error}; beginning again with tokenizers alone")
            facts = _prepare(*arguments, fast=False)
        for each in contents:
            each.check()
        return facts

    directory, prepared = find_or_build("blocks", key, build)
    train = [_open(directory / f"train-{index}.arrow") for index in range(len(files))]
    rows = concatenate_datasets(train)
    counts, mixture = epoch_rows(data_args, sources, [len(dataset) for dataset in train], seed)
    if mixture is not None:
        rows = rows.select(mixture)
    evaluation = concatenate_datasets(
        [_open(directory / f"eval-{index}.arrow") for index in range(len(prepared["eval_sources"]))]
    ).with_format("numpy")

    # The same content may be in other files today
    facts = {}
    for part, groups in (("train", files), ("eval", held_out)):
        paths = [str(path) for paths in groups for path in paths]
        facts[part] = {"files": paths, "hash": join_hashes(key["files"][part]), **prepared[part]}
    facts["train"] |= source_facts(sources, prepared["sources"], counts)
    if len(prepared["eval_sources"]) > 1:
        names = source_names(data_args.eval_files or [" ".join(source.paths) for source in sources])
        parts = zip(names, prepared["eval_sources"], strict=True)
        facts["eval"]["sources"] = [{"name": name, **count} for name, count in parts]
    if is_main_process() and "boundary_markers" in facts["train"]:
        say(facts["train"]["boundary_markers"])
    return Blocks(rows, evaluation if len(evaluation) else None, facts)


def source_names(words: Sequence[str]) -> list[str]:
    """Return a short name for each source: that of the file or directory, with a number if it is
    not the first.

    >>> source_names(["data/zh.jsonl", "data/en/", "more/zh.jsonl"])
    ['zh', 'en', 'zh-2']
    """
    names = [Path(word).name.split(".")[0] or "source" for word in words]
    earlier = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{n}-{1 + count}" if count else n for n, count in zip(names, earlier, strict=True)]


def _open(path: Path) -> Dataset:
    try:
        return Dataset.from_file(str(path)).with_format("numpy")
    except (OSError, pa.ArrowException) as error:  # somebody empties the cache at this moment
        raise UserError(f"{path}: cannot be opened ({error}). Run the command again.") from error


def _prepare(directory: Path, files, held_out, tokenizer, options: dict, fast: bool = True) -> dict:
    """Write the Arrow files of all parts into `directory` and return their counts."""
    everything = [path for paths in files for path in paths]
    say(f"preparing {', '.join(map(str, everything))} (once; kept in {shown(directory.parent)})")
    encoder, bytes_of = DocumentEncoder(tokenizer, fast), np.asarray(token_byte_lengths(tokenizer))
    columns = Columns(options["columns"], options["unread_columns"])
    reading = {name: options[name] for name in ("on_bad_rows", "text_unit")}
    reading |= {"columns": columns, "check": encoder.cut.check}
    boundaries, held_out_boundaries = (Boundaries(options["boundary_markers"]) for _ in range(2))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    size, title = total_size(everything), translated("packing")
    progress = tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None)
    with ThreadPoolExecutor(threads) as pool, progress:

        def writer(name: str) -> BlockWriter:
            path = directory / f"{name}.arrow"
            return BlockWriter(path, encoder, pool, threads, bytes_of, options)

        # Training documents, but for those that are held out
        reading["progress"] = progress.update
        hold_out = HoldOut(options["eval_ratio"], options["max_eval_rows"])
        writers = [writer(f"train-{index}") for index in range(len(files))]
        for index, paths in enumerate(files):
            for text in read_documents(paths, **reading, boundaries=boundaries):
                if columns.total == EARLY:
                    columns.stop()
                for owner, document in hold_out.offer(text, (index, text)):
                    writers[owner].add(document)
        columns.stop()
        counts = [each.finish() for each in writers]

        # Held-out documents; files are read to their end, since bad rows are judged there
        limit = options["max_eval_rows"] // max(1, len(held_out))
        del reading["progress"]
        groups = [
            list(read_documents(paths, **reading, boundaries=held_out_boundaries))[:limit]
            for paths in held_out
        ]
        if not any(groups):
            groups = [[] for _ in files]
            for owner, text in hold_out.chosen():
                groups[owner].append(text)
        held_out_counts = []
        for index, texts in enumerate(groups):
            evaluation = writer(f"eval-{index}")
            for text in texts:
                evaluation.add(text)
            held_out_counts.append(evaluation.finish())

    for paths, count in zip(files, counts, strict=True):
        if not count["blocks"]:
            raise UserError(
                f"{', '.join(map(str, paths))}: found {count['tokens']:,} tokens, expected at least"
                f" block_size = {options['block_size']:,}. Give more text or a smaller"
                " --block_size."
            )
    facts = {"train": add_counts(counts), "eval": add_counts(held_out_counts)}
    for total, each in zip(facts.values(), (boundaries, held_out_boundaries), strict=True):
        if each.rows:
            total["boundary_markers"] = str(each)
    return {**facts, "sources": counts, "eval_sources": held_out_counts}
