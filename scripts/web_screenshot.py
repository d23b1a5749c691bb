"""Take the picture of the chat page that the README shows, in a headless Chromium.

python scripts/web_screenshot.py docs/web.png runs/quickstart/sft runs/quickstart/dpo
"""

import argparse
import base64
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import open_browser
from pipeline import wait_until

QUESTIONS = ("What instrument does Greta play?", "Greta 最喜欢的颜色是什么？")
SIZE = {"width": 960, "height": 720, "deviceScaleFactor": 1, "mobile": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("directory")
    parser.add_argument("directory_b")
    parser.add_argument("--questions", nargs=2, default=QUESTIONS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "minimind.cli", "web", args.directory, args.directory_b]
        command += ["--port", "0", "--pairs", f"{root}/pairs.jsonl"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            address = next(line for line in server.stdout if line.startswith("http")).split()[0]
            with open_browser(f"{root}/profile") as browser:
                browser.call("Emulation.setDeviceMetricsOverride", **SIZE)
                browser.open(address)
                wait_until(lambda: browser.evaluate("models.length") == 2)
                for question, vote in zip(args.questions, ("vote_right", None), strict=True):
                    browser.evaluate(f"send({question!r})")
                    wait_until(lambda: browser.evaluate("!document.getElementById('votes').hidden"))
                    if vote:
                        browser.evaluate(f"document.getElementById({vote!r}).click()")
                        wait_until(lambda: browser.evaluate("turn === null"))
                time.sleep(0.5)  # the page is drawn
                picture = browser.call("Page.captureScreenshot", format="png")["data"]
            server.terminate()
    Path(args.out).write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
