"""`minimind replay`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout

from minimind.commands.options import add_json
from minimind.common.streams import json_text


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "replay", help="compute the loss of a kept batch again: which rows, which layer"
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("directory", help="the bad_batch-STEP directory of a run")
    add("--model", help="stage directory with the weights; default: those kept with the batch")
    add("--precision", choices=("fp32", "bf16"), help="default: that of the run")
    add_json(parser)


def run(args: Namespace) -> None:
    """Replay the batch."""
    from minimind.training.replay import print_replay, replay

    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        report = replay(args.directory, args.model, args.precision)
    if args.json:
        print(json_text(report))
    else:
        print_replay(report)
