"""A conversation -> the text of its chat template, and where in it the assistant speaks.

A template marks the replies itself, with {% generation %} ... {% endgeneration %}; for one without
marks, borders.py finds them. A rendering that loses words is refused.
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from jinja2 import TemplateError, pass_eval_context
from jinja2.nodes import EvalContext
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from minimind.common.errors import BadRowError, UserError
from minimind.data.borders import Borders, find_borders
from minimind.data.conversations import Conversation
from minimind.data.templates import SHIPPED, TEMPLATES, WRITTEN, WRITTEN_PER_CHARACTER, bounded

Span = tuple[int, int]  # start and end (exclusive)
Text = tuple[str, list[Span]]  # and where in it the assistant speaks

GENERATION = re.compile(r"{%-?\s*generation\b")
# Private characters, put around a message's words to find them in the rendered text
OPEN, CLOSE = "\ue000", "\ue001"
NO_TEMPLATE = (
    "the tokenizer has no chat template, so there is no form to ask the model in. A base model"
    " continues text ('minimind generate'); fine-tuning gives it a template with --chat_template"
    f" {' or '.join(TEMPLATES)}."
)


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Its control tokens are the special tokens, and other added tokens (such as <think>) that occur
    in the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        if not tokenizer.chat_template:
            raise UserError(NO_TEMPLATE)
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template()
        self.has_marks = bool(GENERATION.search(self.template))
        if self.has_marks:
            _find_marks_in_linear_time(self.template)
        added = tokenizer.added_tokens_decoder.values()
        controls = [t.content for t in added if t.special or t.content in self.template]
        self.controls = sorted(controls, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.controls)) or "(?!)")

    @cached_property
    def keeps_reasoning(self) -> bool:
        """Whether the template still shows a reply's reasoning after the next question; Qwen3's and
        the shipped ones do not."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
        chat[1] = {**chat[1], "reasoning_content": "(thoughts)"}
        try:
            return "(thoughts)" in self.apply_template(Conversation(chat))[0]
        except BadRowError:
            return False

    @cached_property
    def borders(self) -> Borders:
        """What the template writes before and after each reply, if it does not mark replies."""
        return find_borders(
            lambda messages, prompt: self.apply_template(Conversation(messages), prompt)[0],
            self.pattern,
        )

    def render(self, conversation: Conversation, prompt: bool = False) -> Text:
        """Return the text and the span of each reply; no words may contain a control token.

        With `prompt` the text ends with the header of the next reply.

        Raises:
            BadRowError: the template refuses the conversation or loses words of it, or the replies
                cannot be found.
        """
        text, spans = self.apply_template(conversation, prompt)
        if not prompt:
            if not self.has_marks:
                spans = self._find_replies(conversation, text)
            check_rendering(conversation, text, spans)
        return text, spans

    def apply_template(self, conversation: Conversation, prompt: bool = False) -> Text:
        """Return the template's text and the spans that it marks, unchecked."""
        characters = sum(len(message["content"]) for message in conversation.messages)
        with bounded(characters, self.template in SHIPPED):
            texts, spans = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        if (written := len(texts[0])) > WRITTEN:
            length = len(all_words(conversation))
            if written > WRITTEN_PER_CHARACTER * length:
                raise BadRowError(
                    f"the chat template writes {written:,} characters for a conversation of"
                    f" {length:,}"
                )
        return texts[0], spans[0] if spans else []

    def _find_replies(self, conversation: Conversation, text: str) -> list[Span]:
        header = self.borders.header.strip()
        if header in all_words(conversation):
            raise BadRowError(
                f"found {header!r} in the text, by which the chat template sets replies apart."
                " Remove it"
            )
        return self.borders.find(text)

    def find_roles(
        self, conversation: Conversation, text: str, spans: Sequence[Span]
    ) -> tuple[list[int], list[str]]:
        """Return at which characters each message begins, header included, and their roles.

        Renders once more with marks around the words. Where the marks change the text, they show
        nothing, and all is "other".
        """
        marked = []
        for message in conversation.messages:
            content, words = message["content"], message["content"].strip()
            marks = words if message["role"] == "assistant" else f"{OPEN}{words}{CLOSE}"
            content = content.replace(words, marks, 1) if words else marks
            marked.append({**message, "content": content})
        try:
            rendered, _ = self.apply_template(conversation._replace(messages=marked))
        except BadRowError:
            rendered = ""
        if rendered.replace(OPEN, "").replace(CLOSE, "") != text:
            return [0], ["other"]

        # Pieces alternate: template, words, template, words ...
        edges = np.cumsum([len(piece) for piece in re.split(f"[{OPEN}{CLOSE}]", rendered)]).tolist()
        words, replies = zip(edges[::2], edges[1::2], strict=False), iter(spans)
        begins, roles, before = [0], ["system"], 0  # tools may come before the first message
        for message in conversation.messages:
            start, end = next(replies if message["role"] == "assistant" else words)
            header = text.rfind(self.tokenizer.bos_token or "\0", before, start)
            begins.append(before if header < 0 else header)
            roles.append(message["role"])
            before = end
        return begins, roles


