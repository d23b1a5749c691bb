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
    parser.set_defaults(run=run, json_in_pipes=True)
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
    choices = (
        "multiple choice: rows with question, choices and answer, or a folder of C-Eval, CMMLU"
    )
    add("--choices", nargs="+", metavar="FILE", help=choices)
    shots = "of --choices: examples from the split dev that precede a question"
    add("--num_shots", type=int, default=0, help=shots)
    chat = "of --choices: ask the questions as a user, in the chat template"
    add("--chat", action="store_true", help=chat)
    rules = "prompts with rules that the greedy reply has to follow: answer, number, regex ..."
    add("--rules", nargs="+", metavar="FILE", help=rules)
    replies = "prompts or chats to reply to: repetition, variety, ends, overlap with references"
    add("--replies", nargs="+", metavar="FILE", help=replies)
    decoding = "of --replies: greedy (default), or such as temperature=0.7,top_p=0.9; several too"
    add("--decoding", nargs="+", metavar="SETTING", help=decoding)
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
    new_tokens = (
        "maximum tokens of an answer (64; 256 of --rules and --replies); 0 measures the loss alone"
    )
    add("--max_new_tokens", type=int, help=new_tokens)
    add("--batch_size", type=int, default=64, help="maximum rows at a time")
    add_columns(parser)


def run(args: Namespace) -> None:
    """Evaluate the models, and print the card."""
    from minimind.common.terminal import Terminal
    from minimind.score_card import (
        Finished,
        card_table,
        cards_json,
        check_model,
        curve_of,
        curve_picture,
        curve_table,
        curves_json,
        differences,
        differences_table,
        make_card,
        picture,
        remarks,
        write_cards,
    )

    directories, files = split_paths(args.paths)
    checks = [name for name in ("controls", "contamination") if getattr(args, name)]
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
        cards = [make_card(directory, tasks, finished, checks) for directory in directories]
        wins = judged(asked, cards)
        if curve:
            report, tables, draw = curves_json(cards), [curve_table(cards)], curve_picture
        else:
            found = differences(cards)
            report = cards_json(cards, differences=found, win_rates=wins)
            tables, draw = [card_table(cards), differences_table(found)], picture
        tables = [table for table in tables if table.lines]
        if output:
            parts = [table.markdown() for table in tables] + [*map(in_markdown, wins)]
            text = "\n".join([*parts, *(f"- {remark}\n" for remark in remarks(cards))])
            write_cards(output, cards, report, text, draw)

    if args.json or not sys.stdout.isatty():
        print(json_text(report, indent=2))
        return
    for table in tables:
        Terminal().print(table.for_terminal())
    for win in wins:
        show(win)
    for remark in remarks(cards):
        Terminal().print(remark, markup=False)


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
    from minimind.score_card import HarnessTask, PairsTask, held_out_task, read_pairs

    tasks = []
    if files:
        columns = Columns(args.columns, args.unread_columns)
        options = select(args, "max_length", "batch_size")
        options["max_new_tokens"] = 64 if args.max_new_tokens is None else args.max_new_tokens
        tasks.append(held_out_task(files, args.stage, args.on_bad_rows, columns, **options))
    pairs = read_pairs(args.pairs, args.on_bad_rows) if args.pairs else []
    if args.own_set or args.write_own_set:
        pairs += make_own_pairs(args)
    if pairs:
        tasks.append(PairsTask(pairs))
    tasks += make_asking_tasks(args)
    if args.lm_eval:
        tasks.append(HarnessTask(args.lm_eval, args.include_path))
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


def make_asking_tasks(args: Namespace) -> list:
    """Multiple choice, and the tasks that judge replies; raises UserError."""
    from minimind.data.columns import Columns
    from minimind.score_card import (
        ChoicesTask,
        RepliesTask,
        RulesTask,
        parse_decodings,
        read_multiple_choice,
        read_referenced_prompts,
        read_ruled_prompts,
    )

    for given, options, task in (
        (args.chat or args.num_shots, "--chat and --num_shots", "choices"),
        (args.decoding, "--decoding", "replies"),
    ):
        if given and not getattr(args, task):
            raise UserError(f"{options}: found no --{task} that they could belong to. Give it too.")
    if args.max_new_tokens == 0 and (args.rules or args.replies):
        raise UserError("--max_new_tokens 0: --rules and --replies judge replies. Give 1 or more.")

    tasks, options = [], {"max_new_tokens": 256, **select(args, "batch_size")}
    if args.max_new_tokens is not None:
        options["max_new_tokens"] = args.max_new_tokens
    if args.choices:
        reading = args.on_bad_rows, Columns(args.columns)
        tasks.append(
            ChoicesTask(*read_multiple_choice(args.choices, args.num_shots, *reading), args.chat)
        )
    if args.rules:
        rows = read_ruled_prompts(args.rules, args.on_bad_rows, Columns(args.columns))
        tasks.append(RulesTask(rows, **options))
    if args.replies:
        decodings = parse_decodings(args.decoding or ["greedy"])
        rows = read_referenced_prompts(args.replies, args.on_bad_rows, Columns(args.columns))
        tasks.append(RepliesTask(rows, decodings, **options))
    return tasks


def split_paths(paths: list[str]) -> tuple[list[str], list[str]]:
    """The directories with models, of which the first path is one, and the other paths."""
    directories = [path for path in paths[1:] if is_model(Path(path))]
    return [paths[0], *directories], [path for path in paths[1:] if path not in directories]


def is_model(path: Path) -> bool:
    """Whether a directory holds a model, an adapter or a run."""
    names = ("config.json", "adapter_config.json", "run.json")
    return any((path / name).is_file() for name in names)
