"""`minimind compare`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from minimind.commands.chat import check_chattable
from minimind.commands.options import (
    add_bad_rows,
    add_columns,
    add_json,
    add_judge,
    add_sampling,
    given_judge,
    select,
)
from minimind.commands.pairs import SAMPLING
from minimind.common.files import check_output, write_text
from minimind.common.language import say, translated
from minimind.common.streams import json_text


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
    add_judge(parser)
    add("--samples", type=int, default=1, help="replies of each model to each prompt")
    add_sampling(parser)
    add("--batch_size", type=int, default=64, help="maximum replies at a time")
    files = "held-out conversations or documents, whose perplexity must not rise"
    add("--perplexity_files", nargs="+", help=files)
    length = "tokens of a row of these files: longer documents are cut into several"
    add("--max_length", type=int, default=1024, help=length)
    add("--html", metavar="FILE", help="also write a page with the replies side by side")
    add("--rows", type=int, default=200, help="prompts on that page")
    add_bad_rows(parser)
    add_columns(parser, unread=False)
    add_json(parser)


def run(args: Namespace) -> None:
    """Compare two models, and print the report."""
    from minimind.data.chat_encoder import ChatEncoder
    from minimind.data.columns import Columns
    from minimind.data.prompts import read_prompts
    from minimind.evaluation import (
        Sampling,
        compare_replies,
        comparison_page,
        comparison_report,
        describe_replies,
        encode_fitting,
        held_out_losses,
        make_judge,
        sample_replies,
    )
    from minimind.generation import load_for_generation
    from minimind.tokenizer import tokenizer_hash

    # What can be refused at once
    judge_option = given_judge(args)
    if args.html:
        check_output(args.html)
    directories, described, replies = (args.directory_a, args.directory_b), [], []
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        judge = make_judge(**judge_option)
        models = [load_for_generation(directory) for directory in directories]
        for directory, (_, tokenizer) in zip(directories, models, strict=True):
            check_chattable(directory, tokenizer)
        encoder, columns = ChatEncoder(models[0][1]), Columns(args.columns)
        found = read_prompts([args.prompts], encoder, args.on_bad_rows, columns)
        prompts, encoded = encode_fitting(found, models, args.max_new_tokens)
        sampling = Sampling(**select(args, *SAMPLING))

        # Of each model: its loss on held-out files, its replies, and what they are like
        for directory, model, ids in zip(directories, models, encoded, strict=True):
            losses = {}
            if args.perplexity_files:
                options = select(args, "on_bad_rows", "max_length", "batch_size")
                losses = held_out_losses(*model, args.perplexity_files, **options)
            steps = sample_replies(*model, ids, sampling, title=directory)
            replies.append([each for _, step in steps for each in step])
            described.append({"directory": directory, **describe_replies(replies[-1]), **losses})
        compared = compare_replies(prompts, *replies, judge)
    one, other = (tokenizer_hash(tokenizer) for _, tokenizer in models)
    report = comparison_report(*described, compared, judge, same_tokenizer=one == other)
    options = {**select(args, *SAMPLING), "too_long": len(found) - len(prompts)}
    report |= {"judge": judge_option, **options}

    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        shown = [each[: args.rows] for each in (prompts, *replies, compared)]
        write_text(args.html, comparison_page(report, *shown))
    if args.json:
        print(json_text(report, indent=2))
    else:
        show(report)


def show(report: dict) -> None:
    """Print a report: a table, what it says, and the warnings."""
    from rich.table import Table

    from minimind.common.terminal import Terminal
    from minimind.evaluation.comparison import sentence, summary_rows

    table = Table()
    table.add_column(translated("measure"))
    for name in ("A", "B"):
        table.add_column(name, justify="right")
    for title, *values in summary_rows(report):
        table.add_row(translated(title), *values)
    for name in "ab":
        say(f"{name.upper()}: {report[name]['directory']}")
    Terminal().print(table)
    say(sentence(report["win_rate"]))
    for warning in report["warnings"]:
        say(f"warning: {warning}")
