"""`minimind clean`."""

from argparse import Namespace

from minimind.commands.options import add_bad_rows, add_columns, add_json, select
from minimind.common.files import check_output
from minimind.common.streams import json_text, printable


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "clean", help="clean, filter and deduplicate data, with a report of each step"
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    source = "files, directories or globs of rows of any kind"
    add("files", nargs="+", metavar="SRC", help=source)
    destination = "directory to write: shards, report.json, report.html"
    add("destination", metavar="DST", help=destination)
    recipe = "YAML file with the steps, such as configs/data/pretrain.yaml"
    add("--recipe", required=True, help=recipe)
    processes = "processes; default: all cores. The result is the same"
    add("--num_proc", type=int, help=processes)
    add_bad_rows(parser)
    unit = "what one row of a txt file is (default: the whole file)"
    add("--text_unit", choices=("file", "paragraph", "line"), default="file", help=unit)
    add_json(parser, "print the report as one JSON object")
    add_columns(parser, unread=False)


def run(args: Namespace) -> None:
    """Clean the files and print the report."""
    from minimind.cleaning import clean
    from minimind.cleaning.report import report_text

    check_output(args.destination, directory=True)
    options = select(args, "num_proc", "on_bad_rows", "text_unit", "columns")
    report = clean(args.files, args.destination, args.recipe, **options)
    print(json_text(report) if args.json else printable(report_text(report)))
