"""Run an application on a socket until a signal ends it."""

import asyncio
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from minimind.common.errors import UserError
from minimind.common.files import read_file
from minimind.common.language import say

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
KEY = "MINIMIND_API_KEY"
PATIENCE = 5  # seconds for answers that are under way when a signal comes
GRACE = 2  # more, for clients to receive that theirs was stopped


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UserError: the port is in use, or there is no such address here.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0  # below 0: of the resolver
        problem = os.strerror(number) if number > 0 else getattr(error, "strerror", str(error))
        raise UserError(
            f"--host {host} --port {port}: cannot be used ({problem}). Give another port, or 0 for"
            " any that is free."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_names(host: str) -> tuple[str, ...]:
    """The names by which requests may address a server that listens at `host`: where only this
    machine reaches it, its own ones, because a page of another site could use it by a name that
    leads here; else any."""
    return (*LOCAL_NAMES, host) if is_loopback(host) else ("*",)


def read_key(file: str | None) -> str | None:
    """The key that requests have to send, from a file or $MINIMIND_API_KEY; None without one.

    Raises:
        UserError: it cannot be read, or is no word of printable ASCII.
    """
    where = file or f"${KEY}"
    remedy = "Give a file with the key as its only content."
    key = read_file(Path(file), remedy).decode(errors="replace") if file else os.environ.get(KEY)
    key = (key or "").strip()
    if key and not re.fullmatch(r"[!-~]{8,}", key):
        raise UserError(
            f"{where}: found no usable key, expected at least 8 letters, digits or signs of ASCII"
            " without spaces."
        )
    return key or None


class Server(uvicorn.Server):
    """uvicorn's server, except: answers that are not complete PATIENCE seconds after a signal end
    with an error, which cancelled tasks would not send."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called after a signal."""
        timer = asyncio.get_running_loop().call_later(PATIENCE, self.end)
        await super().shutdown(sockets)
        timer.cancel()

    def end(self) -> None:
        """End all answers."""
        self.config.app.state.stop()
        # Clients that neither send nor receive are cut GRACE later, each with a traceback
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def make_server(app: Starlette) -> uvicorn.Server:
    """The server of an application, whose `state.stop` ends what it is doing."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",  # it limits the size of headers; httptools does not
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=PATIENCE + GRACE,
            server_header=False,
            ws="none",
        )
    )


def run(app: Starlette, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    # uvicorn raises a signal again after its shutdown, for the handlers that it found
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        make_server(app).run(sockets=[listening])
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    say("stopped", file=sys.stderr)
