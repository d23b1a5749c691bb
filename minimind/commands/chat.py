"""`minimind chat`: talk to a model in the terminal."""

import sys
from argparse import Namespace
from pathlib import Path

from minimind.commands.best_of import add_best_of, load_reward_model
from minimind.commands.options import add_decoding
from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.common.terminal import read_messages


def add_parser(commands) -> None:
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    parser.set_defaults(run=run)
    add_decoding(parser)
    add_best_of(parser)
    parser.add_argument("--system", help="system prompt")
    history = "do not remember messages for the next chat"
    parser.add_argument("--no_history", action="store_true", help=history)


def run(args: Namespace) -> None:
    """Read messages from standard input until its end, and answer each or obey it."""
    from transformers import set_seed

    from minimind.commands.session import ChatSession, TextSession
    from minimind.generation import is_base_model, load_for_generation

    reward = load_reward_model(args)
    model, tokenizer = load_for_generation(args.directory)
    continues = is_base_model(args.directory, tokenizer)
    if continues and (reward or args.system):
        raise UserError(
            f"{args.directory} is a base model, which continues texts: --system and --best_of need"
            " a chat model. Train it on conversations with finetune_sft.py."
        )
    set_seed(args.seed)
    kind = TextSession if continues else ChatSession
    session = kind(model, tokenizer, args, reward)
    if continues:
        say(
            f"notice: {args.directory} is a base model: it continues the texts you begin, and has"
            " not learned to answer. Train it on conversations with finetune_sft.py.",
            file=sys.stderr,
        )
    interactive = sys.stdin.isatty()
    if interactive:
        millions = f"{model.num_parameters() / 1e6:.1f}"
        say(f"{args.directory}: {millions} M parameters. Type a message, or /help.")
    for text in read_messages(None if args.no_history or not interactive else history_file()):
        if not session.take(text, interactive):
            return
    print()


def history_file() -> Path | None:
    """The file that remembers typed messages; None, with a notice, where it cannot be kept."""
    from minimind.common.cache import cache_directory

    try:
        return cache_directory(permanent=True) / "chat_history"
    except UserError as problem:
        say(f"notice: what you type is not remembered: {problem}", file=sys.stderr)
        return None


def check_chattable(directory: str, tokenizer) -> None:
    """Raise UserError if there is no chat template; warn if the model is only pretrained."""
    from minimind.generation import is_base_model

    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which separates messages from"
            " replies. `minimind generate` continues texts; finetune_sft.py --chat_template chatml"
            " turns it into a chat model."
        )
    if is_base_model(directory, tokenizer):
        say(
            f"notice: {directory} is a base model: it continues texts and has not learned to"
            " answer. See `minimind generate`, or train it on conversations with finetune_sft.py.",
            file=sys.stderr,
        )
