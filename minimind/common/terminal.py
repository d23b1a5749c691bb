"""Terminal output, and messages typed in a terminal or read from a pipe. Loads no torch."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.segment import Segment

from minimind.common.language import say
from minimind.common.streams import printable

HOW_TO_END = "Ctrl-D or /exit ends the chat."


class Terminal(Console):
    """rich's console, except: text in it cannot control the terminal, and is neither coloured as
    numbers nor read as names of emoji."""

    def __init__(self, **options):
        super().__init__(highlight=False, emoji=False, **options)

    def render(self, renderable, options=None):
        """The segments to print; only rich's own may control the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def valid(text: str) -> str:
    """A text in which ? is what the terminal sent and its encoding does not know."""
    return text.encode(errors="replace").decode()


def read_messages(history: Path | None = None) -> Iterator[str]:
    """Yield messages from standard input until its end: the lines of a pipe, or the edited input of
    a terminal.

    In a terminal the arrows reach earlier messages, those of earlier chats too if there is a
    `history` file; pasting several lines makes one message; Ctrl-C drops the line.
    """
    if not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        yield from (valid(line.rstrip("\r\n")) for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk does not end the chat
                super().store_string(valid(string))

    if history:
        try:
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            history.chmod(0o600)  # for this user only, even if another program created it
            history.open("rb").close()
        except OSError as error:
            say(f"notice: what you type is not remembered: {error}", file=sys.stderr)
            history = None
    session = PromptSession(history=History(str(history)) if history else None)
    while True:
        try:
            message = session.prompt("> ", prompt_continuation="  ")
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                say(HOW_TO_END)
            continue
        except EOFError:
            return
        yield valid(message)
