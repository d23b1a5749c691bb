"""`minimind inspect`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minimind.commands.options import add_bad_rows, add_columns, add_json, select
from minimind.common.errors import UserError
from minimind.common.files import check_output, write_bytes, write_text
from minimind.common.options import STAGE_NAMES

# The options by which rows are made; each stage has some of them
ROWS = ("max_length", "max_prompt_length", "max_completion_length", "chat_template")
ROWS += ("long_conversations", "long_prompts", "long_completions", "train_turns", "weighted_loss")


def add_parser(commands) -> None:
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
    stages = [name for name in STAGE_NAMES if name != "lora"]  # which trains on the rows of sft
    add("--stage", choices=stages, help="default: recognised from the first rows")
    add("--eval_files", nargs="+", help="held-out files, compared with the others")
    length = "tokens per row, as in the stage; for pretrain the block size; default: 512"
    add("--max_length", type=int, help=length)
    add("--max_prompt_length", type=int, help="of pairs, as in the stage; default: 256")
    add("--max_completion_length", type=int, help="of pairs, as in the stage; default: 256")
    policies = ("split", "keep", "error")
    add("--boundary_markers", choices=policies, default="split", help="as in pretrain.py")
    template = "as in the stage: the name of a template, or a .jinja file"
    add("--chat_template", help=template)
    for option in ("long_conversations", "long_prompts", "long_completions", "train_turns"):
        add(f"--{option}", help="as in the stage")
    add("--weighted_loss", choices=("true", "false"), help="as in the stage")
    add_bad_rows(parser, "what a run would do with bad rows; here they are findings")
    add_columns(parser)
    rows = "rows to show; default: 3 in the terminal, 100 on the page, all in --json"
    add("--rows", type=int, help=rows)
    add("--row", metavar="FILE:LINE", help="show this row instead of the first ones")
    add("--html", metavar="FILE", help="also write the report as one HTML page")
    add("--png", metavar="FILE", help="also write the length histogram as a picture")
    add_json(parser)


def run(args: Namespace) -> None:
    """Inspect the files; exits with code 1 if a finding is an error."""
    from minimind.data.columns import IGNORE_ALL
    from minimind.inspection import display, recognise_stage
    from minimind.inspection.page import inspection_page, length_png
    from minimind.stages import STAGES, inspect_training_rows, load_rows
    from minimind.tokenizer import load_tokenizer
    from minimind.training.data_arguments import DataArguments

    outputs = [file for file in (args.html, args.png) if file]
    for file in outputs:
        check_output(file)
    options = select(args, "on_bad_rows", "columns", "unread_columns", "boundary_markers")
    data_args = DataArguments(args.files, args.eval_files, eval_ratio=0.0, **options)

    # Standard output is for the report alone.
    with redirect_stdout(sys.stderr):
        tokenizer = load_tokenizer(args.tokenizer)
        stage = args.stage or recognise_stage(args.files, data_args.reading())
        spec = STAGES[stage]
        chat_args, length = row_options(args, spec)
        # Bad rows and, of documents, unread columns become findings: the loader must not stop.
        quiet = replace(data_args, on_bad_rows="skip")
        if spec.reads_documents:
            quiet = replace(quiet, unread_columns=[*(args.unread_columns or ()), IGNORE_ALL])
        packing = {"packing_strategy": "wrapped", "document_mask": False}
        options = Namespace(block_size=length, max_length=length, seed=42, **packing)
        rows = load_rows(spec, quiet, tokenizer, options, chat_args)
        inspected = inspect_training_rows(spec, rows, tokenizer, data_args, chat_args)
    places = inspected.find(args.row) if args.row else range(len(inspected.tokens))

    def shown(default: int) -> list[int]:
        return list(places[: default if args.rows is None else args.rows])

    for file in outputs:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.html:
        page = inspection_page(inspected, shown(100), tokenizer, " ".join(args.files))
        write_text(args.html, page)
    if args.png:
        write_bytes(args.png, length_png(inspected.report["lengths"]))
    if args.json:
        display.print_json(inspected, shown(len(places)))
    else:
        display.print_inspection(inspected, shown(3), tokenizer)
    if inspected.errors():
        sys.exit(1)


def row_options(args: Namespace, spec) -> tuple[Any, int]:
    """How conversations or pairs of a stage become rows (None for documents), and the tokens of a
    row; raises UserError for a wrong value and for an option that the stage does not have."""
    given = {name: value for name in ROWS if (value := getattr(args, name)) is not None}
    kind = spec.chat_arguments
    names = [field.name for field in fields(kind)] if kind else []
    for name, value in given.items():
        if name not in names and (name != "max_length" or spec.pairs):
            raise UserError(
                f"--{name} {value}: found rows of {spec.name}, a stage without this option. Leave"
                " it out, or name the stage with --stage."
            )
    length = given.pop("max_length", 512)
    if "weighted_loss" in given:
        given["weighted_loss"] = given["weighted_loss"] == "true"
    try:
        return kind and kind(**given), length
    except ValueError as error:
        raise UserError(f"{error}.") from error
