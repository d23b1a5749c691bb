"""Options that several commands have."""

from argparse import ArgumentParser, Namespace
from typing import Any


def select(args: Namespace, *names: str) -> dict[str, Any]:
    """The options with these names, as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def add_decoding(parser: ArgumentParser) -> None:
    """The stage directory that generates, and how it chooses tokens."""
    add = parser.add_argument
    add("directory", help="a stage directory; adapters included")
    add("--max_new_tokens", type=int, default=256, help="maximum tokens of an answer")
    add("--temperature", type=float, default=0.7, help="0 takes the most likely token each time")
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
