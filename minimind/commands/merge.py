"""`minimind merge`."""

from argparse import Namespace

from minimind.common.files import check_output
from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser("merge", help="merge an adapter into its base")
    parser.set_defaults(run=run)
    parser.add_argument("adapter", help="the stage directory of an adapter")
    parser.add_argument("out", help="stage directory to write; must be new or empty")


def run(args: Namespace) -> None:
    """Merge the adapter and verify what was written."""
    from minimind.common.launch import prepare_launch
    from minimind.export.merging import merge
    from minimind.export.verification import report

    prepare_launch(uses_deepspeed=False)
    check_output(args.out, directory=True)
    record = merge(args.adapter, args.out)
    say(f"{args.adapter} + {record['parent']['base']['directory']} -> {args.out}")
    say(report(record["verification"]))
