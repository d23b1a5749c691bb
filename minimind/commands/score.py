"""`minimind score`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout

from minimind.commands.options import add_bad_rows, add_columns
from minimind.common.files import check_output, write_json_lines
from minimind.common.language import say
from minimind.common.streams import json_text


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score the replies of conversations or preference pairs by a reward model",
        description=(
            "Prints a line of JSON for each row: the reward of each reply of a conversation, or of"
            " the chosen and the rejected reply of a pair. For pairs it also says how many are"
            " ranked as chosen."
        ),
    )
    parser.set_defaults(run=run, json=True)  # without the option: its output is always JSON
    add = parser.add_argument
    add("directory", help="a stage directory of train_reward.py; adapters included")
    add("files", nargs="+", help="files, directories or globs of conversations or pairs")
    add("--out", metavar="FILE", help="write the lines to this file instead")
    add_bad_rows(parser)
    add_columns(parser)


def run(args: Namespace) -> None:
    """Score the files."""
    from minimind.data.columns import Columns
    from minimind.evaluation import RewardModel, read_rewards, score_files

    if args.out:
        check_output(args.out, inputs=args.files)
    columns = Columns(args.columns, args.unread_columns)
    with redirect_stdout(sys.stderr):  # stdout is the rows' alone
        reward = RewardModel.load(args.directory)
        rows, metrics = score_files(reward, args.files, args.on_bad_rows, columns)
        for sentence in read_rewards(metrics) if metrics else ():
            say(sentence)
    if args.out:
        write_json_lines(args.out, rows)
    else:
        for row in rows:
            print(json_text(row))
