"""What commands share that sample replies to prompts and judge them."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout

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

LENGTH = 256  # tokens of a reply at most, where the command names no number
SAMPLING = ("samples", "max_new_tokens", "temperature", "top_p", "seed", "batch_size")


def add_asking(parser: ArgumentParser, samples: int, temperature: float) -> None:
    """The judge, how replies are sampled, and how prompts are read."""
    add_judge(parser)
    add = parser.add_argument
    add("--samples", type=int, default=samples, help="replies of a model to each prompt")
    add_sampling(parser, temperature)
    add("--batch_size", type=int, default=64, help="maximum replies at a time")
    add_bad_rows(parser)
    add_columns(parser, unread=False)
    add_json(parser)


def ask(args: Namespace, directories: Sequence[str], files: Sequence[str], *others: str):
    """Load the judge and the models and read the prompts: an `evaluation.Asked`. `others` are
    options that may stand in the judge's place.

    Raises:
        UserError: one of them cannot be used; see `given_judge`.
    """
    from minimind.data.chat_encoder import ChatEncoder
    from minimind.data.columns import Columns
    from minimind.data.prompts import read_prompts
    from minimind.evaluation import Asked, Sampling, encode_fitting, make_judge
    from minimind.generation import load_for_generation

    option, length = given_judge(args, *others), args.max_new_tokens or LENGTH
    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        judge = None if option.keys() & set(others) else make_judge(**option)
        models = [load_for_generation(directory) for directory in directories]
        for directory, (_, tokenizer) in zip(directories, models, strict=True):
            check_chattable(directory, tokenizer)
        encoder, columns = ChatEncoder(models[0][1]), Columns(args.columns)
        found = read_prompts(files, encoder, args.on_bad_rows, columns)
        prompts, ids = encode_fitting(found, models, length)
    sampling = Sampling(**select(args, *SAMPLING) | {"max_new_tokens": length})
    too_long = len(found) - len(prompts)
    return Asked(directories, models, prompts, ids, sampling, judge, option, too_long)
