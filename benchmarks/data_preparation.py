"""Documents -> packed blocks by the classic recipe and by ours, on the same files, with the same
ids.

    python benchmarks/data_preparation.py corpus.jsonl [--tokenizer DIR] [--rounds 3]
    python benchmarks/data_preparation.py --unicode

The classic recipe is `datasets.map` to tokenise, then `map` with a Python function that groups; its
reading of the files is not counted, ours is. `--unicode` compares the ids of both engines for every
character there is, at the places where a pattern may split. Memory against the size of the corpus:
benchmarks/scaling.py.
"""

import argparse
import os
import sys
import tempfile
from itertools import chain

import numpy as np
from side_by_side import device_name, side_by_side
from transformers import AutoTokenizer

from minimind.data.documents import load_blocks
from minimind.data.files import read_documents
from minimind.tokenizer import DEFAULT_TOKENIZER, text_encoder
from minimind.tokenizer.encoding import fast_engine
from minimind.training.data_arguments import DataArguments

BLOCK_SIZE = 512


def group_texts(examples: dict) -> dict:
    """The function of the classic recipe: join the map batch, cut, drop its tail."""
    joined = {name: list(chain(*examples[name])) for name in examples}
    total = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
    result = {
        name: [ids[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)]
        for name, ids in joined.items()
    }
    result["labels"] = result["input_ids"].copy()
    return result


def classic(dataset, tokenizer, num_proc: int):
    """Tokenise and group; returns the tokenised dataset."""
    tokenised = dataset.map(
        lambda batch: tokenizer(
            [text + tokenizer.eos_token for text in batch["text"]], add_special_tokens=False
        ),
        batched=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        load_from_cache_file=False,
    )
    tokenised.map(group_texts, batched=True, num_proc=num_proc, load_from_cache_file=False)
    return tokenised


def ours(files: list[str], tokenizer):
    """Read, tokenise, pack and write, with nothing in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MINIMIND_CACHE"] = cache
        blocks = load_blocks(
            DataArguments(train_files=files, eval_ratio=0.0), tokenizer, BLOCK_SIZE
        )
        return blocks.train[:]["input_ids"], blocks.facts["train"]


def speed(files: list[str], tokenizer, rounds: int) -> None:
    """Print the times of both, and of the engines alone."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    texts = list(read_documents(files))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    dataset = Dataset.from_dict({"text": texts})
    encoder = text_encoder(tokenizer)
    engine, _, _ = fast_engine(encoder, tokenizer.eos_token_id)
    print(
        f"{device_name()}, {' '.join(files)}: {len(texts):,} documents, {megabytes:.1f} MB of text"
    )
    runs = {
        f"classic recipe, num_proc {n}": lambda n=n: classic(dataset, tokenizer, n)
        for n in (1, os.cpu_count() or 2)
    }
    runs["MiniMind"] = lambda: ours(files, tokenizer)
    runs["(tokenizers, encode_batch alone)"] = lambda: encoder.encode_batch(
        texts, add_special_tokens=False
    )
    if engine:
        runs["(tiktoken alone, one thread)"] = lambda: [
            engine.encode_ordinary(text) for text in texts
        ]
    times = {name: seconds for name, (seconds, _) in side_by_side(runs, rounds).items()}
    best = min(seconds for name, seconds in times.items() if name.startswith("classic"))
    for name, seconds in times.items():
        print(
            f"  {name:36} {seconds:6.2f} s  {megabytes / seconds:6.1f} MB/s  x"
            f" {best / seconds:.2f}",
            flush=True,
        )
    blocks, facts = ours(files, tokenizer)
    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
    expected = [[*encoding.ids, tokenizer.eos_token_id] for encoding in encodings]
    stream = np.fromiter(chain(*expected), dtype=np.int32)
    same = np.array_equal(np.concatenate(list(blocks)), stream[: facts["blocks"] * BLOCK_SIZE])
    same &= facts["tokens"] == len(stream)
    print(
        f"  {facts['tokens']:,} ids, {'all those' if same else 'NOT THOSE'} of the library; the"
        " tail of ",
        end="",
    )
    print(f"{facts['dropped_tokens']:,} is dropped")
    theirs = classic(dataset, tokenizer, 1)["input_ids"]
    injected = sum(list(ours) != ids for ours, ids in zip(theirs, expected, strict=True))
    print(f"  the classic recipe takes text for control tokens in {injected:,} documents")
    if not same:
        sys.exit(1)


def unicode(tokenizer) -> None:
    """Print for how many of all characters the engines differ."""
    encoder = text_encoder(tokenizer)
    engine, _, _ = fast_engine(encoder, tokenizer.eos_token_id)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = [f"a{c}a 1{c} .{c}. {c}{c}\n'{c} '{c}t" for c in characters]
    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
    differing = [
        c
        for c, t, e in zip(characters, texts, encodings, strict=True)
        if engine.encode_ordinary(t) != e.ids
    ]
    print(
        f"{len(characters):,} characters, {len(differing):,} encoded differently {differing[:20]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="files of documents")
    parser.add_argument("--tokenizer", help="directory of a tokenizer; default: ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--unicode", action="store_true", help="compare the engines on every character instead"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or DEFAULT_TOKENIZER)
    if args.unicode:
        unicode(tokenizer)
    else:
        speed(args.files, tokenizer, args.rounds)


if __name__ == "__main__":
    main()
