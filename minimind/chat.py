"""Talking to a model in the terminal."""

import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextStreamer, set_seed

from minimind.common.cache import cache_directory
from minimind.common.errors import UserError, reason
from minimind.common.language import say
from minimind.common.streams import printable
from minimind.common.terminal import read_messages
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.messages import parse_message
from minimind.stage_directory import check_vocabulary, load_model, read_stage, require_stage
from minimind.tokenizer import load_tokenizer

HELP = """Enter sends a message; a paste of several lines is one. The arrows reach earlier messages.
Ctrl-C drops the line, or stops an answer.
/new  forgets the conversation
/exit ends it, as Ctrl-D does
A message that begins with / needs a space before it."""
COMMAND = re.compile(r"(/\w+)(?:\s.*)?")  # not /etc/passwd, nor several lines


class Streamer(TextStreamer):
    """Identical to the library's except: what a model writes cannot control the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Called with each piece of the text."""
        super().on_finalized_text(printable(text), stream_end)


def load_for_generation(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, in evaluation mode on the best device, and tokenizer of a stage directory; raises UserError."""
    path = require_stage(directory)
    tokenizer = load_tokenizer(path)
    model = load_model(path).eval()
    check_vocabulary(model, tokenizer, path)
    if bad := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise UserError(
            f"{path}: {len(bad):,} tensors hold weights that are not finite, such as {bad[0]}: it can say nothing. "
            "Take an earlier checkpoint of the run."
        )
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device), tokenizer


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> str:
    """Generate after `input_ids` (1, S), printing as it goes; returns the new text.

    Raises:
        UserError: the model's own settings ask for what is not possible here.
    """
    room = model.config.max_position_embeddings - input_ids.shape[1]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    try:
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            max_new_tokens=max(1, min(max_new_tokens, room)),
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    except (ValueError, TypeError) as error:  # beams, say, which cannot be shown as they grow
        file = f"{model.config._name_or_path}/generation_config.json"
        raise UserError(f"{file}: a setting cannot be used here ({reason(error)}). Take it out.") from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "the model's probabilities are not numbers: its configuration or weights are damaged."
        ) from error
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def generate(directory: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Print `prompt` and its continuation."""
    model, tokenizer = load_for_generation(directory)
    set_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.long()
    if not ids.numel():  # an empty prompt starts a new document, as after the end of another
        ids = torch.tensor([[tokenizer.eos_token_id]])
    print(printable(prompt), end="", flush=True)
    decode(model, tokenizer, ids, max_new_tokens, temperature, top_p)


def chat(
    directory: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    keep_history: bool = True,
) -> None:
    """Read messages from standard input until its end and answer each, with all turns so far as the prompt.

    When the conversation fills the model's window, the oldest turns are left out of the prompt.
    """
    model, tokenizer = load_for_generation(directory)
    check_chattable(directory, tokenizer)
    set_seed(seed)
    interactive = sys.stdin.isatty()
    if interactive:
        say(f"{directory}: {model.num_parameters() / 1e6:.1f} M parameters. Type a message, or /help.")
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
    """Say on stderr that a pretrained model has not learned to answer; raises UserError where there is no template."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which tells messages from replies. `minimind generate` "
            "continues texts; finetune_sft.py --chat_template chatml makes a chat model of it."
        )
    if read_stage(directory).get("stage") == "pretrain":
        say(
            f"notice: {directory} is a base model: it continues texts and has not learned to answer. See `minimind "
            "generate`, or train it on conversations with finetune_sft.py.",
            file=sys.stderr,
        )
