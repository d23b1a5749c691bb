"""The chat template that a tokenizer is trained with: chosen, tried, and its end token set."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.conversations import Conversation
from minimind.data.templates import TEMPLATES

CONTROL_LIKE = re.compile(r"<[^<>\s]+>$")  # what looks like a control token at the end of a text


def set_chat_template(tokenizer: PreTrainedTokenizerFast, choice: str | None) -> None:
    """Give a tokenizer a chat template to be trained with, and the end token of its replies.

    Args:
        choice: the name of a shipped template or a .jinja file; None keeps the tokenizer's own.

    Raises:
        UserError: there is no such template, it cannot be rendered, or it does not show what the
            assistant emits.
    """
    before = tokenizer.chat_template
    if choice is not None:
        tokenizer.chat_template = _read_template(choice)
    try:
        end = _end_of_replies(tokenizer)
    except BadRowError as problem:
        tokenizer.chat_template = before
        source = (
            "the chat template of the tokenizer" if choice is None else f"--chat_template {choice}"
        )
        advice = f" Choose another with --chat_template ({', '.join(TEMPLATES)} or a .jinja file)."
        raise UserError(f"{source}: {problem}.{advice}") from None
    if end != tokenizer.eos_token:
        if is_main_process():
            say(
                f"replies end with {end!r}, which replaces {tokenizer.eos_token!r} as the end token"
            )
        tokenizer.eos_token = end


def _read_template(choice: str) -> str:
    path = TEMPLATES.get(choice, Path(choice))
    if not path.is_file():
        raise UserError(
            f"--chat_template {choice}: found no such file, expected {' or '.join(TEMPLATES)}, or a"
            " file."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--chat_template {path}: found bytes that are not UTF-8 ({error}), expected text."
        ) from None


def _end_of_replies(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the control token that ends replies in a tokenizer's template; raises BadRowError
    where none does, or the template fails."""
    encoder = ChatEncoder(tokenizer)
    example = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (encoded,) = encoder.encode([Conversation(example)])
    if isinstance(encoded, BadRowError):
        raise BadRowError(f"a question and its answer fail, {encoded}")
    ((_, end),) = encoded.replies
    if (last := encoded.ids[end - 1]) in encoder.control_ids.values():
        return tokenizer.convert_ids_to_tokens(last)

    # No control token of this tokenizer: say what the template writes instead
    text, spans = encoder.render(Conversation(example))
    if unknown := CONTROL_LIKE.search(text[: spans[0][1]]):
        raise BadRowError(
            f"replies end with {unknown.group()!r}, which is no token of this tokenizer: it has"
            f" {', '.join(map(repr, encoder.controls)) or 'none'}. The model would have to spell"
            " it out"
        )
    raise BadRowError(
        f"the generation block does not end with an end token such as {tokenizer.eos_token!r}, so"
        " the model would never learn to stop. Put it before {% endgeneration %}"
    )
