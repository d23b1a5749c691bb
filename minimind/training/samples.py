"""Samples: what the model writes after fixed prompts, at intervals while it trains."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations import is_deepspeed_zero3_enabled

from minimind.common.errors import BadRowError, UserError, decoration
from minimind.common.files import json_lines, write_json_lines
from minimind.common.language import say
from minimind.common.streams import printable
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.message_order import check_order
from minimind.data.messages import parse_messages
from minimind.generation import complete
from minimind.training.callback_handler import Decoration
from minimind.training.tracking import track_samples

TEXT_PROMPTS = ("从前有一个", "中国的首都是", "Once upon a time", "The capital of France is")
CHAT_PROMPTS = ("你好，你是谁？", "请写出三个国家的名字。", "Who are you?", "Name three countries.")
SHOWN = 160  # characters of a sample in the terminal
ASSISTANT = {"role": "assistant", "content": "?"}


class Prompt(NamedTuple):
    """The text that is shown of a prompt, and the ids that the model continues."""

    text: str
    ids: list[int]


def prepare_prompts(
    args, chat: bool, tokenizer: PreTrainedTokenizerFast, positions: int
) -> list[Prompt]:
    """The prompts of `--sample_prompts`, or the default prompts that a model with so many positions
    takes.

    Raises:
        UserError: the prompts, or `--sample_tokens` of each, cannot be sampled.
    """
    # A toy may have fewer positions than the default length
    path, limit = args.sample_prompts, max(positions, type(args).sample_tokens)
    if not 0 < args.sample_tokens <= limit:
        raise UserError(
            f"--sample_tokens {args.sample_tokens:,}: expected 1 to {limit:,}, which the model has"
            " positions for. For no samples give --sample_steps -1."
        )
    encoder, prepared = ChatEncoder(tokenizer) if chat else None, []
    for prompt in read_prompts(path, chat):
        text = str(prompt[-1]["content"]) if chat else prompt
        try:
            if chat:
                (ids,) = encode_prompts([prompt], encoder)
            else:
                ids = tokenizer.encode(prompt, add_special_tokens=False)
            if not 0 < len(ids) < positions:
                raise UserError(
                    f"found {len(ids):,} tokens, expected 1 to {positions - 1:,}: the model's"
                    " positions"
                )
        except UserError as error:
            if path is None:
                continue
            raise UserError(
                f"--sample_prompts {path}: {text[:40]!r}: {error}. Change that prompt."
            ) from error
        prepared.append(Prompt(text, ids))
    return prepared


def read_prompts(path: str | None, chat: bool) -> list[Any]:
    """The prompts of a file, one a line: texts, or for a chat model lists of messages that end with
    one of the user.

    A line is a text, or a JSON object with "prompt" or, for a chat model, "messages" or
    "conversations".

    Raises:
        UserError: the file cannot be read, or a line is not a prompt.
    """
    if path is None:
        prompts = list(CHAT_PROMPTS if chat else TEXT_PROMPTS)
    else:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--sample_prompts {path}: {error}. Give a UTF-8 file with one prompt a line."
            ) from error
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        prompts = [_prompt(line, f"{path}:{number}", chat) for number, line in numbered]
        if not prompts:
            raise UserError(f"--sample_prompts {path} is empty. Give one prompt a line.")
    return [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in prompts]


def _prompt(line: str, place: str, chat: bool) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(row, dict):
        return line  # a line that is a number is a text
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: found half a surrogate pair, expected text ({error.reason})."
        ) from None
    if isinstance(row.get("prompt"), str):
        if not row["prompt"]:
            raise UserError(
                f"{place}: found an empty prompt, expected a text that the model continues."
            )
        return row["prompt"]
    if not chat:
        raise UserError(f'{place}: found {line[:80]}, expected a text or {{"prompt": "..."}}.')
    name = "messages" if "messages" in row else "conversations"
    try:
        messages = parse_messages(row.get(name), name)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        check_order([*messages, ASSISTANT], name)
    except BadRowError as error:
        raise UserError(f"{place}: {error}") from error
    return messages


def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy continuation of each prompt; the random generators are left alone."""
    training = model.training
    model.eval()
    try:
        return complete(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens)
    finally:
        model.train(training)


class SampleCallback(Decoration):
    """Writes the greedy continuation of fixed prompts to the terminal, samples.jsonl and the
    trackers, every `every` steps and whenever `sample` is called.

    Greedy, so that samples of two steps can be compared and the random numbers of the training stay
    the same. Errors are reported, and the run continues.
    """

    def __init__(
        self,
        trainer,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Sequence[Prompt],
        output_dir: Path,
        every: int,
        tokens: int,
    ):
        self.trainer, self.tokenizer, self.prompts = trainer, tokenizer, prompts
        self.file, self.every, self.tokens = output_dir / "samples.jsonl", every, tokens
        self.rows: list[dict] = []

    def state_dict(self) -> dict:
        """The samples so far, for a resumed run."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        """Restore the samples; called after `on_train_begin`."""
        self.rows = state["rows"]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not state.global_step:
            self.file.unlink(missing_ok=True)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if self.every > 0 and step % self.every == 0 and step < state.max_steps:
            self.sample(state)

    def sample(self, state) -> None:
        """Sample once; all processes take part where ZeRO-3 divides the weights among them."""
        if not self.prompts or not (state.is_world_process_zero or is_deepspeed_zero3_enabled()):
            return
        with decoration("sampling"):
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            texts = write_samples(model, self.tokenizer, self.prompts, self.tokens)
            if state.is_world_process_zero:
                self._keep(state.global_step, texts)

    def _keep(self, step: int, texts: Sequence[str]) -> None:
        new = [
            {"step": step, "prompt": prompt.text, "text": text}
            for prompt, text in zip(self.prompts, texts, strict=True)
        ]
        self.rows += new
        say(f"samples after step {step:,}")
        with decoration("showing the samples"):
            for row in new:
                line = f"  {one_line(row['prompt'])} | {one_line(row['text'])}"
                print(printable(line), flush=True)
        with decoration("keeping the samples"):
            write_json_lines(self.file, self.rows)
        track_samples(self.rows, step)


def read_samples(file: Path) -> list[dict]:
    """The rows of a samples.jsonl (step, prompt, text); none if there is no file."""
    rows = [row for row in json_lines(file) if {"prompt", "text"} <= row.keys()]
    return [row for row in rows if isinstance(row.get("step"), int)]


def one_line(text: str) -> str:
    """A text for the terminal: no control characters, and not too long."""
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else "·" for c in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
