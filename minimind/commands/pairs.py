"""`minimind pairs`."""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from minimind.commands.asking import add_asking, ask
from minimind.common.errors import UserError
from minimind.common.files import check_output, write_json_lines
from minimind.common.language import say
from minimind.common.streams import json_text

LEFT_OUT = {
    "too_long": "prompts too long for the model",
    "unusable": "replies that are empty or damaged",
    "equal": "prompts without two different replies",
    "unfinished": "prompts whose replies all reached the limit of tokens",
    "tie": "ties",
    "skip": "skipped",
    "open": "not chosen yet",
}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "pairs",
        help="make preference pairs from a model's own replies",
        description=(
            "Samples several replies to each prompt and writes the best and the worst of them as a"
            " preference pair for train_dpo.py. An interrupted command continues where it stopped."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("directory", help="the stage directory that replies; adapters included")
    add("prompts", help="prompts, one a line, or chats, whose last reply is left out")
    add("out", help="jsonl file to write; OUT.samples, beside it, holds what was sampled")
    human = "a person chooses between two replies, on a page in the browser"
    add("--human", action="store_true", help=human)
    add("--port", type=int, default=0, help="port of that page; 0 takes a free one")
    add_asking(parser, samples=4, temperature=1.0)


def run(args: Namespace) -> None:
    """Sample, judge, and write the pairs."""
    from minimind.common.locks import lock, unlock
    from minimind.evaluation import sample_replies
    from minimind.pairs import (
        Record,
        describe_pairs,
        ranked_pairs,
        replies_depend_on,
    )

    # What can be refused at once
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: expected a name that ends with .jsonl, such as pairs.jsonl.")
    check_output(out, inputs=[args.prompts])
    asked = ask(args, [args.directory], [args.prompts], "human")
    prompts, (ids,), (model,) = asked.prompts, asked.ids, asked.models

    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        cleanup.callback(unlock, lock(out.with_name(f".{out.name}.lock"), str(out)))
        record = Record(out, replies_depend_on(args.directory, ids, asked.sampling))
        if not record.check_out(asked.judge_option) or args.human:
            counts = Counter(too_long=asked.too_long)
            # Each step is judged as it comes: what a judge refuses shows early
            done, keep = record.steps, record.keep_step
            steps = sample_replies(*model, ids, asked.sampling, done, keep)
            with continues():
                if args.human:
                    rows = choose(prompts, steps, counts, record, args.port)
                else:
                    rows = ranked_pairs(prompts, steps, asked.judge, counts)
            facts = describe_pairs(out, rows) | {"left_out": {k: n for k, n in counts.items() if n}}
            facts |= {"prompts": len(prompts) + asked.too_long, "samples": args.samples}
            record.keep_result(
                {"judge": asked.judge_option, **facts}
            )  # first, so that it is known whose pairs they are
            write_json_lines(out, rows)
    if args.json:
        print(json_text(record.result, indent=2))
    else:
        show(record.result, args)


@contextmanager
def continues() -> Iterator[None]:
    """Say on an interruption that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        text = "nothing sampled is lost: run the same command again to continue"
        say(text, file=sys.stderr)
        raise


def choose(prompts, steps, counts: Counter, record, port: int) -> list[dict]:
    """The pairs that a person chooses, until all are chosen or Ctrl-C."""
    from minimind.pairs import ChoiceServer, chosen_pairs, questions

    asked = questions(prompts, steps, counts)
    if len(record.choices) < len(asked):
        with ChoiceServer(asked, record.choices, record.keep_choice, port) as server:
            count = len(asked) - len(record.choices)
            say(f"{count:,} questions at {server.address}", file=sys.stderr)
            say("Ctrl-C ends; the same command continues from here", file=sys.stderr)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        if server.failure:
            raise server.failure
    rows = chosen_pairs(asked, record.choices, counts)
    if asked and not rows:
        raise UserError(
            f"no reply was chosen, so {record.out} was not written. The same command continues from"
            " here."
        )
    return rows


def show(result: dict, args: Namespace) -> None:
    """Print the report on the pairs."""
    say(
        f"{args.out}: {result['pairs']:,} pairs from {result['prompts']:,} prompts,"
        f" {result['samples']} replies to each"
    )
    for side in ("chosen", "rejected"):
        score = result.get(f"{side}_score")
        score = "" if score is None else f", mean score {score:.4g}"
        say(f"  {side}: {result[f'{side}_characters']:g} characters on average{score}")
    for name, count in result["left_out"].items():
        say(f"  {LEFT_OUT[name]}: {count:,}")
    say(
        f"Train on them: python train_dpo.py --model_name_or_path {args.directory} --train_files"
        f" {args.out}"
    )
