"""What comes with the weights of a checkpoint: its tokenizer and its generation settings."""

import os
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.stage_directory import GENERATION_FIELDS
from minimind.tokenizer.loading import COPY, check_side_files, unreadable

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def read_tokenizer(path: Path, required: bool, notes: list[str]) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a directory; adds to the notes what is missing.

    Raises:
        UserError: it cannot be read, or is `required` and missing.
    """
    if not os.path.lexists(path / "tokenizer.json"):
        if required:
            raise UserError(f"--tokenizer {path} holds no tokenizer: tokenizer.json was not found.")
        notes.append(
            "no tokenizer: tokenizer.json was not found. Give the model's own with --tokenizer DIR"
        )
        return None
    check_side_files(path)
    try:
        # Not AutoTokenizer, which might look at the folder's code
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    except Exception as error:
        raise unreadable(path, error) from error
    if tokenizer.pad_token is None and tokenizer.unk_token not in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token  # MiniMind-1 padded with it, without saying so
        notes.append(f"the tokenizer named no padding token: it is {tokenizer.pad_token!r} now")
    return tokenizer


def take_special_ids(
    config: MiniMindConfig, tokenizer: PreTrainedTokenizerFast, origin: str | Path
) -> None:
    """Copy the ids of padding, beginning and end from the tokenizer; raises UserError if it has
    more tokens than the model."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer has {len(tokenizer):,} tokens, the model"
            f" {config.vocab_size:,}. They do not belong together; give the model's own with"
            " --tokenizer."
        )
    for name in SPECIAL_IDS:
        before, now = getattr(config, name), getattr(tokenizer, name)
        # Qwen3 names several ends
        if now is not None and not (isinstance(before, list) and now in before):
            setattr(config, name, now)


def read_generation_config(source: Path, model: MiniMindForCausalLM, notes: list[str]) -> None:
    """Give the model the folder's generation settings, unless the library refuses to save them."""
    file = source / "generation_config.json"
    if not os.path.lexists(file):
        return
    raw = read_json(file, f"{COPY} Or delete it.", fields=GENERATION_FIELDS)
    try:
        settings = GenerationConfig.from_dict(raw)
        settings.validate(strict=True)
    except (ValueError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        notes.append(f"left out generation_config.json, which contradicts itself: {first_line}")
        return
    for name in SPECIAL_IDS:
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(model.config, name))
    model.generation_config = settings
