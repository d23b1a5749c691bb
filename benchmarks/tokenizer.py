"""The default tokenizer beside another one on documents that it was not trained on.

    python benchmarks/tokenizer.py split DIR FILES...      DIR/train.jsonl and DIR/held_out.jsonl
    minimind tokenizer train DIR/train.jsonl --output_dir TOKENIZER
    minimind tokenizer compare TOKENIZER PEER --files DIR/held_out.jsonl
    python benchmarks/tokenizer.py sources PEER DIR --leave_out books en_wiki+zh_wiki --weights ...

`split` holds out a tenth of the documents, chosen by the hash of their key: all pieces of a
document (rows whose field "doc" is the same up to its last colon) lie on one side. `sources` trains
the same recipe once more without each of some sources (joined by "+": of all of these) and measures
it on their text: how the figure holds on writing of a kind never seen.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import xxhash

from minimind.commands.tokenizer import domain_weight
from minimind.tokenizer import save_tokenizer, train_tokenizer
from minimind.tokenizer_evaluation.comparison import compare
from minimind.tokenizer_evaluation.texts import read_texts, weighted

HELD_OUT = 0.1


def documents(file: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a jsonl file of documents or chats -> the key of each one's document, and it as
    {"text", "source"}.

    Of a chat the text is what all its messages say, whatever their roles: this must not depend on
    which roles a version of this project trains on.
    """
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            text = row.get("text") or "\n".join(
                message["content"] or "" for message in row["conversations"]
            )
            key = row["doc"].rpartition(":")[0] if "doc" in row else text
            yield key, {"text": text, "source": row.get("source", file.stem)}


def split(directory: Path, files: list[Path]) -> None:
    """Write the two parts."""
    directory.mkdir(parents=True, exist_ok=True)
    counts = {"train": [0, 0], "held_out": [0, 0]}
    with ExitStack() as stack:
        parts = {
            name: stack.enter_context((directory / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in counts
        }
        for key, row in chain.from_iterable(map(documents, files)):
            name = (
                "held_out" if xxhash.xxh3_64_intdigest(key.encode()) < HELD_OUT * 2**64 else "train"
            )
            parts[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[name][0] += 1
            counts[name][1] += len(row["text"].encode())
    for name, (rows, size) in counts.items():
        print(f"{directory / name}.jsonl: {rows:,} rows, {size / 1e6:.1f} MB of text")


def sources(peer: str, directory: Path, left_out: list[str], weights: dict[str, float]) -> None:
    """Train without each of some sources, or of groups of them joined by "+", and measure on their
    text."""
    train = list(read_texts([str(directory / "train.jsonl")]))
    every = [*train, *read_texts([str(directory / "held_out.jsonl")])]
    print(
        f"{'left out':40} {'MB':>6} {'tokens':>10} {'of ' + Path(peer).name:>12} {'difference':>10}"
    )
    for group in left_out:
        without = set(group.split("+"))
        rest = {domain: weight for domain, weight in weights.items() if domain not in without}
        texts = weighted((text for text in train if text.domain not in without), rest)
        with tempfile.TemporaryDirectory() as made:
            save_tokenizer(train_tokenizer(text.text for text in texts), Path(made))
            result = compare([made, peer], [text for text in every if text.domain in without])[
                "total"
            ]
        ours, theirs = result["tokens"]
        print(
            f"{group:40} {result['bytes'] / 1e6:6.2f} {ours:10,} {theirs:12,}"
            f" {ours / theirs - 1:+10.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("split")
    command.add_argument("directory", type=Path)
    command.add_argument("files", type=Path, nargs="+")
    command.set_defaults(run=lambda args: split(args.directory, args.files))
    command = commands.add_parser("sources")
    command.add_argument("peer", help="directory with tokenizer.json")
    command.add_argument("directory", type=Path, help="what split wrote")
    command.add_argument("--leave_out", nargs="+", required=True)
    command.add_argument(
        "--weights", nargs="+", type=domain_weight, default=[], metavar="DOMAIN=WEIGHT"
    )
    command.set_defaults(
        run=lambda args: sources(args.peer, args.directory, args.leave_out, dict(args.weights))
    )
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
