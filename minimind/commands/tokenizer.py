"""`minimind tokenizer train|evaluate|compare`."""

import time
from argparse import Namespace
from pathlib import Path

from minimind.commands.options import add_bad_rows, add_columns, add_json
from minimind.common.errors import UserError
from minimind.common.files import check_output
from minimind.common.language import say
from minimind.common.streams import json_text

DIRECTORY = "with tokenizer.json, or 'default'"
HELD_OUT = "documents and conversations, preferably held-out ones"


def add_parser(commands) -> None:
    parser = commands.add_parser("tokenizer", help="train and judge tokenizers")
    group = parser.add_subparsers(required=True, metavar="train|evaluate|compare")

    training = "train a byte-level BPE tokenizer with ChatML on documents or chats"
    train = group.add_parser("train", help=training)
    add = train.add_argument
    add("files", nargs="+", help="files, directories or globs of documents and conversations")
    add("--vocab_size", type=int, default=6400, help="tokens, 256 bytes and 3 specials included")
    rule = "llama.cpp's name of the rule that splits text before merging"
    add("--pre_tokenizer", default="qwen2", help=rule)
    add("--min_frequency", type=int, default=0, help="merge no pair that is rarer")
    add(
        "--weights",
        nargs="+",
        default=[],
        type=domain_weight,
        metavar="DOMAIN=WEIGHT",
        help=(
            "how often the texts of a domain count (a row's 'source', else the name of its file):"
            " 0.25 takes every fourth, 0 none; others count once"
        ),
    )
    add("--output_dir", required=True, help="directory to write")
    train.set_defaults(run=run_train)

    evaluate = group.add_parser("evaluate", help="measure how a tokenizer encodes texts")
    evaluate.add_argument("directory", help=f"a directory {DIRECTORY}")
    evaluate.add_argument("files", nargs="+", help=HELD_OUT)
    evaluate.set_defaults(run=run_evaluate)

    compare = group.add_parser("compare", help="measure tokenizers side by side on the same texts")
    compare.add_argument("directories", nargs="+", help=f"directories {DIRECTORY}; at least two")
    compare.add_argument("--files", nargs="+", required=True, help=HELD_OUT)
    compare.set_defaults(run=run_compare)

    for command in (evaluate, compare):
        add_json(command, "print one JSON object")
        report = "also write the report: .svg, .html or .txt"
        command.add_argument("--save", metavar="FILE", help=report)
    for command in (train, evaluate, compare):
        add_columns(command, unread=False)
        add_bad_rows(command)


def domain_weight(text: str) -> tuple[str, float]:
    """A domain and its weight, from "domain=weight"."""
    domain, _, weight = text.rpartition("=")
    if not domain:
        raise ValueError(text)
    return domain, float(weight)


def run_train(args: Namespace) -> None:
    """`minimind tokenizer train`."""
    from minimind.tokenizer import check_destination, save_tokenizer, train_tokenizer
    from minimind.tokenizer.cutting import Cutter
    from minimind.tokenizer.training import new_bpe
    from minimind.tokenizer_evaluation.texts import read_texts, weighted

    check_output(args.output_dir, directory=True)
    check_destination(Path(args.output_dir))
    say(f"training a tokenizer of {args.vocab_size:,} tokens on {' '.join(args.files)}")
    start = time.perf_counter()
    check = Cutter(new_bpe(args.pre_tokenizer)).check
    texts = read_texts(args.files, args.on_bad_rows, columns=args.columns, check=check)
    words = (text.text for text in weighted(texts, dict(args.weights)))
    tokenizer = train_tokenizer(words, args.vocab_size, args.pre_tokenizer, args.min_frequency)
    save_tokenizer(tokenizer, Path(args.output_dir))

    fewer = " (the text has no more pairs to merge)" if len(tokenizer) < args.vocab_size else ""
    seconds = time.perf_counter() - start
    say(f"{len(tokenizer):,} tokens{fewer} in {seconds:.0f} s -> {args.output_dir}")


def run_evaluate(args: Namespace) -> None:
    """`minimind tokenizer evaluate`."""
    from minimind.tokenizer_evaluation import comparison, report

    directory = tokenizer_directory(args.directory)
    result = comparison.evaluate(directory, checked_texts(args, [directory]))
    print_report(args, result, report.evaluation_tables, "evaluate")


def run_compare(args: Namespace) -> None:
    """`minimind tokenizer compare`."""
    from minimind.tokenizer_evaluation import comparison, report

    if len(args.directories) < 2:
        raise UserError(
            "compare: found one directory, expected at least two: compare DIR DIR --files FILE."
        )
    directories = [tokenizer_directory(directory) for directory in args.directories]
    result = comparison.compare(directories, checked_texts(args, directories))
    print_report(args, result, report.comparison_tables, "compare")


def checked_texts(args: Namespace, directories: list[str]):
    """The texts of the files; raises UserError first for a --save or a tokenizer that cannot be
    used."""
    from minimind.tokenizer_evaluation.comparison import check_of
    from minimind.tokenizer_evaluation.report import check_save
    from minimind.tokenizer_evaluation.texts import read_texts

    check_save(args.save)
    check = check_of(directories)
    return read_texts(args.files, args.on_bad_rows, "tokenising", args.columns, check)


def tokenizer_directory(name: str) -> str:
    """A tokenizer's directory as given; "default" is the one that ships with the package."""
    from minimind.tokenizer import DEFAULT_TOKENIZER

    return str(DEFAULT_TOKENIZER) if name == "default" and not Path(name).exists() else name


def print_report(args: Namespace, result: dict, tables, command: str) -> None:
    """Print a result as JSON or as tables, and save the tables where --save says."""
    from minimind.tokenizer_evaluation.report import show

    if args.json:
        print(json_text(result, indent=2))
    if args.save or not args.json:
        show(tables(result), f"minimind tokenizer {command}", args.save, quiet=args.json)
