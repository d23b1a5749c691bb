"""Documents -> packed rows on disk, prepared once and found again.

Every document is followed by EOS, tokenised in threads, packed (see packing.py) and written to
Arrow files that are mapped into memory, so that a corpus may be larger than it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.common.cache import Contents, find_or_build
from minimind.common.errors import UserError
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process
from minimind.data.block_writer import BlockWriter
from minimind.data.columns import Columns
from minimind.data.files import expand, read_documents, total_size
from minimind.data.held_out import HoldOut
from minimind.data.markers import Boundaries
from minimind.data.mixing import mixture, parse_sources, rows_per_epoch
from minimind.tokenizer import token_byte_lengths, tokenizer_hash
from minimind.tokenizer.encoding import DocumentEncoder, WrongIdsError

FORMAT_VERSION = 3  # part of the cache key: raise it when the same input gives other rows
# Rows after which columns that nobody reads stop the preparation, and not only at its end
EARLY = 10_000


class Blocks(NamedTuple):
    """Packed data on disk. `facts`: files, documents, tokens, dropped tokens, of both parts."""

    train: Dataset
    eval: Dataset | None
    facts: dict


class Preparation(NamedTuple):
    """Rows to be made of some files. `key`: contents of the files, tokenizer and options, all that
    decides them."""

    key: dict
    sources: list
    files: list[list]
    held_out: list
    contents: list[Contents]


def preparation(data_args, tokenizer: PreTrainedTokenizerFast, **packing) -> Preparation:
    """What `load_blocks` prepares or finds; raises UserError for what `expand` and `parse_sources`
    refuse, and for a tokenizer without an end token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token, so documents cannot be separated. Name one of its"
            " tokens as eos_token in tokenizer_config.json."
        )
    sources = parse_sources(data_args.train_files, data_args.mixing_temperature)
    files = [data_args.expand(source.paths) for source in sources]
    held_out = [expand([word]) for word in data_args.eval_files or ()]
    options = {
        **packing,
        "eval_ratio": 0.0 if held_out else data_args.eval_ratio,
        "max_eval_rows": data_args.max_eval_rows,
        "on_bad_rows": data_args.on_bad_rows,
        "text_unit": data_args.text_unit,
        "columns": data_args.columns,
        "unread_columns": data_args.unread_columns,
        "boundary_markers": data_args.boundary_markers,
        # The hash of a tokenizer leaves out which of its tokens ends
        "eos_token_id": tokenizer.eos_token_id,
    }
    contents = [Contents(paths) for paths in (*files, *held_out)]
    hashes = [each.hash for each in contents]
    hashes = {"train": hashes[: len(files)], "eval": hashes[len(files) :]}
    key = {
        "version": FORMAT_VERSION,
        "files": hashes,
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
    """Documents -> packed rows, prepared once and found again by the content of files, tokenizer
    and options.

    Of several processes the first prepares under a file lock and the others find the result, so no
    collective waits. Prepared rows that are not what was written are prepared again; see cache.py.
    The mixture of the sources is made from the prepared rows, so that other weights prepare nothing
    anew.

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
    temperature, stopping = data_args.mixing_temperature, data_args.mixing_stop
    options, hashes = key["options"], key["files"]

    def build(directory: Path) -> dict:
        try:
            parts = _prepare(directory, files, held_out, tokenizer, options)
        except WrongIdsError as error:
            say(f"{error}; beginning again with tokenizers alone")
            parts = _prepare(directory, files, held_out, tokenizer, options, fast=False)
        for each in contents:
            each.check()
        return parts

    directory, parts = find_or_build("blocks", key, build)
    train = [_open(directory / f"train-{index}.arrow") for index in range(len(files))]
    wanted = rows_per_epoch(sources, [len(dataset) for dataset in train], temperature, stopping)
    rows = concatenate_datasets(train)
    if wanted != [len(dataset) for dataset in train]:
        rows = rows.select(mixture([len(dataset) for dataset in train], wanted, seed))
    evaluation = concatenate_datasets(
        [_open(directory / f"eval-{index}.arrow") for index in range(len(parts["eval_sources"]))]
    ).with_format("numpy")
    for part, each in (("train", files), ("eval", held_out)):
        # The same content may lie elsewhere today.
        paths = [str(path) for paths in each for path in paths]
        parts[part] = {"files": paths, "hash": _joined(hashes[part]), **parts[part]}
    if len(sources) > 1:
        for source, counts, want in zip(sources, parts["sources"], wanted, strict=True):
            counts |= {"files": source.paths, "rows_per_epoch": want}
        parts["train"]["rows_per_epoch"] = sum(wanted)
        parts["train"]["sources"] = parts["sources"]
    if len(parts["eval_sources"]) > 1:
        names = source_names(data_args.eval_files or [" ".join(source.paths) for source in sources])
        parts["eval"]["sources"] = [
            {"name": name, **counts}
            for name, counts in zip(names, parts["eval_sources"], strict=True)
        ]
    facts = {"train": parts["train"], "eval": parts["eval"]}
    if is_main_process() and "boundary_markers" in facts["train"]:
        say(facts["train"]["boundary_markers"])
    return Blocks(rows, evaluation if len(evaluation) else None, facts)


def source_names(words: Sequence[str]) -> list[str]:
    """Short names of sources, each once: that of the file or directory, and a number where it is
    not the first.

    >>> source_names(["data/zh.jsonl", "data/en/", "more/zh.jsonl"])
    ['zh', 'en', 'zh-2']
    """
    names = [Path(word).name.split(".")[0] or "source" for word in words]
    return [
        name if name not in names[:index] else f"{name}-{1 + names[:index].count(name)}"
        for index, name in enumerate(names)
    ]


def _joined(hashes: Sequence[str]) -> str | None:
    if not hashes:
        return None
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def _open(path: Path) -> Dataset:
    try:
        return Dataset.from_file(str(path)).with_format("numpy")
    except (OSError, pa.ArrowException) as error:  # somebody empties the cache just now
        raise UserError(f"{path}: cannot be opened ({error}). Run the command again.") from error


def _prepare(directory: Path, files, held_out, tokenizer, options: dict, fast: bool = True) -> dict:
    """Write the Arrow files of all parts into `directory`; returns what was counted."""
    everything = [path for paths in files for path in paths]
    say(f"preparing {', '.join(map(str, everything))} (once; kept in {directory.parent})")
    hold_out = HoldOut(options["eval_ratio"], options["max_eval_rows"])
    encoder, bytes_of = DocumentEncoder(tokenizer, fast), np.asarray(token_byte_lengths(tokenizer))
    columns = Columns(options["columns"], options["unread_columns"])
    reading = {
        "on_bad_rows": options["on_bad_rows"],
        "text_unit": options["text_unit"],
        "columns": columns,
    }
    reading["check"] = encoder.cut.check
    boundaries, held_out_boundaries = (Boundaries(options["boundary_markers"]) for _ in range(2))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            total=total_size(everything),
            unit="B",
            unit_scale=True,
            desc=translated("packing"),
            disable=None,
        ) as progress,
    ):

        def part(name: str) -> BlockWriter:
            return BlockWriter(
                directory / f"{name}.arrow", encoder, pool, threads, bytes_of, options
            )

        parts = [part(f"train-{index}") for index in range(len(files))]
        for index, paths in enumerate(files):
            for text in read_documents(
                paths, **reading, progress=progress.update, boundaries=boundaries
            ):
                if columns.total == EARLY:
                    columns.stop()
                for owner, document in hold_out.offer(text, (index, text)):
                    parts[owner].add(document)
        columns.stop()
        counts = [each.finish() for each in parts]
        # Bad rows are judged at the end of a reading, so it goes on beyond the rows that are taken.
        limit = options["max_eval_rows"] // max(1, len(held_out))
        given = [
            list(read_documents(paths, **reading, boundaries=held_out_boundaries))[:limit]
            for paths in held_out
        ]
        if not any(given):
            given = [
                [text for owner, text in hold_out.chosen() if owner == index]
                for index in range(len(files))
            ]
        held_out_counts = []
        for index, texts in enumerate(given):
            evaluation = part(f"eval-{index}")
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
    totals = [
        {name: sum(count[name] for count in each) for name in each[0]}
        for each in (counts, held_out_counts)
    ]
    for total, found in zip(totals, (boundaries, held_out_boundaries), strict=True):
        if found.rows:
            total["boundary_markers"] = str(found)
    return {
        "train": totals[0],
        "eval": totals[1],
        "sources": counts,
        "eval_sources": held_out_counts,
    }
