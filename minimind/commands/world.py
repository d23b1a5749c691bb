"""`minimind world`."""

from argparse import Namespace
from pathlib import Path

from minimind.common.files import check_output
from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser("world", help="write the embedded corpus as files")
    parser.set_defaults(run=run)
    parser.add_argument("directory", help="directory to write")


def run(args: Namespace) -> None:
    """Write the files of the embedded corpus."""
    from minimind.data.world import write_world

    check_output(args.directory, directory=True)
    for name, path in write_world(Path(args.directory)).items():
        say(f"{name:<14} {path}")
