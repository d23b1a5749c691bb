"""What the program says, in Chinese too: under MINIMIND_LANG=zh, or where the locale is Chinese.

The code speaks English. What is meant for a person goes through `translated` on its way out, which
looks it up in one table, messages_zh.yaml: English templates, with {} for what changes, and their
Chinese. A text that is not in it stays English. A test holds every template against the texts in
the code, so that none is left behind when they change.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

from minimind.common.streams import printable

TABLE = Path(__file__).with_name("messages_zh.yaml")
# Where texts are put together from several: lines and indents; a place or a name, and sentences;
# the items of a list.
BORDERS = re.compile(r"\n|^ +"), re.compile(r": |\. "), re.compile(r"; |, ")
MESSAGE = 2**12  # characters; what is longer is a list, or no message
CHINESE_MARKS = {": ": "：", ". ": "。", "\n": "\n", "; ": "；", ", ": "，"}


def is_chinese() -> bool:
    """Whether the user asked for Chinese, or the locale does, and the terminal can show it."""
    names = ("MINIMIND_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    asked = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return asked.lower().startswith("zh") and _can_show("中")


def _can_show(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@cache
def table() -> dict[str, str]:
    """English templates and their Chinese, in the order of the file: the first that fits is
    taken."""
    import yaml

    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def _fit(template: str, text: str) -> re.Match | None:
    """What fills the gaps of a template that the text is an instance of.

    It is within one line, unless the template itself has several, and begins no text with an
    indent.
    """
    words = template.split("{}")
    if not all(word in text for word in words) or (text[0].isspace() and not words[0]):
        return None
    return re.fullmatch(
        "(.*?)".join(map(re.escape, words)), text, re.DOTALL if "\n" in template else 0
    )


def translated(text: str) -> str:
    """A text for a person, in the user's language as far as the table has it, what fills its gaps
    included."""
    if len(text) > MESSAGE or not is_chinese():
        return text
    done = ""
    while text.strip():  # a list may have thousands of borders
        for english, chinese in table().items():
            if match := _fit(english, text):
                return done + chinese.format(*map(translated, match.groups()))
        border = next(filter(None, (borders.search(text) for borders in BORDERS)), None)
        if border is None:
            break
        first, mark = text[: border.start()], border.group()
        said = translated(first)
        done += said + (mark if said == first else CHINESE_MARKS[mark])
        text = text[border.end() :]
    return done + text


def say(text: str, **options) -> None:
    """Print a text for a person, at once; `options` are those of `print`.

    Words that nobody can take, since the log's disk is full or its reader gone, end nothing.
    """
    try:
        print(printable(translated(text)), **{"flush": True, **options})
    except (OSError, ValueError):  # the latter of a stream that is closed
        return
