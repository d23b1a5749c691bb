"""Talking to a model in the terminal."""

import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, set_seed

from minimind.common.cache import cache_directory
from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.common.streams import printable
from minimind.common.terminal import read_messages
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.messages import parse_message
from minimind.generation import decode, load_for_generation
from minimind.stage_directory import read_stage

HELP = """Enter sends a message; a paste of several lines is one. The arrows reach earlier messages.
Ctrl-C drops the line, or stops an answer.
/new  forgets the conversation
/exit ends it, as Ctrl-D does
A message that begins with / needs a space before it."""
COMMAND = re.compile(r"(/\w+)(?:\s.*)?")  # not /etc/passwd, nor several lines


def chat(
    directory: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    keep_history: bool = True,
) -> None:
    """Read messages from standard input until its end and answer each, with all turns so far as the
    prompt.

    When the conversation fills the model's window, the oldest turns are left out of the prompt.
    """
    model, tokenizer = load_for_generation(directory)
    check_chattable(directory, tokenizer)
    set_seed(seed)
    interactive = sys.stdin.isatty()
    if interactive:
        say(
            f"{directory}: {model.num_parameters() / 1e6:.1f} M parameters. Type a message, or"
            " /help."
        )
    encoder = ChatEncoder(tokenizer)
    window = max(1, model.config.max_position_embeddings - max_new_tokens)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)

    for text in read_messages(history_file() if keep_history and interactive else None):
        command = COMMAND.fullmatch(text)
        if command and command[1] in ("/exit", "/quit"):
            return
        if command and command[1] == "/new":
            messages = list(opening)
        elif command:
            say(HELP if command[1] == "/help" else f"{command[1]}: no such command. See /help.")
        if command or not text.strip():
            continue

        if not interactive:
            print(f"> {printable(text.strip())}")
        messages.append({"role": "user", "content": text.strip()})
        ids = torch.tensor(encode_prompts([messages], encoder))
        while ids.shape[1] > window and len(messages) > len(opening) + 1:
            del messages[len(opening) : len(opening) + 2]
            ids = torch.tensor(encode_prompts([messages], encoder))
        try:
            reply = decode(model, tokenizer, ids[:, -window:], max_new_tokens, temperature, top_p)
        except KeyboardInterrupt:  # this answer is enough; the conversation continues without it
            print()
            messages.pop()
            continue
        messages += parse_message({"role": "assistant", "content": reply}, "the reply")
    print()


def history_file() -> Path | None:
    """Where what is typed is remembered; where it cannot be, that is said, and None."""
    try:
        return cache_directory(kept=True) / "chat_history"
    except UserError as problem:
        say(f"notice: what you type is not remembered: {problem}", file=sys.stderr)
        return None


def check_chattable(directory: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Say on stderr that a pretrained model has not learned to answer; raises UserError where there
    is no template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which tells messages from replies."
            " `minimind generate` continues texts; finetune_sft.py --chat_template chatml makes a"
            " chat model of it."
        )
    if read_stage(directory).get("stage") == "pretrain":
        say(
            f"notice: {directory} is a base model: it continues texts and has not learned to"
            " answer. See `minimind generate`, or train it on conversations with finetune_sft.py.",
            file=sys.stderr,
        )
