"""A local web page on which a person chooses between two replies, by keyboard or mouse."""

import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from minimind.common.errors import UserError
from minimind.common.language import is_chinese
from minimind.common.page import script_policy
from minimind.pairs.making import Question

PAGE = Path(__file__).with_name("choosing.html").read_text(encoding="utf-8")
CHOICES = ("left", "right", "tie", "skip")
LONGEST = 1000  # bytes of a choice


class ChoiceServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1; `serve_forever` ends when every question has a choice.

    The path of its `address` is a secret, so that neither other pages in the browser nor other
    users of the machine can choose. `failure` is the error by which a choice could not be kept.

    Args:
        choices: those so far, by the number of the question.
        keep: called with each new choice, also of a question that had one; it extends `choices`.
        port: 0 takes a free one.

    Raises:
        UserError: the port cannot be used.
    """

    def __init__(
        self,
        asked: Sequence[Question],
        choices: Mapping[int, str],
        keep: Callable[[int, str], None],
        port: int = 0,
    ):
        self.asked, self.choices, self.keep = asked, choices, keep
        self.secret, self.lock = secrets.token_urlsafe(16), threading.Lock()
        self.failure: OSError | None = None
        try:
            super().__init__(("127.0.0.1", port), ChoiceHandler)
        except OSError as error:
            raise UserError(
                f"--port {port}: cannot be used ({error.strerror}). Give another one, or 0 for any"
                " that is free."
            ) from error
        self.address = f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def content(self) -> dict[str, Any]:
        """What the page shows: language and questions."""
        questions = [
            {
                "prompt": [
                    {"role": message["role"], "content": message["content"]}
                    for message in question.prompt.messages
                ],
                "left": question.left.text,
                "right": question.right.text,
                "choice": self.choices.get(number),
            }
            for number, question in enumerate(self.asked)
        ]
        return {"language": "zh" if is_chinese() else "en", "questions": questions}

    def choose(self, question: int, choice: str) -> bool:
        """Keep a choice; whether it was kept. After the last one, or an error, serving ends."""
        with self.lock:
            try:
                self.keep(question, choice)
            except OSError as error:
                self.failure = error
        if self.failure or len(self.choices) == len(self.asked):
            threading.Thread(target=self.shutdown).start()  # it waits for this request
        return self.failure is None

    def handle_error(self, request, client_address) -> None:
        """A browser that hung up is no error."""


class ChoiceHandler(BaseHTTPRequestHandler):
    """Answers one request for a `ChoiceServer`."""

    server: ChoiceServer

    def do_GET(self) -> None:
        """The page, and its questions."""
        if self.path == f"/{self.server.secret}/":
            self._answer(200, PAGE, "text/html")
        elif self.path == f"/{self.server.secret}/questions":
            self._answer(200, json.dumps(self.server.content()), "application/json")
        else:
            self._answer(404, "not found")

    def do_POST(self) -> None:
        """A choice."""
        try:
            length = min(int(self.headers.get("Content-Length", 0)), LONGEST)
            value = json.loads(self.rfile.read(length))
            question, choice = value["question"], value["choice"]
            is_valid = type(question) is int and 0 <= question < len(self.server.asked)
        except (ValueError, KeyError, TypeError):
            is_valid, choice = False, None
        if self.path != f"/{self.server.secret}/choice" or not is_valid or choice not in CHOICES:
            self._answer(400, "expected a question and a choice")
        elif self.server.choose(question, choice):
            self._answer(200, "kept")
        else:
            self._answer(500, "not kept")

    def _answer(self, status: int, text: str, kind: str = "text/plain") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", script_policy(PAGE))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Nothing: the terminal is for the person."""