def _find_marks_in_linear_time(template: str) -> None:
    """Replace how transformers finds a template's marks: before each, it joins all text so far."""
    try:
        extensions = _compile_jinja_template(template).environment.extensions.values()
    except TemplateError:  # reported where the template is rendered
        return
    tracker = next(extension for extension in extensions if "generation" in extension.tags)
    blocks = length = 0  # of the text before the last reply

    @pass_eval_context
    def record_reply(context: EvalContext, caller: Callable[[], str]) -> str:
        nonlocal blocks, length
        reply = caller()
        if tracker.is_active():
            if not tracker._generation_indices:
                blocks = length = 0
            length += sum(map(len, tracker._rendered_blocks[blocks:]))
            blocks = len(tracker._rendered_blocks)
            tracker._generation_indices.append((length, length + len(reply)))
        return reply

    tracker._generation_support = record_reply


def all_words(conversation: Conversation) -> str:
    """Return everything in a conversation that the template does not write, to search it."""
    texts = [json.dumps(conversation.tools, ensure_ascii=False)] if conversation.tools else []
    for message in conversation.messages:
        texts.append(message["content"])
        if len(message) > 2:
            texts.append(json.dumps(message, ensure_ascii=False))
    return "\n".join(texts)


def check_rendering(conversation: Conversation, text: str, spans: Sequence[Span]) -> None:
    """Raise BadRowError if a text lacks words, tools, calls, reasoning or the mark of a reply."""
    replies = sum(message["role"] == "assistant" for message in conversation.messages)
    if len(spans) != replies:
        raise BadRowError(
            f"the chat template marks {len(spans)} replies for training, expected {replies}"
        )
    position, marked = 0, iter(spans)
    for index, message in enumerate(conversation.messages):
        role, content = message["role"], message["content"]
        is_reply, words = role == "assistant", content.strip()
        start, end = next(marked) if is_reply else (position, len(text))
        place = text.find(words, max(start, position), end)
        if place < 0:
            raise BadRowError(
                f"messages[{index}]: the chat template leaves out words of the role {role!r}"
            )
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if missing := _missing(names, text, start, end):
            raise BadRowError(
                f"messages[{index}]: the chat template has no place for calls, found one of"
                f" {missing!r}"
            )
        # The model would be trained on another beginning than it sees when it generates
        if is_reply and content.startswith(("\n", "\r")):
            raise BadRowError(
                f"messages[{index}]: found a reply that begins with a line break, expected text."
                " Remove it"
            )
        if role != "system":  # a system prompt may be rendered within the last question
            position = end if is_reply else place + len(words)

    tools = [tool["function"]["name"] for tool in conversation.tools or ()]
    if missing := _missing(tools, text, 0, len(text)):
        raise BadRowError(f"the chat template has no place for tools, found {missing!r}")
    if conversation.messages[-1].get("reasoning_content", "") not in text:
        raise BadRowError("the chat template has no place for reasoning, found a reply with it")


def _missing(names: Sequence[str], text: str, start: int, end: int) -> str | None:
    """Return the first name that a stretch of text lacks; names in order take one pass."""
    position = start
    for name in names:
        place = text.find(name, position, end)
        if place < 0 and (place := text.find(name, start, end)) < 0:
            return name
        position = place
    return None
