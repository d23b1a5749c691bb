"""Tools, the calls to them and their results, in the usual spellings -> OpenAI's form."""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.json_objects import count_keys

EMPTY = (None, "", "[]", "{}", [], {})
RESULT = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)
NAMED_CALL = re.compile(r"([A-Za-z_][\w.-]*)\n\s*(\{.*\})", re.DOTALL)
PYTHON_LIMIT = 1 << 16  # characters that are parsed as Python
NOT_PYTHON = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


# Values in strings


def parse_json(value: Any, name: str) -> Any:
    """The value of a string of JSON; other values are returned as they are. Raises BadRowError."""
    if not isinstance(value, str):
        return value
    try:
        # int("NaN") raises the ValueError that is expected
        parsed = json.loads(value, parse_constant=lambda word: int(word))
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise BadRowError(f"{name}: found {shown(value)}, expected JSON") from None
    if isinstance(parsed, dict | list):
        count_keys(parsed)  # nested no deeper than a row may be
    return parsed


def parse_literal(value: Any, name: str) -> Any:
    """`parse_json`, also of a Python literal such as {'name': 'f'}; raises BadRowError."""
    try:
        return parse_json(value, name)
    except BadRowError as problem:
        try:
            parsed = ast.literal_eval(_parse_python(value))
            return parse_json(json.dumps(parsed), name)  # refuses what JSON cannot express
        except NOT_PYTHON:
            raise problem from None


def _parse_python(text: str) -> ast.expr:
    """Parse one Python expression, without running it; raises one of NOT_PYTHON."""
    if len(text) > PYTHON_LIMIT:
        raise ValueError(text[:60])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown escapes
        return ast.parse(text.strip(), mode="eval").body


# Tools


def parse_tools(value: Any, name: str = "tools") -> list[dict] | None:
    """Parse tool schemas: bare, in OpenAI's form, or as JSON in a string; None if there are none.

    Returns [{"type": "function", "function": {"name", ...}}]. Anthropic's "input_schema" becomes
    "parameters".
    """
    value = parse_json(value, name) if value not in EMPTY else None
    if value in EMPTY:
        return None
    tools = []
    for index, raw in enumerate(value if isinstance(value, list) else [value]):
        tool = parse_json(raw, f"{name}[{index}]")
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(
                f"{name}[{index}]: found {shown(raw)}, expected a function with a 'name'"
            )
        if "input_schema" in function:
            function = dict(function)
            function["parameters"] = function.pop("input_schema")
        tools.append(tool if "function" in tool else {"type": "function", "function": function})
    return tools


def find_tools(candidates: Sequence[tuple[str, Any]], systems: Sequence[str]) -> list[dict] | None:
    """The one list of tools among several (place, value); None without any.

    Tools that a system prompt already spells out are not returned. Raises BadRowError.
    """
    lists = [tools for place, value in candidates if (tools := parse_tools(value, place))]
    if any(tools != lists[0] for tools in lists):
        raise BadRowError(
            "found two different lists of tools, in the row and in its system message, expected one"
        )
    return lists[0] if lists and not any("<tools>" in text for text in systems) else None


# Calls


def parse_calls(value: Any, name: str) -> list[dict]:
    """Parse calls: bare, in OpenAI's form, or as JSON in a string; raises BadRowError.

    Returns [{"type": "function", "function": {"name", "arguments"}}, ...], the arguments as an
    object; an "id" is kept.
    """
    value = parse_literal(value, name)
    calls = []
    for index, raw in enumerate(value if isinstance(value, list) else [value]):
        where = f"{name}[{index}]"
        if isinstance(raw, str) and raw.lstrip().startswith("{"):
            raw = parse_literal(raw, where)
        call = raw.get("function", raw) if isinstance(raw, dict) else raw
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise BadRowError(
                f"{where}: found {shown(raw)}, expected a call with 'name' and 'arguments'"
            )
        keys = (key for key in ("arguments", "parameters", "input") if key in call)
        arguments = call.get(next(keys, None))
        arguments = {} if arguments in EMPTY else parse_literal(arguments, f"{where}: arguments")
        if not isinstance(arguments, dict):
            raise BadRowError(
                f"{where}: found the arguments {shown(arguments)}, expected an object"
            )
        called = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        calls.append({"id": raw["id"]} | called if isinstance(raw.get("id"), str) else called)
    return calls


def split_calls(content: str, name: str) -> tuple[str, list[dict], str | None]:
    """Split a reply into its text and the calls in the <tool_call> blocks that end it.

    The third value is the reason why blocks are not calls, for callers that expect calls: a reply
    may also just write about the tag.
    """
    text, *blocks = content.split("<tool_call>")
    calls = []
    for block in blocks:
        call, closed, rest = block.partition("</tool_call>")
        if not closed:
            return content, [], "a <tool_call> that is not closed"
        if rest.strip():
            return content, [], f"text after a </tool_call>: {shown(rest.strip())}"
        try:
            calls += parse_calls(call.strip(), name)
        except BadRowError as problem:
            return content, [], str(problem)
    return (text.strip(), calls, None) if calls else (content, [], None)


def bare_calls(content: str, function: Any, name: str) -> list[dict]:
    """The calls of a reply that consists of them, without a tag; an empty list for other replies.

    {"name": "f", "arguments": {"a": 1}}    JSON or a Python literal, one or a list
    [f(a=1), g()]                           Python calls with named literals, as in ToolACE
    {"a": 1} and `function` "f"             GLM-4's, the name in the message's metadata
    f, then {"a": 1} on the next line       GLM-4's, as its template writes them
    """
    content = content.strip()
    if named := NAMED_CALL.fullmatch(content):
        function, content = named.groups()
    if isinstance(function, str) and function.strip() and content.startswith("{"):
        content = json.dumps([{"name": function.strip(), "arguments": content}])
    if content[:1] not in ("{", "["):
        return []
    try:
        return parse_calls(content, name)
    except BadRowError:
        return _python_calls(content)


def _python_calls(content: str) -> list[dict]:
    """The calls in [f(a=1), g()]; an empty list for anything else."""
    try:
        elements = _parse_python(content).elts
        calls = [
            {
                "name": ast.unparse(call.func),
                "arguments": {word.arg: ast.literal_eval(word.value) for word in call.keywords},
            }
            for call in elements
            if not call.args and all(word.arg for word in call.keywords)
        ]
        return parse_calls(calls, "calls") if calls and len(calls) == len(elements) else []
    except (AttributeError, BadRowError, *NOT_PYTHON):
        return []


def split_results(content: str) -> list[str]:
    """Split a tool's message into its results, without the <tool_response> tags around them.

    >>> split_results("<tool_response>21</tool_response><tool_response>9</tool_response>")
    ['21', '9']
    """
    results, position = [], 0
    while position < len(content):
        match = RESULT.match(content, position)
        if not match:
            return [content]
        results.append(match.group(1))
        position = match.end()
    return results or [content]
