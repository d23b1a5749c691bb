"""A conversation in the terminal: its turns so far, its commands, and the prompt of each answer."""

import re
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from minimind.commands.best_of import write_best
from minimind.common.errors import BadRowError, UserError
from minimind.common.files import check_output, read_json, write_text
from minimind.common.language import say, translated
from minimind.common.streams import json_text, printable
from minimind.common.terminal import Terminal

HELP = """Enter sends a message; a paste of several lines is one. The arrows reach earlier messages.
Ctrl-C drops the line, or stops an answer.
/new            forgets the conversation
/undo           forgets the last message and its answer
/retry          answers the last message again
/system TEXT    sets the system prompt, and starts again; without a text removes it
/save FILE      writes the conversation as a row that finetune_sft.py can train on
/load FILE      continues a saved conversation
/temperature X  how freely tokens are chosen; 0 takes the most likely one
/max N          the maximum tokens of an answer
/exit           ends the chat, as Ctrl-D does
A message that begins with / needs a space before it."""
TEXT_HELP = """Enter continues the text that you begin; Enter alone continues it further.
A paste of several lines is one text. The arrows reach earlier texts.
Ctrl-C drops the line, or stops the text.
/new            forgets all texts
/undo           forgets the last text
/retry          continues the last text again, from where your words end
/temperature X  how freely tokens are chosen; 0 takes the most likely one
/max N          the maximum tokens of a continuation
/exit           ends the chat, as Ctrl-D does
A text that begins with / needs a space before it."""
# Not /etc/passwd. Chinese input methods write the key / as the other two signs
COMMAND = re.compile(r"[/／、]([a-z]+)(?:\s+(.*))?", re.DOTALL)


