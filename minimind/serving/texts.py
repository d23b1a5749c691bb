"""Tokens -> the text that a client gets, piece by piece: no half characters, nothing of a stop
string; and a reply's reasoning, words and calls of tools."""

import json
from collections.abc import Collection, Sequence
from typing import Any
from uuid import uuid4

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from minimind.data.messages import LEADING, reply_message

THINK, END_THINK, CALL = "<think>", "</think>", "<tool_call>"


def begun(text: str, marks: Sequence[str]) -> int:
    """The number of characters at the end of a text with which one of the marks may begin."""
    longest = max(map(len, marks), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    ends = (size for size in sizes if any(mark.startswith(text[-size:]) for mark in marks))
    return next(ends, 0)


class TextStream:
    """The text of tokens that come one by one.

    `finish` is why it ended, as OpenAI says it: "stop" for an end token or a stop string, "length"
    for the limit of tokens, else None. `tokens` counts them, the end token included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ends: Collection[int],
        stops: Sequence[str],
        limit: int,
    ):
        self.tokenizer, self.ends, self.stops = tokenizer, ends, stops
        self.stream, self.limit = DecodeStream(skip_special_tokens=True), limit
        self.held, self.tokens, self.finish = "", 0, None

    def take(self, token: int) -> str:
        """The text that is certain after one more token."""
        self.tokens += 1
        if token in self.ends:
            self.finish = "stop"
        else:
            self.held += self.stream.step(self.tokenizer, token) or ""
            if found := [place for stop in self.stops if (place := self.held.find(stop)) >= 0]:
                self.held, self.finish = self.held[: min(found)], "stop"
            elif self.tokens == self.limit:
                self.finish = "length"
        certain = len(self.held) - (0 if self.finish else begun(self.held, self.stops))
        text, self.held = self.held[:certain], self.held[certain:]
        return text


class ReplyStream:
    """A reply's text that comes in pieces -> OpenAI's `delta` objects: `reasoning_content` from a
    <think> block that opens it, `content`, and with tools `tool_calls` from the blocks that end it.

    What may still become a tag is held back.
    """

    def __init__(self, has_tools: bool):
        self.has_tools, self.text = has_tools, ""
        self.sent = {"reasoning_content": "", "content": ""}

    def take(self, piece: str, is_last: bool) -> dict[str, Any]:
        """The delta after one more piece; empty if nothing is certain."""
        self.text += piece
        delta: dict[str, Any] = {}
        calls = reply_message(self.text).get("tool_calls") if is_last and self.has_tools else None
        for name, text in zip(self.sent, self._split(is_last, bool(calls)), strict=True):
            if new := text[len(self.sent[name]) :]:
                delta[name], self.sent[name] = new, text
        if calls:
            delta["tool_calls"] = [
                {
                    "index": index,
                    "id": f"call_{uuid4().hex[:24]}",
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for index, call in enumerate(calls)
            ]
        return delta

    def _split(self, is_last: bool, ends_with_calls: bool) -> tuple[str, str]:
        """The reasoning and the words, as far as they are certain."""
        reasoning, words = "", self.text
        begin = words.lstrip()
        if begin.startswith(THINK):
            inside, closed, words = begin.removeprefix(THINK).partition(END_THINK)
            if not (closed or is_last):
                inside = inside[: len(inside) - begun(inside, (END_THINK,))]
            reasoning, words = inside.strip("\n"), words.lstrip("\n")
        elif not is_last and THINK.startswith(begin):
            words = ""
        words = "" if words.isspace() and not is_last else LEADING.sub("", words)
        if self.has_tools and not (is_last and not ends_with_calls):
            before, called, _ = words.partition(CALL)
            words = before if called else words[: len(words) - begun(words, (CALL,))]
            words = words.rstrip()
        return reasoning, words
