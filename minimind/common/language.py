"""Messages in Chinese: under MINIMIND_LANG=zh, or in a Chinese locale.

The code is written in English. Each message for a person goes through `translated` on its way out,
which looks it up in one table, messages_zh.yaml: English templates, with {} for what changes, and
their Chinese. A message without a template stays English. A test compares the templates with the
code, so that none is left behind when a message changes.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

from minimind.common.streams import printable

TABLE = Path(__file__).with_name("messages_zh.yaml")
# Where a message may be put together from parts: lines and indents; a place or a name, and
# sentences; the items of a list.
BORDERS = re.compile(r"\n|^ +"), re.compile(r": |\. "), re.compile(r"; |, ")
MESSAGE = 2**12  # characters; a longer text is a list, or no message
CHINESE_MARKS = {": ": "：", ". ": "。", "\n": "\n", "; ": "；", ", ": "，"}


def is_chinese() -> bool:
    """Whether the user's variables or locale choose Chinese, and the terminal can show it."""
    names = ("MINIMIND_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    language = next((os.environ[name] for name in names if os.environ.get(name)), "")
    return language.lower().startswith("zh") and _can_show("中")


def _can_show(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@cache
def table() -> dict[str, str]:
    """English templates and their Chinese, in the order of the file: the first match counts."""
    import yaml

    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def _match(template: str, text: str) -> re.Match | None:
    """Match a text with a template; the groups are what fills its gaps.

    A gap stays within one line, unless the template itself has several, and does not begin with an
    indent.
    """
    words = template.split("{}")
    if not all(word in text for word in words) or (text[0].isspace() and not words[0]):
        return None
    pattern = "(.*?)".join(map(re.escape, words))
    return re.fullmatch(pattern, text, re.DOTALL if "\n" in template else 0)


def translated(text: str) -> str:
    """A message in the user's language, as far as the table has it and what fills its gaps."""
    if len(text) > MESSAGE or not is_chinese():
        return text
    done = ""
    while text.strip():  # not recursive: a list may have thousands of borders
        for english, chinese in table().items():
            if match := _match(english, text):
                return done + chinese.format(*map(translated, match.groups()))
        border = next(filter(None, (borders.search(text) for borders in BORDERS)), None)
        if border is None:
            break
        first, mark = text[: border.start()], border.group()
        chinese = translated(first)
        done += chinese + (mark if chinese == first else CHINESE_MARKS[mark])
        text = text[border.end() :]
    return done + text


def say(text: str, **options) -> None:
    """Print a message in the user's language and flush it; `options` are those of `print`.

    A full disk behind the log, or a reader that is gone, is no error.
    """
    try:
        print(printable(translated(text)), **{"flush": True, **options})
    except (OSError, ValueError):  # ValueError: the stream is closed
        return
