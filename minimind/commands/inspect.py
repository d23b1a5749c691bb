"""`minimind inspect`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from minimind.commands.shared_options import (
    add_bad_rows_option,
    add_column_options,
    add_json_option,
)
from minimind.common.errors import UserError
from minimind.common.files import check_output, write_bytes, write_text


def add_parser(commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="see what a run would train on: tokens by role, loss mask, lengths, findings",
        description=(
            "Reads and tokenises as the stage does and reports on the finished rows. Exit code 1 if"
            " a finding is an error."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    files = "files, directories or globs of conversations, pairs or documents"
    add("files", nargs="+", help=files)
    add("--tokenizer", help="directory of a tokenizer or a stage; default: the package's")
    recognised = "default: recognised from the first rows"
    add("--stage", choices=("sft", "dpo", "pretrain"), help=recognised)
    add("--eval_files", nargs="+", help="held-out files, compared with the others")
    length = "tokens per row, as the stage has it; for pretrain the block size"
    add("--max_length", type=int, default=512, help=length)
    add(
        "--boundary_markers",
        choices=("split", "keep", "error"),
        default="split",
        help="as pretrain.py has it",
    )
    template = "as the stage has it: the name of a template, or a .jinja file"
    add("--chat_template", help=template)
    add("--long_conversations", default="keep_last", help="as the stage has it")
    add("--train_turns", default="all", help="as the stage has it")
    add("--weighted_loss", choices=("true", "false"), help="as the stage has it")
    add_bad_rows_option(parser, "what a run would do with bad rows, which are findings here")
    add_column_options(parser)
    rows = "how many rows are shown; default: 3 in the terminal, 100 on the page, all in --json"
    add("--rows", type=int, help=rows)
    add("--row", metavar="FILE:LINE", help="show this row instead of the first ones")
    add("--html", metavar="FILE", help="also write the report as one HTML page")
    add("--png", metavar="FILE", help="also write the length histogram as a picture")
    add_json_option(parser)


def run(args: Namespace) -> None:
    """Inspect the files; exits with code 1 if a finding is an error."""
    from minimind import inspection
    from minimind.data.chats import ChatArguments
    from minimind.inspection import display
    from minimind.tokenizer import load_tokenizer
    from minimind.training.arguments import DataArguments

    for file in filter(None, (args.html, args.png)):
        check_output(file)
    weighted = None if args.weighted_loss is None else args.weighted_loss == "true"
    try:
        chat_args = ChatArguments(
            args.chat_template, args.long_conversations, args.train_turns, weighted_loss=weighted
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error
    data_args = DataArguments(
        args.files,
        args.eval_files,
        eval_ratio=0.0,
        on_bad_rows=args.on_bad_rows,
        columns=args.columns,
        unread_columns=args.unread_columns,
        boundary_markers=args.boundary_markers,
    )

    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        tokenizer = load_tokenizer(args.tokenizer)
        stage = args.stage or inspection.recognise_stage(args.files, data_args.reading())
        inspected = inspection.inspect_files(
            stage, data_args, tokenizer, args.max_length, chat_args
        )
    rows = inspected.find(args.row) if args.row else range(len(inspected.tokens))

    def shown(default: int) -> list[int]:
        return list(rows[: default if args.rows is None else args.rows])

    if args.html:
        page = display.page(inspected, shown(100), tokenizer, " ".join(args.files))
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, page)
    if args.png:
        Path(args.png).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(args.png, display.length_png(inspected.report["lengths"]))
    if args.json:
        display.print_json(inspected, shown(len(rows)))
    else:
        display.print_inspection(inspected, shown(3), tokenizer)
    if inspected.errors():
        sys.exit(1)
