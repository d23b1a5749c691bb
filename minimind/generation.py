"""Load a stage directory to generate text with it."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextStreamer

from minimind.common.errors import UserError, reason
from minimind.common.streams import printable
from minimind.stage_directory import check_vocabulary, load_model, require_stage
from minimind.tokenizer import load_tokenizer


class Streamer(TextStreamer):
    """Identical to the library's except: what a model writes cannot control the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Called with each piece of the text."""
        super().on_finalized_text(printable(text), stream_end)


def load_for_generation(directory: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, in evaluation mode on the best device, and tokenizer of a stage directory; raises
    UserError."""
    path = require_stage(directory)
    tokenizer = load_tokenizer(path)
    model = load_model(path).eval()
    check_vocabulary(model, tokenizer, path)
    if bad := [
        name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()
    ]:
        raise UserError(
            f"{path}: {len(bad):,} tensors hold weights that are not finite, such as {bad[0]}: it"
            " can say nothing. Take an earlier checkpoint of the run."
        )
    device = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
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
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
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
