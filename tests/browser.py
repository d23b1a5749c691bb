"""A headless Chromium that opens a page, presses keys and reads texts, over its debugging pipe."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager

from pipeline import wait_until

COMMAND = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


class Browser:
    """One page of a browser; `complaints` are what its console was told."""

    def __init__(self, write, read):
        self.write, self.read = write, read
        self.number, self.session, self.rest, self.complaints = 0, None, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Call a method of the DevTools protocol; returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(answer["params"])
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.rest:
            chunk = os.read(self.read, 1 << 16)
            assert chunk, "the browser has ended"
            self.rest += chunk
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def open(self, address):
        self.call("Page.navigate", url=address)

    def evaluate(self, script):
        """The value of an expression of JavaScript, or of what it promises."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=script, **options)
        return result["result"].get("value")

    def text(self, name):
        """The visible text of the element with this id; None if there is none."""
        return self.evaluate(f"document.getElementById({name!r})?.innerText")

    def wait_for(self, name, text):
        wait_until(lambda: self.text(name) == text, lambda: f"{name}: {self.text(name)!r}")

    def press(self, code):
        """Press and release a key, such as ArrowLeft or KeyT."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, code=code, key=code)


@contextmanager
def open_browser(profile, *further):
    """A browser with an empty profile and further options; it ends with the block."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    # It reads from 3 and writes to 4
    move = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", *further]
    process = subprocess.Popen(
        ["bash", "-c", move, "bash", COMMAND, *options, f"--user-data-dir={profile}"],
        pass_fds=(to_browser, from_browser),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(write, read)
    finally:
        process.kill()
        process.wait()
        os.close(write)
        os.close(read)
