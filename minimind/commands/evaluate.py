"""`minimind evaluate`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from minimind.commands.asking import ask
from minimind.commands.compare import in_markdown, show
from minimind.commands.options import (
    JUDGES,
    add_bad_rows,
    add_columns,
    add_json,
    add_judge,
    add_sampling,
    select,
)
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
    own = "minimal pairs of our own in English and Chinese; the default without files and tasks"
    add("--own_set", choices=("all", "en", "zh"), help=own)
    write = "evaluate by our own pairs, and write them there, for --pairs or --eval_pairs"
    add("--write_own_set", metavar="FILE", help=write)
    prompts = (
        "of several models: prompts, one a line, or chats; the replies of the later ones are judged"
        " against the first one's, by one of the options that follow"
    )
    add("--prompts", nargs="+", metavar="FILE", help=prompts)
    add_judge(parser)
    add("--samples", type=int, default=1, help="replies to each of --prompts")
    add_sampling(parser, max_new_tokens=None)
    checkpoints = "the directories are runs: a curve over the checkpoints of each"
    add("--checkpoints", action="store_true", help=checkpoints)
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
    from minimind.score_card import (
        Finished,
        cards_json,
        check_model,
        curve_of,
        curve_picture,
        curve_table,
        curves_json,
        differences,
        differences_table,
        make_card,
        markdown,
        picture,
        table_of,
        write_cards,
    )

    directories, files = split_paths(args.paths)
    output = Path(args.output) if args.output else None
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        # What can be refused at once
        if output:
            check_output(output, directory=True)
        curve = curve_of(directories, args.checkpoints)
        directories = curve or directories
        tasks = make_tasks(args, files)
        for directory in directories:
            check_model(directory, tasks)
        asked = ask_models(args, directories)

        if output:
            output.mkdir(parents=True, exist_ok=True)
        finished = Finished(output / "finished.jsonl" if output else None)
        cards = [make_card(directory, tasks, finished) for directory in directories]
        wins = judged(asked, cards)
        if curve:
            table = curve_table(cards)
            report, draw = curves_json(cards), curve_picture
            tables, texts = [table.for_terminal()], [table.markdown()]
        else:
            found = differences(cards)
            table = differences_table(found)
            report, draw = cards_json(cards, differences=found, win_rates=wins), picture
            tables, texts = [table_of(cards)], [markdown(cards), *map(in_markdown, wins)]
            if found:
                tables.append(table.for_terminal())
                texts.insert(1, table.markdown())
        if output:
            write_cards(output, cards, report, "\n".join(texts), draw)

    if args.json or not sys.stdout.isatty():
        print(json_text(report, indent=2))
        return
    for table in tables:
        Terminal().print(table)
    for win in wins:
        show(win)


def ask_models(args: Namespace, directories: list[str]):
    """Load the models and read the prompts of a comparison, if there are any.

    Raises:
        UserError: options do not fit together, or see `ask`.
    """
    if not args.prompts:
        if given := [f"--{name}" for name in JUDGES if getattr(args, name)]:
            raise UserError(f"{given[0]} judges the replies to --prompts FILE. Give it too.")
        return None
    if len(directories) < 2:
        raise UserError("--prompts compares replies of several models, and there is one. Give two.")
    return ask(args, directories, args.prompts)


def judged(asked, cards: list) -> list[dict]:
    """The reports on the win rates of the later models over the first."""
    from minimind.evaluation import compare_models

    if asked is None:
        return []
    losses = []
    for card in cards:
        entries = card.entries()
        names = [name for name in ("perplexity", "bits_per_byte") if name in entries]
        losses.append({name: entries[name] for name in names})
    return [each.report for each in compare_models(asked, losses)]


def make_tasks(args: Namespace, files: list[str]) -> list:
    """What the models are scored by.

    Raises:
        UserError: a file cannot be used.
    """
    from minimind.data.columns import Columns
    from minimind.score_card import PairsTask, held_out_task, read_pairs

    tasks = []
    if files:
        columns = Columns(args.columns, args.unread_columns)
        options = select(args, "max_length", "max_new_tokens", "batch_size")
        tasks.append(held_out_task(files, args.stage, args.on_bad_rows, columns, **options))
    pairs = read_pairs(args.pairs, args.on_bad_rows) if args.pairs else []
    if args.own_set or args.write_own_set:
        pairs += make_own_pairs(args)
    if pairs:
        tasks.append(PairsTask(pairs))
    if tasks or args.prompts:
        return tasks
    return [PairsTask(make_own_pairs(args))]


def make_own_pairs(args: Namespace) -> list:
    """The pairs of our own set, written to a file where that is wanted; raises UserError."""
    from minimind.score_card import own_pairs, write_pairs

    pairs = own_pairs() if args.own_set in (None, "all") else own_pairs([args.own_set])
    if args.write_own_set:
        check_output(args.write_own_set)
        write_pairs(pairs, Path(args.write_own_set))
    return pairs


def split_paths(paths: list[str]) -> tuple[list[str], list[str]]:
    """The directories with models, of which the first path is one, and the other paths."""
    directories = [path for path in paths[1:] if is_model(Path(path))]
    return [paths[0], *directories], [path for path in paths[1:] if path not in directories]


def is_model(path: Path) -> bool:
    """Whether a directory holds a model, an adapter or a run."""
    names = ("config.json", "adapter_config.json", "run.json")
    return any((path / name).is_file() for name in names)
