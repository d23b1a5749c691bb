"""A local web page on which a person chooses between two replies, by keyboard or mouse."""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from minimind.common.language import is_chinese
from minimind.pairs.making import Question

PAGE = Path(__file__).with_name("choosing.html")
CHOICES = ("left", "right", "tie", "skip")
LONGEST = 1000  # bytes of a choice


def choose(
    asked: Sequence[Question],
    choices: Mapping[int, str],
    keep: Callable[[int, str], None],
    port: int,
    announce: Callable[[str], None],
) -> None:
    """Serve the page on 127.0.0.1 until every question has a choice; `choices` are those so far.

    Args:
        keep: called with each new choice, also of a question that had one; it extends `choices`.
        port: 0 takes a free one.
        announce: called with the page's address, whose path is a secret: other pages in the
            browser, and other users of the machine, cannot choose.

    Raises:
        OSError: the port cannot be used, or a choice cannot be kept.
        KeyboardInterrupt: the person ended it; the choices so far were kept.
    """
    secret = secrets.token_urlsafe(16)
    page = PAGE.read_text(encoding="utf-8")
    digest = hashlib.sha256(re.search(r"<script>(.*)</script>", page, re.DOTALL)[1].encode())
    script = f"'sha256-{base64.b64encode(digest.digest()).decode()}'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; script-src {script}"
    )
    failures: list[OSError] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == f"/{secret}/":
                self.answer(200, page.encode(), "text/html")
            elif self.path == f"/{secret}/questions":
                shown = [_shown(number, each, choices) for number, each in enumerate(asked)]
                content = {"language": "zh" if is_chinese() else "en", "questions": shown}
                self.answer(200, json.dumps(content).encode(), "application/json")
            else:
                self.answer(404, b"not found", "text/plain")

        def do_POST(self):
            try:
                length = min(int(self.headers.get("Content-Length", 0)), LONGEST)
                value = json.loads(self.rfile.read(length))
                question, choice = value["question"], value["choice"]
                is_valid = question in range(len(asked)) and choice in CHOICES
            except (ValueError, KeyError, TypeError):
                is_valid = False
            if self.path != f"/{secret}/choice" or not is_valid:
                return self.answer(400, b"expected a question and a choice", "text/plain")
            try:
                with lock:
                    keep(question, choice)
            except OSError as error:
                failures.append(error)
            self.answer(500 if failures else 200, b"{}", "application/json")
            if failures or len(choices) == len(asked):
                threading.Thread(target=server.shutdown).start()
            return None

        def answer(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Security-Policy", policy)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            """Nothing: the terminal is for the person."""

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        announce(f"http://127.0.0.1:{server.server_port}/{secret}/")
        server.serve_forever()
    if failures:
        raise failures[0]


def _shown(number: int, question: Question, choices: Mapping[int, str]) -> dict:
    messages = [{"role": m["role"], "content": m["content"]} for m in question.prompt.messages]
    texts = {"left": question.left.text, "right": question.right.text}
    return {"prompt": messages, **texts, "choice": choices.get(number)}
