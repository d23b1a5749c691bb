"""Load a stage directory for generation, and decode with it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from minimind.common.errors import UserError, reason
from minimind.common.streams import printable
from minimind.stage_directory import (
    check_vocabulary,
    load_for_reading,
    require_stage,
    virtual_tokens,
)
from minimind.tokenizer import load_tokenizer


class Streamer(TextStreamer):
    """Identical to the library's except: the text cannot control the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Called with each piece of the text."""
        super().on_finalized_text(printable(text), stream_end)


def load_for_generation(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, in evaluation mode on the best device, and tokenizer of a stage directory.

    Raises:
        UserError: they cannot be loaded, do not belong together, or a weight is not finite.
    """
    path = require_stage(directory)
    tokenizer = load_tokenizer(path)
    model = load_for_reading(path).eval()
    check_vocabulary(model, tokenizer, path)
    weights = model.named_parameters()
    if broken := [name for name, weight in weights if not torch.isfinite(weight).all()]:
        raise UserError(
            f"{path}: {len(broken):,} tensors hold weights that are not finite, such as"
            f" {broken[0]}, so it cannot generate. Take an earlier checkpoint of the run."
        )
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    device = next((name for name, backend in backends.items() if backend.is_available()), "cpu")
    return model.to(device), tokenizer


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> str:
    """Generate after `input_ids` (1, S), printing the text as it grows; returns the new text.

    Raises:
        UserError: the model's generation settings cannot be used here, or its probabilities are not
            numbers.
    """
    room = model.config.max_position_embeddings - virtual_tokens(model) - input_ids.shape[1]
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    try:
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            max_new_tokens=max(1, min(max_new_tokens, room)),
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
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
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy continuation of each prompt of token ids, in batches with padding on the left."""
    if virtual_tokens(model, embedded=True):
        batch_size = 1  # padding would be between them and the text
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    replies = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), length), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            begin = length - len(prompts[index])
            ids[row, begin:] = torch.tensor(prompts[index])
            mask[row, begin:] = 1
        with torch.inference_mode():
            output = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,  # training turns it off in the configuration
            )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            replies[index] = text
    return replies
