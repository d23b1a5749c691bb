"""`minimind web`: a chat page in the browser for one model, or for two with a vote."""

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

from minimind.commands.serve import add_serving, require_libraries, start
from minimind.common.errors import UserError
from minimind.common.files import check_output
from minimind.common.language import say

CHOICES = {"tie": "equally good", "both_bad": "both are bad"}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "web",
        help="chat with a model in the browser, or compare two",
        description=(
            "Serves a chat page, and the models as `minimind serve` does. With two models both"
            " answer, side by side and without their names, and your votes are written as"
            " preference pairs for train_dpo.py."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("directory", metavar="DIR", help="a stage directory; adapters included")
    add("directory_b", metavar="DIR_B", nargs="?", help="another one, to compare with")
    text = "jsonl file that votes are added to as pairs; FILE.votes has all votes"
    add("--pairs", metavar="FILE", default="pairs.jsonl", help=text)
    add_serving(parser)


def run(args: Namespace) -> None:
    """Serve the page until Ctrl-C."""
    require_libraries()
    if args.directory_b is None:
        start(args, [args.directory], has_page=True)
        return

    from minimind.common.locks import lock, unlock
    from minimind.serving.web import Votes

    pairs = Path(args.pairs)
    if pairs.suffix != ".jsonl":
        raise UserError(f"{pairs}: expected a name that ends with .jsonl, such as pairs.jsonl.")
    check_output(pairs)
    pairs.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        cleanup.callback(unlock, lock(pairs.with_name(f".{pairs.name}.lock"), str(pairs)))
        votes = Votes(pairs)
        start(args, [args.directory, args.directory_b], votes, has_page=True)
    for choice, count in votes.choices.most_common():
        say(f"  {CHOICES.get(choice, choice)}: {count:,}")
    if votes.count:
        text = "Train on them: python train_dpo.py --train_files"
        say(f"{pairs}: {votes.count:,} pairs. {text} {pairs}")
