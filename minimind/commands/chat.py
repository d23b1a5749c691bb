"""`minimind chat`."""

from argparse import Namespace

from minimind.commands.shared_options import add_decoding_options


def add_parser(commands) -> None:
    """Add the command."""
    parser = commands.add_parser("chat", help="talk to a chat model in the terminal")
    parser.set_defaults(run=run)
    add_decoding_options(parser)
    parser.add_argument("--system", help="system prompt")
    history = "do not keep what is typed for the next chat"
    parser.add_argument("--no_history", action="store_true", help=history)


def run(args: Namespace) -> None:
    """Answer messages until the input ends."""
    from minimind.commands.chat_session import chat

    decoding = (args.max_new_tokens, args.temperature, args.top_p, args.seed)
    chat(args.directory, args.system, *decoding, not args.no_history)
