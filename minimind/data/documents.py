"""Documents -> packed blocks: each document is followed by EOS, all are joined, and the stream is cut every
`block_size` tokens. Only the tail of the whole corpus is lost, less than one block.

    doc A  doc B        A A A EOS B B | B B B B EOS C | C ...      block_size = 6
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.data.files import content_hash, expand, read_documents
from minimind.errors import UserError
from minimind.tokenizer import text_encoder, token_byte_lengths, tokenizer_hash

FORMAT_VERSION = 1  # part of the cache key: raise it when the same input gives other blocks
BATCH = 1000  # documents tokenised at a time


class Blocks(NamedTuple):
    """Packed data on disk. `facts`: files, documents, tokens, dropped tokens, of both parts."""

    train: Dataset
    eval: Dataset | None
    facts: dict


def pack(token_lists: Iterable[Sequence[int]], block_size: int, eos_token_id: int) -> Iterator[np.ndarray]:
    """Join documents with EOS and cut blocks; yields arrays of shape (blocks, block_size), one per input batch.

    >>> [block.tolist() for block in pack([[5, 6, 7], [8], [9, 9]], 4, 2)]
    [[[5, 6, 7, 2], [8, 2, 9, 9]]]
    """
    rest: list[np.ndarray] = []
    for batch in _batches(token_lists):
        parts = [np.asarray([*ids, eos_token_id], dtype=np.int32) for ids in batch]
        stream = np.concatenate([*rest, *parts])
        whole = len(stream) // block_size * block_size
        if whole:
            yield stream[:whole].reshape(-1, block_size)
        rest = [stream[whole:]]


def _batches(items: Iterable) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


class HoldOut:
    """Chooses the held-out rows by their content, at most `limit` different ones, so that copies lie on one side."""

    def __init__(self, ratio: float, limit: int):
        self.threshold, self.limit = ratio * 2**64, limit
        self.chosen: set[int] = set()

    def takes(self, text: str) -> bool:
        """Whether the row with this text is held out."""
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if digest < self.threshold and len(self.chosen) < self.limit:
            self.chosen.add(digest)
        return digest in self.chosen


def cache_directory() -> Path:
    """Where prepared data is kept: $MINIMIND_CACHE, or ~/.cache/minimind."""
    return Path(os.environ.get("MINIMIND_CACHE") or Path.home() / ".cache" / "minimind")


def load_blocks(data_args, tokenizer: PreTrainedTokenizerFast, block_size: int) -> Blocks:
    """Documents -> packed blocks, prepared once and found again by the content of files, tokenizer and options.

    Of several processes the first prepares under a file lock and the others find the result, so no collective waits.

    Raises:
        UserError: see `files.read_documents`; or there is too little text for one block.
    """
    files = expand(data_args.train_files)
    held_out = expand(data_args.eval_files) if data_args.eval_files else []
    eval_ratio, max_eval_rows, on_bad_rows = data_args.eval_ratio, data_args.max_eval_rows, data_args.on_bad_rows
    key = {
        "version": FORMAT_VERSION,
        "files": [content_hash(files), content_hash(held_out)],
        "tokenizer": tokenizer_hash(tokenizer),
        "options": [block_size, None if held_out else eval_ratio, max_eval_rows, on_bad_rows],
    }
    directory = cache_directory() / "blocks" / xxhash.xxh3_128_hexdigest(json.dumps(key, sort_keys=True).encode())
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not (directory / "manifest.json").is_file():
            building = Path(f"{directory}.building")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            facts = _build(building, files, held_out, tokenizer, block_size, eval_ratio, max_eval_rows, on_bad_rows)
            (building / "manifest.json").write_text(json.dumps({"key": key, **facts}, indent=2))
            building.replace(directory)
    facts = json.loads((directory / "manifest.json").read_text())
    for part, paths, digest in zip(("train", "eval"), (files, held_out), key["files"], strict=True):
        # The same content may lie elsewhere today.
        facts[part] = {"files": [str(path) for path in paths], "hash": digest if paths else None, **facts[part]}
    train, evaluation = (Dataset.from_file(str(directory / f"{name}.arrow")) for name in ("train", "eval"))
    return Blocks(train.with_format("numpy"), evaluation.with_format("numpy") if len(evaluation) else None, facts)


def _build(directory, files, held_out, tokenizer, block_size, eval_ratio, max_eval_rows, on_bad_rows) -> dict:
    print(f"preparing {', '.join(map(str, files))} (once; kept in {cache_directory()})", flush=True)
    evaluation: list[str] = []
    hold_out = HoldOut(0 if held_out else eval_ratio, max_eval_rows)
    if held_out:
        # Read to the end, since bad rows are judged there.
        evaluation = list(read_documents(held_out, on_bad_rows))[:max_eval_rows]

    def training_documents() -> Iterator[str]:
        for text in read_documents(files, on_bad_rows):
            if hold_out.takes(text):
                evaluation.append(text)
            else:
                yield text

    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc="packing", disable=None) as progress:
        train = _write(directory / "train.arrow", training_documents(), tokenizer, block_size, progress.update)
    if not train["blocks"]:
        raise UserError(
            f"{', '.join(map(str, files))}: found {train['tokens']:,} tokens, expected at least block_size = "
            f"{block_size:,}. Give more text or a smaller --block_size."
        )
    return {"train": train, "eval": _write(directory / "eval.arrow", evaluation, tokenizer, block_size)}


def _write(path: Path, texts: Iterable[str], tokenizer, block_size: int, progress=lambda n: None) -> dict:
    """Write the blocks of `texts` as an Arrow stream of fixed-size lists; returns what was counted.

    `progress` is called with the bytes done since its last call.
    """
    bytes_of = np.asarray(token_byte_lengths(tokenizer))
    encoder = text_encoder(tokenizer)
    schema = pa.schema({"input_ids": pa.list_(pa.int32(), block_size)})
    counts = {"documents": 0, "tokens": 0, "blocks": 0, "target_bytes": 0}

    def token_lists() -> Iterator[list[int]]:
        for batch in _batches(texts):
            for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
                counts["documents"] += 1
                counts["tokens"] += len(encoding.ids) + 1
                yield encoding.ids
            progress(sum(len(text.encode()) for text in batch))

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for blocks in pack(token_lists(), block_size, tokenizer.eos_token_id):
            column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), block_size)
            writer.write_batch(pa.record_batch([column], schema=schema))
            counts["blocks"] += len(blocks)
            # The first token of a block is no target, so its bytes are not predicted.
            counts["target_bytes"] += int(bytes_of[blocks[:, 1:]].sum())
    counts["dropped_tokens"] = counts["tokens"] - counts["blocks"] * block_size
    return counts


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks -> input_ids and labels, both (batch, block_size); the model shifts the labels itself."""
    input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
    return {"input_ids": input_ids, "labels": input_ids.clone()}
