"""Prompts that a model replies to: a chat's last question, or a text that it continues."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.columns import Fields
from minimind.data.conversations import Conversation
from minimind.data.files import to_document
from minimind.data.prompts import to_prompt
from minimind.evaluation.replies import Sampling
from minimind.evaluation.scoring import Subject
from minimind.generation import Reply, text_start


class TaskPrompt(NamedTuple):
    """What is asked: a conversation up to its last question, or a text to be continued."""

    conversation: Conversation | None = None
    text: str = ""

    @property
    def asked(self) -> str:
        """The words of the question, or the text."""
        return self.conversation.messages[-1]["content"] if self.conversation else self.text


def read_prompt(row: Fields) -> TaskPrompt:
    """The prompt of a row: its `text` where it has no question, else as `prompts.to_prompt`; raises
    BadRowError."""
    if isinstance(row.get("text"), str) and not row.find("prompt") and not row.find("messages"):
        return TaskPrompt(text=to_document(row))
    conversation = to_prompt(row)
    if not conversation.messages[-1]["content"].strip():
        raise BadRowError("found an empty question, expected words")
    return TaskPrompt(conversation)


def beginning(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids that a tokenizer itself begins a text with: its BOS token, or none."""
    ids = tokenizer.backend_tokenizer.encode("").ids[:1]
    return (*ids,) if ids == [tokenizer.bos_token_id] else ()


def fitting_replies(
    subject: Subject, prompts: Sequence[TaskPrompt], sampling: Sampling, option: str
) -> dict[int, Reply]:
    """The replies to the prompts by their index, without those of prompts that leave the model too
    few positions for `sampling.max_new_tokens`.

    Raises:
        UserError: no prompt fits, a template cannot express one, or see `generation.decode`.
    """
    tokenizer = subject.tokenizer
    chats = [prompt.conversation for prompt in prompts if prompt.conversation]
    encoded = iter(encode_prompts(chats, ChatEncoder(tokenizer)))
    ids = [
        next(encoded) if prompt.conversation else text_start(tokenizer, prompt.text)
        for prompt in prompts
    ]
    room = subject.max_length - sampling.max_new_tokens
    fitting = {index: each for index, each in enumerate(ids) if len(each) <= room}
    if not fitting:
        raise UserError(
            f"{option}: all prompts are too long: the shortest has {min(map(len, ids)):,}"
            f" tokens, and the model has positions for {room:,} and a reply. Give shorter prompts,"
            " or a smaller --max_new_tokens."
        )
    found = subject.replies([*fitting.values()], sampling)
    return dict(zip(fitting, found, strict=True))
