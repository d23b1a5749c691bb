"""Options that several commands have."""

from argparse import ArgumentParser, Namespace
from typing import Any

from minimind.common.errors import UserError


def select(args: Namespace, *names: str) -> dict[str, Any]:
    """The options with these names, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def add_decoding(parser: ArgumentParser) -> None:
    """The stage directory that generates, and how it chooses tokens."""
    parser.add_argument("directory", help="a stage directory; adapters included")
    add_sampling(parser)


def add_sampling(
    parser: ArgumentParser, temperature: float = 0.7, max_new_tokens: int | None = 256
) -> None:
    """How a model that generates chooses tokens; without `max_new_tokens` the command has an option
    of its own for that."""
    add = parser.add_argument
    if max_new_tokens:
        text = "maximum tokens of an answer"
        add("--max_new_tokens", type=int, default=max_new_tokens, help=text)
    text = "0 takes the most likely token each time"
    add("--temperature", type=float, default=temperature, help=text)
    add("--top_p", type=float, default=0.9, help="nucleus that tokens are sampled from")
    add("--seed", type=int, default=42, help="seed of the sampling")


def add_columns(parser: ArgumentParser, unread: bool = True) -> None:
    """`--columns`, and `--unread_columns` for commands that refuse columns nothing reads."""
    text = "the meanings of columns with other names, such as prompt=问题 response=回答"
    parser.add_argument("--columns", nargs="+", metavar="MEANING=COLUMN", help=text)
    if unread:
        text = "columns to leave out, or ignore: all that nothing reads"
        parser.add_argument("--unread_columns", nargs="+", help=text)


def add_bad_rows(
    parser: ArgumentParser, text: str = "default: leave out at most 0.1 %% of the rows"
) -> None:
    """`--on_bad_rows`."""
    parser.add_argument("--on_bad_rows", choices=("error", "skip"), help=text)


def add_json(parser: ArgumentParser, text: str = "print one JSON object instead") -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help=text)


JUDGES = ("reward_model", "rule", "pairwise_rule", "rule_regex", "by_length")


def add_judge(parser: ArgumentParser) -> None:
    """The options of `JUDGES`, of which one is given."""
    add = parser.add_argument
    add("--reward_model", metavar="DIR", help="judge by this reward model")
    rule = "judge by a function of (messages, reply) that returns a number, or true or false"
    add("--rule", metavar="FILE.py:FUNCTION", help=rule)
    rule = "judge by a function of (messages, first, second): above 0, or true, if first is better"
    add("--pairwise_rule", metavar="FILE.py:FUNCTION", help=rule)
    rule = "judge by a regular expression: a reply it is found in is better"
    add("--rule_regex", metavar="PATTERN", help=rule)
    add("--by_length", choices=("shorter", "longer"), help="judge by the number of characters")


def given_judge(args: Namespace, *others: str) -> dict[str, Any]:
    """The option that names the judge, with its value.

    `others` are names of options that may stand in its place. Raises UserError for several or none.
    """
    names = [*JUDGES, *others]
    given = {name: value for name in names if (value := getattr(args, name))}
    if len(given) != 1:
        found = ", ".join(f"--{name}" for name in given) or "none"
        expected = ", ".join(f"--{name}" for name in names)
        raise UserError(f"found {found}, expected one of {expected}.")
    return given
