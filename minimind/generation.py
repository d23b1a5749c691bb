"""Load a stage directory for generation, and decode with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from minimind.common.errors import UserError, reason
from minimind.common.streams import printable
from minimind.stage_directory import (
    check_vocabulary,
    load_for_reading,
    read_stage,
    require_stage,
    virtual_tokens,
)
from minimind.tokenizer import load_tokenizer


class Streamer(BaseStreamer):
    """Prints the text of new tokens as soon as its characters are complete, and keeps it.

    Half a character, such as the first bytes of one that the last token cut, is never shown; nor
    can the text control the terminal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer.backend_tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text, self.tokens, self.is_prompt = "", [], True

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt's tokens (1, S), then with each new one, (1,)."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.tolist():
            self.tokens.append(token)
            if piece := self.stream.step(self.tokenizer, token):
                self.text += piece
                print(printable(piece), end="", flush=True)

    def end(self) -> None:
        """Called after the last token."""
        print(flush=True)


def load_for_generation(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, in evaluation mode on the best device, and tokenizer of a stage directory.

    Raises:
        UserError: they cannot be loaded, do not belong together, or a weight is not finite.
    """
    path = require_stage(directory)
    tokenizer = load_tokenizer(path)
    model = load_for_reading(path).eval()
    check_vocabulary(model, tokenizer, path)
    check_finite(model, path)
    return model.to(best_device()), tokenizer


def check_finite(model: PreTrainedModel, path: Path) -> None:
    """Raises UserError where a weight is not finite."""
    weights = model.named_parameters()
    if broken := [name for name, weight in weights if not torch.isfinite(weight).all()]:
        raise UserError(
            f"{path}: {len(broken):,} tensors hold weights that are not finite, such as"
            f" {broken[0]}. Take an earlier checkpoint of the run."
        )


def best_device() -> str:
    """The name of the device that computes fastest here."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    return next((name for name, backend in backends.items() if backend.is_available()), "cpu")


def is_base_model(directory: str | Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a model only continues texts: it comes from pretraining, or has no chat template."""
    return not tokenizer.chat_template or read_stage(directory).get("stage") == "pretrain"


class Reply(NamedTuple):
    """What a model wrote: its text, its tokens without the end token, and whether it ended there
    by itself."""

    text: str
    tokens: list[int]
    stopped: bool


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Reply:
    """Generate after `input_ids` (1, S), printing the text as it grows.

    Raises:
        UserError: the model's generation settings cannot be used here, or its probabilities are not
            numbers.
    """
    room = model.config.max_position_embeddings - virtual_tokens(model) - input_ids.shape[1]
    streamer = Streamer(tokenizer)
    with torch.inference_mode(), generation_errors(model):
        model.generate(
            input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            max_new_tokens=max(1, min(max_new_tokens, room)),
            use_cache=True,  # training turns it off in the configuration
            streamer=streamer,
            **sampling_options(temperature, top_p),
        )
    tokens = streamer.tokens
    end = next((place for place, token in enumerate(tokens) if token in end_tokens(model)), None)
    return Reply(streamer.text, tokens[:end], end is not None)


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The ids that end a text."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def text_start(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a text that a model continues: like a document in training, it follows the end
    token."""
    return [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]


def sampling_options(temperature: float, top_p: float) -> dict:
    """The arguments of `generate` that choose tokens; temperature 0 takes the most likely one."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


@contextmanager
def generation_errors(model: PreTrainedModel) -> Iterator[None]:
    """Turn what the library raises for a model's settings or broken weights into a UserError."""
    try:
        yield
    except (ValueError, TypeError) as error:  # such as beams, which cannot be streamed
        file = f"{model.config._name_or_path}/generation_config.json"
        raise UserError(
            f"{file}: a setting cannot be used here ({reason(error)}). Take it out."
        ) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(
            "the model's probabilities are not numbers: its configuration or weights are damaged."
        ) from error


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Reply]:
    """The continuation of each prompt of token ids, in one batch with padding on the left.

    Raises:
        UserError: see `decode`.
    """
    if virtual_tokens(model, embedded=True) and len({*map(len, prompts)}) > 1:
        # Padding would be between them and the text
        rest = max_new_tokens, temperature, top_p
        return [generate_batch(model, tokenizer, [each], *rest)[0] for each in prompts]
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    with torch.inference_mode(), generation_errors(model):
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            use_cache=True,  # training turns it off in the configuration
            **sampling_options(temperature, top_p),
        )
    ends, replies = end_tokens(model), []
    for tokens in output[:, length:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        replies.append(Reply(text, tokens[:end], end is not None))
    return replies


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy continuation of each prompt of token ids, in batches with padding on the left."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    replies = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[index] for index in chosen]
        written = generate_batch(model, tokenizer, batch, max_new_tokens)
        for index, reply in zip(chosen, written, strict=True):
            replies[index] = reply.text
    return replies
