"""`minimind evaluate`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from minimind.commands.options import add_bad_rows, add_columns, add_json, select
from minimind.common.errors import UserError
from minimind.common.files import check_output
from minimind.common.streams import json_text


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="the score card of one or several models: loss, bits per byte, minimal pairs ...",
        description=(
            "Measures models by held-out files (the loss of the trained replies of conversations,"
            " or of documents; for conversations also how many last replies the model reproduces"
            " word for word) and by tasks, each score with its interval and beside chance."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    paths = (
        "stage directories, adapters and exports; after them held-out files, directories or globs"
        " of conversations or documents"
    )
    add("paths", nargs="+", metavar="DIR", help=paths)
    stage = "of the held-out files; default: recognised from the first rows"
    add("--stage", choices=("sft", "pretrain"), help=stage)
    pairs = "minimal pairs: rows with sentence_good and sentence_bad (BLiMP, ZhoBLiMP)"
    add("--pairs", nargs="+", metavar="FILE", help=pairs)
    tasks = "tasks of lm-evaluation-harness (the extra lm-eval), such as blimp"
    add("--lm_eval", nargs="+", metavar="TASK", help=tasks)
    add("--include_path", metavar="DIR", help="a directory with task files of your own for it")
    controls = (
        "also score random weights, a model of lengths, one of token frequencies, and shuffled"
        " labels: each should be at chance"
    )
    add("--controls", action="store_true", help=controls)
    overlap = "count the items that are in the training text, and give the scores without them"
    add("--contamination", action="store_true", help=overlap)
    output = "write card.json, card.md, card.png and items.jsonl there; finished tasks are kept"
    add("--output", metavar="DIR", help=output)
    add_json(parser, "print one JSON object, as when the output is no terminal")
    add_bad_rows(parser)
    length = "tokens of a row: longer documents are cut into several"
    add("--max_length", type=int, default=1024, help=length)
    new_tokens = "maximum tokens of an answer; 0 measures the loss alone"
    add("--max_new_tokens", type=int, default=64, help=new_tokens)
    add("--batch_size", type=int, default=64, help="maximum rows at a time")
    add_columns(parser)


def run(args: Namespace) -> None:
    """Evaluate the models, and print the card."""
    from minimind.common.terminal import Terminal
    from minimind.score_card import Finished, cards_json, make_card, remarks, table_of, write_cards

    directories, files = split_paths(args.paths)
    checks = [name for name in ("controls", "contamination") if getattr(args, name)]
    output = Path(args.output) if args.output else None
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        # What can be refused at once
        if output:
            check_output(output, directory=True)
        tasks = make_tasks(args, files)

        if output:
            output.mkdir(parents=True, exist_ok=True)
        finished = Finished(output / "finished.jsonl" if output else None)
        cards = [make_card(directory, tasks, finished, checks) for directory in directories]
        if output:
            write_cards(output, cards)

    if args.json or not sys.stdout.isatty():
        print(json_text(cards_json(cards), indent=2))
    else:
        terminal = Terminal()
        terminal.print(table_of(cards))
        for remark in remarks(cards):
            terminal.print(remark, markup=False)


def make_tasks(args: Namespace, files: list[str]) -> list:
    """What the models are scored by.

    Raises:
        UserError: a file cannot be used, or there is nothing to do.
    """
    from minimind.data.columns import Columns
    from minimind.score_card import HarnessTask, PairsTask, held_out_task, read_pairs

    tasks = []
    if files:
        columns = Columns(args.columns, args.unread_columns)
        options = select(args, "max_length", "max_new_tokens", "batch_size")
        tasks.append(held_out_task(files, args.stage, args.on_bad_rows, columns, **options))
    if args.pairs:
        tasks.append(PairsTask(read_pairs(args.pairs, args.on_bad_rows)))
    if args.lm_eval:
        tasks.append(HarnessTask(args.lm_eval, args.include_path))
    if not tasks:
        raise UserError("found nothing to evaluate by. Give held-out files, or --pairs FILE.")
    return tasks


def split_paths(paths: list[str]) -> tuple[list[str], list[str]]:
    """The directories with models, of which the first path is one, and the other paths."""
    directories = [path for path in paths[1:] if is_model(Path(path))]
    return [paths[0], *directories], [path for path in paths[1:] if path not in directories]


def is_model(path: Path) -> bool:
    """Whether a directory holds a model or an adapter."""
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
