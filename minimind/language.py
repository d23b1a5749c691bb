"""What the program says, in Chinese too: under MINIMIND_LANG=zh, or where the locale is Chinese.

The code speaks English. What is meant for a person goes through `translated` on its way out, which looks it up in one
table, messages_zh.yaml: English templates, with {} for what changes, and their Chinese. A text that is not in it stays
English. A test holds every template against the texts in the code, so that none is left behind when they change.
"""

import os
import re
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("messages_zh.yaml")
PLACE = re.compile(r"(\S+:(?:\d+|row \d+)): (.*)", re.DOTALL)  # file:line, before what was found there


def is_chinese() -> bool:
    """Whether the user asked for Chinese, or the locale does."""
    names = ("MINIMIND_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    return next((os.environ[name] for name in names if os.environ.get(name)), "").lower().startswith("zh")


@cache
def templates() -> list[tuple[re.Pattern, str]]:
    """The table as patterns, one group for each gap, and Chinese templates; the longest first, as the most special."""
    import yaml

    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return [
        (re.compile("(.*?)".join(map(re.escape, english.split("{}"))), re.DOTALL), chinese)
        for english, chinese in sorted(table.items(), key=lambda pair: -len(pair[0]))
    ]


def translated(text: str) -> str:
    """A text for a person, in the user's language as far as the table has it, what fills its gaps included."""
    if not is_chinese() or not text.strip():
        return text
    for pattern, chinese in templates():
        if match := pattern.fullmatch(text):
            return chinese.format(*map(translated, match.groups()))
    if place := PLACE.fullmatch(text):
        return f"{place[1]}: {translated(place[2])}"
    return "\n".join(map(translated, text.split("\n"))) if "\n" in text else text


def say(text: str, **options) -> None:
    """Print a text for a person, at once; `options` are those of `print`."""
    print(translated(text), **{"flush": True, **options})
