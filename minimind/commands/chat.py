"""`minimind chat`: talk to a model in the terminal."""

import re
import sys
from argparse import Namespace
from pathlib import Path

from minimind.commands.best_of import add_best_of, load_reward_model, write_best
from minimind.commands.options import add_decoding
from minimind.common.errors import UserError
from minimind.common.language import say
from minimind.common.streams import printable
from minimind.common.terminal import read_messages

HELP = """Enter sends a message; a paste of several lines is one. The arrows reach earlier messages.
Ctrl-C drops the line, or stops an answer.
/new  forgets the conversation
/exit ends it, as Ctrl-D does
A message that begins with / needs a space before it."""
COMMAND = re.compile(r"(/\w+)(?:\s.*)?")  # not /etc/passwd, nor several lines


def add_parser(commands) -> None:
    parser = commands.add_parser("chat", help="talk to a chat model in the terminal")
    parser.set_defaults(run=run)
    add_decoding(parser)
    add_best_of(parser)
    parser.add_argument("--system", help="system prompt")
    history = "do not remember messages for the next chat"
    parser.add_argument("--no_history", action="store_true", help=history)


def run(args: Namespace) -> None:
    """Read messages from standard input until its end and answer each, with all turns so far as the
    prompt.

    When the conversation fills the model's window, the oldest turns are left out of the prompt.
    """
    import torch
    from transformers import set_seed

    from minimind.data.chat_encoder import ChatEncoder, encode_prompts
    from minimind.data.messages import parse_message
    from minimind.generation import decode, load_for_generation

    reward = load_reward_model(args)
    model, tokenizer = load_for_generation(args.directory)
    check_chattable(args.directory, tokenizer)
    set_seed(args.seed)
    interactive = sys.stdin.isatty()
    if interactive:
        millions = f"{model.num_parameters() / 1e6:.1f}"
        say(f"{args.directory}: {millions} M parameters. Type a message, or /help.")
    encoder = ChatEncoder(tokenizer)
    window = max(1, model.config.max_position_embeddings - args.max_new_tokens)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)

    for text in read_messages(None if args.no_history or not interactive else history_file()):
        # A command is answered here.
        command = COMMAND.fullmatch(text)
        if command and command[1] in ("/exit", "/quit"):
            return
        if command and command[1] == "/new":
            messages = list(opening)
        elif command:
            say(HELP if command[1] == "/help" else f"{command[1]}: no such command. See /help.")
        if command or not text.strip():
            continue

        # The prompt: all turns that fit into the window.
        if not interactive:
            print(f"> {printable(text.strip())}")
        messages.append({"role": "user", "content": text.strip()})
        ids = torch.tensor(encode_prompts([messages], encoder))
        while ids.shape[1] > window and len(messages) > len(opening) + 1:
            del messages[len(opening) : len(opening) + 2]
            ids = torch.tensor(encode_prompts([messages], encoder))

        # The answer, printed as it is generated; Ctrl-C drops it, and the conversation continues.
        sampling = (args.max_new_tokens, args.temperature, args.top_p)
        try:
            if reward:
                prompt = ids[0, -window:].tolist()
                reply = write_best(model, tokenizer, reward, prompt, messages, args)
            else:
                reply = decode(model, tokenizer, ids[:, -window:], *sampling)
        except KeyboardInterrupt:
            print()
            messages.pop()
            continue
        messages += parse_message({"role": "assistant", "content": reply}, "the reply")
    print()


def history_file() -> Path | None:
    """The file that remembers typed messages; None, with a notice, where it cannot be kept."""
    from minimind.common.cache import cache_directory

    try:
        return cache_directory(permanent=True) / "chat_history"
    except UserError as problem:
        say(f"notice: what you type is not remembered: {problem}", file=sys.stderr)
        return None


def check_chattable(directory: str, tokenizer) -> None:
    """Raise UserError if there is no chat template; warn if the model is only pretrained."""
    from minimind.stage_directory import read_stage

    if not tokenizer.chat_template:
        raise UserError(
            f"{directory}: its tokenizer has no chat template, which separates messages from"
            " replies. `minimind generate` continues texts; finetune_sft.py --chat_template chatml"
            " turns it into a chat model."
        )
    if read_stage(directory).get("stage") == "pretrain":
        say(
            f"notice: {directory} is a base model: it continues texts and has not learned to"
            " answer. See `minimind generate`, or train it on conversations with finetune_sft.py.",
            file=sys.stderr,
        )
