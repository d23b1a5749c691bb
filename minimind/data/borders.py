"""Where the assistant speaks in the text of a chat template that does not mark it with {%
generation %}.

A reply begins where the template's own prompt for one ends, and ends with the token that the
template writes after one. Both are read off the template's renderings, so the text stays the
template's to the last character.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.conversations import Message

QUESTION, REPLY = "(question)", "(reply)"
THOUGHT = "<think>"  # a prompt may end with it, and then only the last reply's does


class Borders(NamedTuple):
    """What a template writes before each reply, and `end`, the token that it writes after it.

    `header` ends each prompt; `opening`, perhaps empty, is the part of it that earlier replies do
    without.
    """

    header: str
    opening: str
    end: str

    def find(self, text: str) -> list[tuple[int, int]]:
        """From where to where the assistant speaks, each end token included; `text` is as the
        template wrote it."""
        opening = f"(?:{re.escape(self.opening)})?" if self.opening else ""
        reply = re.compile(
            f"{re.escape(self.header)}{opening}(.*?{re.escape(self.end)})", re.DOTALL
        )
        return [match.span(1) for match in reply.finditer(text)]


def find_borders(render: Callable[[list[Message], bool], str], controls: re.Pattern) -> Borders:
    """The borders of a template, whose text of messages, and with true of a prompt, is `render`'s.

    Raises:
        BadRowError: the template does not show them, or ends replies with what is no control token.
    """
    question = [{"role": "user", "content": QUESTION}]
    before, prompt = render(question, False), render(question, True)
    whole = render([*question, {"role": "assistant", "content": REPLY}], False)
    header = prompt.removeprefix(before) if prompt.startswith(before) else ""
    header, thought, rest = (header or prompt.rpartition(QUESTION)[2]).partition(THOUGHT)
    if not header.strip() or not whole.startswith(prompt.removesuffix(thought + rest)):
        raise BadRowError(
            f"a reply does not begin where the template's prompt for one ends: {shown_end(prompt)}"
            f" before a reply, {shown_end(whole)} with it"
        )
    after = whole.rpartition(REPLY)[2].lstrip()
    if not (end := re.match(f"(?:{controls.pattern})+", after)):
        raise BadRowError(
            f"the template writes {after[:40]!r} after a reply, expected a control token of this"
            " tokenizer, by which the model learns to stop"
        )
    return Borders(header, thought + rest, end.group())


def shown_end(text: str) -> str:
    """The last characters of a text, for a message."""
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")
