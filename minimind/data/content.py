"""The content of a message: its text, reasoning, tool calls and results."""

from typing import Any, NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.calls import parse_calls

CONTENTS = ("content", "value", "text", "parts")
TEXT_PARTS = ("text", "input_text", "output_text", None)
REASONING_PARTS = ("reasoning", "thinking")
CALL_PARTS = ("tool_use", "tool_call", "function_call")


class Content(NamedTuple):
    """What the content of one message consists of."""

    text: str
    reasoning: str = ""
    calls: tuple = ()
    results: tuple = ()  # of tools, as Anthropic puts them in a user's message: (text, part)


def parse_content(content: Any, name: str, separator: str = "") -> Content:
    """Parse the content of a message: a string, or a list of typed parts; raises BadRowError."""
    if isinstance(content, str):
        return Content(content)
    if not isinstance(content, list) or not content:
        raise BadRowError(
            f"{name}: found the content {shown(content)}, expected 'content' (or 'value'): a string"
        )
    texts, reasoning, calls, results = [], [], [], []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in CALL_PARTS:
            calls += parse_calls(part.get("value", part), name)
        elif kind == "tool_result":
            result = part.get("content", "")
            text = result if isinstance(result, str) else parse_content(result, name, "\n").text
            results.append((text, part))
        elif kind in TEXT_PARTS or kind in REASONING_PARTS:
            values = (part[key] for key in (kind, *CONTENTS) if isinstance(part.get(key), str))
            if (text := next(values, None)) is None:
                raise BadRowError(
                    f"{name}: found the content {shown(content)}, expected a string or parts of"
                    " text"
                )
            (reasoning if kind in REASONING_PARTS else texts).append(text)
        else:
            raise BadRowError(
                f"{name}: found a part of type {shown(kind)} in the content, expected text only"
            )
    return Content(separator.join(texts), "\n".join(reasoning), tuple(calls), tuple(results))


def split_reasoning(content: str) -> tuple[str, str]:
    """Split a reply into the reasoning in the <think> block that opens it, and what follows.

    The opening tag may be missing, as in completions of DeepSeek-R1, whose prompt ends with it; a
    blank line then follows the closing one, unlike in a text about the tag.

    >>> split_reasoning("<think>\\n1 + 1\\n</think>\\n\\n2")
    ('1 + 1', '2')
    """
    text = content.lstrip()
    closing = "</think>" if text.startswith("<think>") else "</think>\n\n"
    if closing not in text or ("<think>" in text and not text.startswith("<think>")):
        return "", content
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return reasoning.strip("\n"), answer.lstrip("\n")
