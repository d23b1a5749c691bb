"""A chat template as fixed pieces of text, for programs that do not run Jinja: a web page, ollama.

A conversation of questions and replies is then

    opening Q1 reply R1 question Q2 reply R2 question Q3 ending

and with a system prompt S it begins with system[0] S system[1] in place of `opening`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import BadRowError
from minimind.data.templates import bounded

REASONING = re.compile(r"<think>.*?</think>\n*", re.DOTALL)
WINDOW = 4096  # tokens of a conversation at most: each takes memory, and a browser's tab has little
SYSTEM, QUESTIONS, REPLIES = "SYSTEM", ("FIRST", "SECOND"), "REPLY"
# What the pieces are tried on: system prompt, questions and replies by turns
TRIALS = (
    ("", "Hello"),
    ("You are helpful.\nBe brief.", "你好"),
    ("", "你好！\n\n介绍一下自己", "我是模型。", "And in words?"),
    ("请用中文回答", "a", " spaces \n\n", "b", "<think>\nWhy?\n</think>\n\nSo.", "c", "", "d"),
)


@dataclass
class PromptPieces:
    """The text of a template around words; `system` is None where it refuses system prompts."""

    system: tuple[str, str] | None
    opening: str
    reply: str
    question: str
    ending: str
    drops_reasoning: bool  # a <think> block at the start of an earlier reply
    strips_replies: bool  # white space around an earlier reply

    def render(self, system: str, words: Sequence[str]) -> str:
        """The prompt after questions and replies by turns, the last of them a question."""
        text = system.join(self.system) if self.system and system else self.opening
        for index, word in enumerate(words[:-1]):
            text += self.earlier(word) + self.question if index % 2 else word + self.reply
        return text + words[-1] + self.ending

    def earlier(self, reply: str) -> str:
        """An earlier reply as the template shows it."""
        if self.drops_reasoning and (reasoning := REASONING.match(reply)):
            reply = reply[reasoning.end() :]
        return reply.strip() if self.strips_replies else reply


@dataclass
class Speaker:
    """What a program needs to know of a model to speak with it."""

    chats: bool  # whether it answers messages, and does not only continue texts
    pieces: PromptPieces | None  # of a chat model, if its template consists of pieces
    start: str  # the control token before a text, as before a document in training
    ends: list[int]  # the tokens that end a reply
    special: dict[int, str]  # control tokens
    window: int  # tokens
    parameters: int


def speaker(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: str | None
) -> Speaker:
    """What is to know of the model that a stage wrote."""
    chats = bool(tokenizer.chat_template) and stage != "pretrain"
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    added = tokenizer.added_tokens_decoder
    return Speaker(
        chats=chats,
        pieces=prompt_pieces(tokenizer) if chats else None,
        start=tokenizer.eos_token or "",
        ends=ends if isinstance(ends, list) else [ends],
        special={index: token.content for index, token in added.items() if token.special},
        window=min(model.config.max_position_embeddings, WINDOW),
        parameters=model.num_parameters(),
    )


def prompt_pieces(tokenizer: PreTrainedTokenizerFast) -> PromptPieces | None:
    """The pieces of a tokenizer's chat template; None if it has none, or writes another text for
    one of the trials."""
    if not tokenizer.chat_template:
        return None
    chat = (QUESTIONS[0], REPLIES, QUESTIONS[1])
    parts = _between(render(tokenizer, "", chat), chat)
    if parts is None:
        return None
    begun = _between(render(tokenizer, SYSTEM, chat), (SYSTEM, *chat))
    system = begun and tuple(begun[:2])
    for flags in product((False, True), repeat=2):
        pieces = PromptPieces(system, *parts, *flags)
        if all(_agrees(pieces, tokenizer, *trial) for trial in TRIALS):
            return pieces
    return None


def _agrees(pieces: PromptPieces, tokenizer, system: str, *words: str) -> bool:
    if system and pieces.system is None:
        return True
    return pieces.render(system, words) == render(tokenizer, system, words)


def render(tokenizer: PreTrainedTokenizerFast, system: str, words: Sequence[str]) -> str | None:
    """The same prompt by the template itself; None if it refuses the conversation."""
    chat = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    chat += [{"role": roles[index % 2], "content": word} for index, word in enumerate(words)]
    try:
        with bounded():
            return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except BadRowError:
        return None


def _between(text: str | None, words: Sequence[str]) -> list[str] | None:
    """The pieces of a text before, between and after words; None unless each occurs once, in this
    order."""
    pieces = re.split("|".join(words), text or "")
    if not text or "".join(map("".join, zip(pieces, [*words, ""], strict=False))) != text:
        return None
    return pieces if len(pieces) == len(words) + 1 else None
