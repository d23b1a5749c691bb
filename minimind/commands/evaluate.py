"""`minimind evaluate`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout

from minimind.commands.shared_options import add_bad_rows_option, add_column_options
from minimind.common.streams import json_text


def add_parser(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure held-out files: loss, bits per byte, exact answers",
        description=(
            "Prints one JSON object: the loss of the trained replies of conversations, or of"
            " documents; of conversations also how many last replies the model gives word for word."
        ),
    )
    parser.set_defaults(run=run, json=True)  # without the option: its output is always JSON
    add = parser.add_argument
    add("directory", help="a stage directory; adapters included")
    add("files", nargs="+", help="files, directories or globs of conversations or documents")
    recognised = "default: recognised from the first rows"
    add("--stage", choices=("sft", "pretrain"), help=recognised)
    add_bad_rows_option(parser)
    length = "tokens of a row: longer documents are cut into several"
    add("--max_length", type=int, default=1024, help=length)
    new_tokens = "tokens of one answer at most; 0 asks nothing: the loss alone"
    add("--max_new_tokens", type=int, default=64, help=new_tokens)
    add("--batch_size", type=int, default=64, help="rows at a time, at most")
    add_column_options(parser)


def run(args: Namespace) -> None:
    """Evaluate the model on the files."""
    from minimind.data.columns import Columns
    from minimind.evaluation import evaluate
    from minimind.generation import load_for_generation

    columns = Columns(args.columns, args.unread_columns)
    names = ("max_length", "max_new_tokens", "batch_size")
    options = {name: getattr(args, name) for name in names}
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        model, tokenizer = load_for_generation(args.directory)
        result = evaluate(
            model, tokenizer, args.files, args.stage, args.on_bad_rows, columns, **options
        )
    print(json_text(result, indent=2))