class Session:
    """What `minimind chat` does with each line; subclasses know what a turn is.

    A command is a method: /new is `new`. It takes the rest of the line, and raises UserError.
    """

    COMMANDS = ("help", "new", "undo", "retry", "temperature", "max")

    def __init__(self, model, tokenizer, args: Namespace, reward: Any = None):
        self.model, self.tokenizer, self.args, self.reward = model, tokenizer, args, reward
        positions = model.config.max_position_embeddings
        self.window = max(positions - args.max_new_tokens, positions // 2)  # tokens of a prompt
        self.turns: list[Any] = []

    def take(self, text: str, interactive: bool) -> bool:
        """Obey a command or answer a message; returns whether the chat goes on."""
        command = COMMAND.fullmatch(text)
        try:
            if command is None:
                self.message(text.strip(), interactive)
            elif (name := command[1]) in ("exit", "quit"):
                return False
            elif name in self.COMMANDS:
                getattr(self, name)((command[2] or "").strip())
            else:
                say(f"/{name}: no such command. See /help.")
        except UserError as problem:
            say(str(problem))
        return True

    def message(self, text: str, interactive: bool) -> None:
        """Answer a message."""
        raise NotImplementedError

    def prompt(self) -> list[int]:
        """The ids that the next answer follows."""
        raise NotImplementedError

    def write(self) -> Any:
        """Generate after the prompt, printing the text as it grows; None if Ctrl-C stopped it."""
        import torch

        from minimind.generation import decode

        options, began = self.args, time.perf_counter()
        try:
            ids = self.prompt()
            if self.reward:
                reply = write_best(
                    self.model, self.tokenizer, self.reward, ids, self.messages(), options
                )
            else:
                sampling = (options.max_new_tokens, options.temperature, options.top_p)
                reply = decode(self.model, self.tokenizer, torch.tensor([ids]), *sampling)
        except KeyboardInterrupt:
            print()
            return None
        seconds = time.perf_counter() - began
        if sys.stdout.isatty():
            count = len(reply.tokens) + reply.stopped
            end = "" if reply.stopped else f"; cut at /max {options.max_new_tokens}"
            rate = translated(f"{count:,} tokens, {count / seconds:,.0f} tokens/s{end}")
            Terminal().print(rate, style="dim")
        return reply

    def cut(self, ids: list[int]) -> list[int]:
        """The end of a prompt that is longer than the window, which is said."""
        if (beyond := len(ids) - self.window) > 0:
            say(
                f"notice: the prompt has {len(ids):,} tokens, and there is room for"
                f" {self.window:,}: its first {beyond:,} are left out.",
                file=sys.stderr,
            )
        return ids[-self.window :]

    # Commands

    def help(self, _: str) -> None:
        """List the commands."""
        say(HELP)

    def new(self, _: str) -> None:
        """Forget the conversation."""
        self.turns = []

    def undo(self, _: str) -> None:
        """Forget the last turn."""
        if not self.turns:
            raise UserError("/undo: there is no message yet.")
        self.turns.pop()

    def retry(self, _: str) -> None:
        """Generate the last answer again."""
        raise NotImplementedError

    def temperature(self, argument: str) -> None:
        """Set the sampling temperature."""
        self.args.temperature = number("/temperature", argument, float, 0, 100)

    def max(self, argument: str) -> None:
        """Set the maximum tokens of an answer."""
        positions = self.model.config.max_position_embeddings
        self.args.max_new_tokens = number("/max", argument, int, 1, positions - 1)
        self.window = max(positions - self.args.max_new_tokens, positions // 2)


class ChatSession(Session):
    """Messages and replies through the chat template; a turn is the messages of one exchange.

    When the conversation fills the model's window, the oldest turns are left out of the prompt.
    """

    COMMANDS = (*Session.COMMANDS, "system", "save", "load")

    def __init__(self, model, tokenizer, args: Namespace, reward: Any = None):
        from minimind.data.chat_encoder import ChatEncoder

        super().__init__(model, tokenizer, args, reward)
        self.encoder = ChatEncoder(tokenizer)
        self.opening = [{"role": "system", "content": args.system}] if args.system else []
        self.left_out = 0  # turns that no longer fit

    def messages(self) -> list[dict]:
        """All messages that the next answer follows."""
        return [*self.opening, *(message for turn in self.turns for message in turn)]

    def message(self, text: str, interactive: bool) -> None:
        """Answer a message; where Ctrl-C stops the answer, the message is forgotten."""
        from minimind.data.messages import reply_message

        if not text:
            return
        if not interactive:
            print(f"> {printable(text)}")
        self.turns.append([{"role": "user", "content": text}])
        try:
            reply = self.write()
        except UserError:
            self.turns.pop()
            raise
        if reply is None:
            self.turns.pop()
        else:
            self.turns[-1].append(reply_message(reply.text))

    def prompt(self) -> list[int]:
        """As many of the last turns as fit, after the system prompt; else the last one's end."""
        from minimind.data.chat_encoder import encode_prompts

        for first in range(len(self.turns)):
            kept = [message for turn in self.turns[first:] for message in turn]
            (ids,) = encode_prompts([[*self.opening, *kept]], self.encoder)
            if len(ids) <= self.window:
                break
        if first > self.left_out:
            say(
                f"notice: the conversation is longer than the {self.window:,} tokens that the"
                f" model can read: its first {first:,} turns are left out.",
                file=sys.stderr,
            )
        self.left_out = first
        return self.cut(list(ids))

    # Commands

    def new(self, argument: str) -> None:
        """Forget the conversation, but not the system prompt."""
        super().new(argument)
        self.left_out = 0

    def retry(self, _: str) -> None:
        """Answer the last message again."""
        if not self.turns:
            raise UserError("/retry: there is no message yet.")
        last, kept = self.turns.pop(), len(self.turns)
        self.message(last[0]["content"], interactive=True)
        if len(self.turns) == kept:  # it was stopped: keep the old answer
            self.turns.append(last)

    def system(self, argument: str) -> None:
        """Set the system prompt, and start again."""
        self.opening = [{"role": "system", "content": argument}] if argument else []
        self.new("")

    def save(self, argument: str) -> None:
        """Write the conversation as one row of jsonl."""
        if not argument or not self.turns:
            raise UserError("/save: expected a file's name, and a conversation to write.")
        file = named_file(argument)
        check_output(file)
        if file.exists():
            raise UserError(f"/save: {file} exists. Give another name.")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json_text({"messages": self.messages()}) + "\n")
        except (OSError, ValueError) as error:  # a NUL
            problem = getattr(error, "strerror", None) or str(error)
            raise UserError(f"/save: {file}: {problem}. Give another name.") from error
        say(f"{len(self.messages()):,} messages -> {file}")

    def load(self, argument: str) -> None:
        """Continue the conversation of a file that /save wrote."""
        from minimind.data.conversations import to_conversation

        remedy = "Give a file that /save wrote."
        row = read_json(named_file(argument), remedy, fields={"messages": list})
        try:
            messages = to_conversation(row).messages
        except BadRowError as problem:
            raise UserError(f"{argument}: {problem}. {remedy}") from problem
        opening = [each for each in messages[:1] if each["role"] == "system"]
        if [each["role"] for each in messages[len(opening) :][:1]] != ["user"]:
            raise UserError(f"{argument}: found no message of the user at its start. {remedy}")
        self.opening = opening
        self.new("")
        for message in messages[len(opening) :]:
            if message["role"] == "user":
                self.turns.append([])
            self.turns[-1].append(message)
        say(f"{argument}: {len(messages):,} messages. Type the next one.")


class TextSession(Session):
    """The continuation of texts by a base model; a turn is one text."""

    def help(self, _: str) -> None:
        """List the commands."""
        say(TEXT_HELP)

    def message(self, text: str, interactive: bool) -> None:
        """Continue a text, or without one the last text."""
        if text:
            self.turns.append([text, ""])
        if not self.turns:
            return
        if not interactive:
            print(f"> {printable(text)}")
        if reply := self.write():
            self.turns[-1][1] += reply.text

    def prompt(self) -> list[int]:
        """The end of the text so far, after the end token where nothing is left out."""
        from minimind.generation import text_start

        return self.cut(text_start(self.tokenizer, "".join(self.turns[-1])))

    def retry(self, _: str) -> None:
        """Continue the last text again, from where the user's words end."""
        if not self.turns:
            raise UserError("/retry: there is no message yet.")
        self.turns[-1][1] = ""
        self.message("", interactive=True)


def named_file(argument: str) -> Path:
    """The file that a user names; raises UserError where ~ is nobody's home."""
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise UserError(f"{argument}: there is no such user.") from error


def number(command: str, argument: str, kind: type, low: float, high: float) -> Any:
    """The number after a command; raises UserError."""
    try:
        value = kind(argument)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise UserError(
            f"{command}: found {printable(argument) or 'nothing'}, expected a number from {low} to"
            f" {high:,}."
        )
    return value
