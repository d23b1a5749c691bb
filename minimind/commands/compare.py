"""`minimind compare`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from minimind.commands.asking import add_asking, ask
from minimind.commands.options import select
from minimind.common.files import check_output, write_text
from minimind.common.language import say, translated
from minimind.common.streams import json_text

READING = ("on_bad_rows", "max_length", "batch_size")  # of held-out files


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="whose replies are better: win rate of one model over another, with an interval",
        description=(
            "Samples replies of both models to the same prompts with the same seeds, judges them,"
            " and reports B's win rate over A, and what may have been lost: perplexity, length,"
            " repetition, ends of replies."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "directory_a",
        metavar="A",
        help="a stage directory, such as the model before; adapters included",
    )
    add("directory_b", metavar="B", help="another one, such as the model after")
    add("prompts", help="prompts, one a line, or chats, whose last reply is left out")
    files = "held-out conversations or documents, whose perplexity must not rise"
    add("--perplexity_files", nargs="+", help=files)
    length = "tokens of a row of these files: longer documents are cut into several"
    add("--max_length", type=int, default=1024, help=length)
    add("--html", metavar="FILE", help="also write a page with the replies side by side")
    add("--rows", type=int, default=200, help="prompts on that page")
    add_asking(parser, samples=1, temperature=0.7)


def run(args: Namespace) -> None:
    """Compare two models, and print the report."""
    from minimind.evaluation import compare_models, comparison_page, held_out_losses

    if args.html:
        check_output(args.html)
    asked = ask(args, [args.directory_a, args.directory_b], [args.prompts])
    losses = []
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        if args.perplexity_files:
            files, options = args.perplexity_files, select(args, *READING)
            losses = [held_out_losses(*model, files, **options) for model in asked.models]
        (found,) = compare_models(asked, losses)

    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        parts = (each[: args.rows] for each in found[1:])
        write_text(args.html, comparison_page(found.report, *parts))
    if args.json:
        print(json_text(found.report, indent=2))
    else:
        show(found.report)


COLUMNS = ("measure", "A", "B")


def show(report: dict) -> None:
    """Print a report: a table, what it says, and the warnings."""
    from minimind.common.terminal import Terminal
    from minimind.evaluation.comparison import sentence, summary_rows
    from minimind.score_card import Table

    lines = [[translated(title), *values] for title, *values in summary_rows(report)]
    for name in "ab":
        say(f"{name.upper()}: {report[name]['directory']}")
    Terminal().print(Table(COLUMNS, lines, lines).for_terminal())
    say(sentence(report["win_rate"]))
    for warning in report["warnings"]:
        say(f"warning: {warning}")


def in_markdown(report: dict) -> str:
    """The same for a file."""
    from minimind.evaluation.comparison import sentence, summary_rows
    from minimind.score_card import Table

    names = "".join(f"{name.upper()}: {report[name]['directory']}\n" for name in "ab")
    said = [sentence(report["win_rate"]), *report["warnings"]]
    table = Table(COLUMNS, summary_rows(report), ()).markdown()
    return f"{names}\n{table}\n" + "".join(f"{text}\n" for text in said)
