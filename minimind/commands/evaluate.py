"""`minimind evaluate`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout

from minimind.commands.options import add_bad_rows, add_columns, select
from minimind.common.streams import json_text


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure held-out files: loss, bits per byte, exact answers",
        description=(
            "Prints one JSON object: the loss of the trained replies of conversations, or of"
            " documents; for conversations also how many last replies the model reproduces word for"
            " word."
        ),
    )
    parser.set_defaults(run=run, json=True)  # without the option: its output is always JSON
    add = parser.add_argument
    add("directory", help="a stage directory; adapters included")
    add("files", nargs="+", help="files, directories or globs of conversations or documents")
    stage = "default: recognised from the first rows"
    add("--stage", choices=("sft", "pretrain"), help=stage)
    add_bad_rows(parser)
    length = "tokens of a row: longer documents are cut into several"
    add("--max_length", type=int, default=1024, help=length)
    new_tokens = "maximum tokens of an answer; 0 measures the loss alone"
    add("--max_new_tokens", type=int, default=64, help=new_tokens)
    add("--batch_size", type=int, default=64, help="maximum rows at a time")
    add_columns(parser)


def run(args: Namespace) -> None:
    """Evaluate the model on the files."""
    from minimind.data.columns import Columns
    from minimind.evaluation import evaluate
    from minimind.generation import load_for_generation

    columns = Columns(args.columns, args.unread_columns)
    options = select(args, "max_length", "max_new_tokens", "batch_size")
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        model, tokenizer = load_for_generation(args.directory)
        result = evaluate(
            model, tokenizer, args.files, args.stage, args.on_bad_rows, columns, **options
        )
    print(json_text(result, indent=2))
