r"""Where the assistant speaks in the text of a chat template without {% generation %} marks.

A reply begins where the template's own prompt for a reply ends, and ends with the token that the
template writes after a reply. Both are read from what the template renders:

    <|im_start|>user\n(question)<|im_end|>\n<|im_start|>assistant\n(reply)<|im_end|>\n
                                            ------- header -------        -- end --
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.messages import Message

QUESTION, REPLY = "(question)", "(reply)"
THOUGHT = "<think>"  # a prompt may end with it although earlier replies do not begin with it


class Borders(NamedTuple):
    """What a template writes before each reply, and the token it writes after it.

    `header` ends each prompt; `opening`, often empty, is the part of it that earlier replies lack.
    """

    header: str
    opening: str
    end: str

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return the (start, end) of each reply in a rendered text, its end token included."""
        header, opening, end = map(re.escape, self)
        reply = re.compile(f"{header}(?:{opening})?(.*?{end})", re.DOTALL)
        return [match.span(1) for match in reply.finditer(text)]


def find_borders(render: Callable[[list[Message], bool], str], controls: re.Pattern) -> Borders:
    """Read the borders of a template from renderings of a question and its reply.

    Args:
        render: messages -> the template's text; with True, followed by the prompt for a reply.
        controls: matches a control token.

    Raises:
        BadRowError: they do not show the borders, or no control token ends the reply.
    """
    question = [{"role": "user", "content": QUESTION}]
    before, prompt = render(question, False), render(question, True)
    answered = render([*question, {"role": "assistant", "content": REPLY}], False)

    # The header: what a prompt adds to the question, without an opening <think>
    header = prompt.removeprefix(before) if prompt.startswith(before) else ""
    header, thought, rest = (header or prompt.rpartition(QUESTION)[2]).partition(THOUGHT)
    if not header.strip() or not answered.startswith(prompt.removesuffix(thought + rest)):
        raise BadRowError(
            f"a reply does not begin where the template's prompt for one ends: {_ending(prompt)}"
            f" before a reply, {_ending(answered)} with it"
        )

    # The end: the control tokens behind the reply
    after = answered.rpartition(REPLY)[2].lstrip()
    if not (end := re.match(f"(?:{controls.pattern})+", after)):
        raise BadRowError(
            f"the template writes {after[:40]!r} after a reply, expected a control token of this"
            " tokenizer, by which the model learns to stop"
        )
    return Borders(header, thought + rest, end.group())


def _ending(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-60:]}")
