"""`minimind serve`: an OpenAI-compatible endpoint for one or several models."""

import os
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from minimind.common.errors import UserError, install
from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve models as the OpenAI API does",
        description=(
            "Serves models under the OpenAI API: chat completions, completions, models. Each is"
            " exported to the stock layout once."
        ),
    )
    parser.set_defaults(run=run)
    help = "stage directories; adapters included. A model's name is its directory's"
    parser.add_argument("directories", nargs="+", metavar="DIR", help=help)
    add_serving(parser)


def add_serving(parser: ArgumentParser) -> None:
    """Where a server listens, who may use it, and how much it does at a time."""
    add = parser.add_argument
    add("--port", type=int, default=8000, help="port to listen at; 0 takes a free one")
    text = "address to listen at; 0.0.0.0 is all of this machine, which others then reach"
    add("--host", default="127.0.0.1", help=text)
    text = "file with the key that requests must send; by default $MINIMIND_API_KEY, if it is set"
    add("--api_key_file", metavar="FILE", help=text)
    text = "maximum tokens of an answer whose request has no max_tokens"
    add("--max_new_tokens", type=int, default=512, help=text)
    add("--batch_size", type=int, default=32, help="maximum texts written at a time")


def run(args: Namespace) -> None:
    """Serve until Ctrl-C."""
    require_libraries()
    start(args, args.directories)


def require_libraries() -> None:
    """Raise UserError where a library of the extra `serve` is missing."""
    try:
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: {install('serve')}.") from None


def start(
    args: Namespace, directories: list[str], votes: Any = None, has_page: bool = False
) -> None:
    """Listen, load the models, and serve them, with a page and the votes on it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is asked of the network
    from minimind.common.launch import prepare_launch
    from minimind.serving.app import Endpoint, build_app
    from minimind.serving.models import Served, names_of
    from minimind.serving.server import host_names, is_loopback, listen, read_key
    from minimind.serving.server import run as serve
    from minimind.serving.web import routes

    # What can be refused at once
    names, key = names_of(directories), read_key(args.api_key_file)
    with listen(args.host, args.port) as listening:
        if not is_loopback(args.host) and not key:
            say(
                f"notice: everybody who reaches {args.host} can use this server. --api_key_file"
                " FILE asks for a key.",
                file=sys.stderr,
            )

        prepare_launch(uses_deepspeed=False)
        models = [
            Served(directory, name, args.batch_size)
            for directory, name in zip(directories, names, strict=True)
        ]
        if votes and (bases := [served.directory for served in models if served.is_base]):
            raise UserError(
                f"{bases[0]} is a base model, which continues texts: replies are compared of chat"
                " models only. Train it on conversations with finetune_sft.py."
            )
        endpoint = Endpoint(models, args.max_new_tokens)
        app = build_app(endpoint, key, host_names(args.host), routes(votes) if has_page else ())
        for served in models:
            kind = "base model: completions only" if served.is_base else "chat model"
            say(f"{served.name}: {served.directory} ({kind}), exported to {served.path}")
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        address += "/" if has_page else "/v1"
        say(f"{address} (Ctrl-C ends)")
        serve(app, listening)
