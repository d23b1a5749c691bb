"""Byte-level BPE with ChatML: training one, and loading one from a directory.

Any byte sequence can be tokenised and comes back unchanged; there is no unknown token.
"""

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import xxhash
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minimind.errors import UserError

# The order fixes the ids 0, 1, 2. Padding is its own token, never the end token: were they one, masking the padding
# would mask the end of every reply, and the model would never learn to stop.
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN)

DEFAULT_TOKENIZER = Path(__file__).parent / "default"
CHAT_TEMPLATE = Path(__file__).parent / "chatml.jinja"

# Qwen2's splitting rule, which llama.cpp knows under the name "qwen2": words keep the one character before them,
# digits stand alone (numbers are composed instead of memorised), runs of newlines are one piece.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`, ready for chat.

    The result may hold fewer tokens than `vocab_size` where the texts have no more pairs to merge.

    Raises:
        UserError: `vocab_size` leaves no room beside the 256 bytes and the special tokens.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"--vocab_size {vocab_size} is too small: 256 bytes and the special tokens need {smallest}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a tokenizer's files whole, `tokenizer.json` last, so that a directory that has it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial") as partial:
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == "tokenizer.json"):
            file.replace(directory / file.name)


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer in directory `path`, by default the 6,400-token one that ships with the package.

    Raises:
        UserError: there is no tokenizer, or it lacks what every stage needs: an end token, a padding token other
            than it, and a chat template.
    """
    path = Path(path or DEFAULT_TOKENIZER)
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} holds no tokenizer: tokenizer.json was not found. Expected a stage directory or the output of "
            "'minimind tokenizer train'."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise UserError(f"the tokenizer in {path} cannot be read: {error}") from error
    problems = []
    if tokenizer.eos_token_id is None:
        problems.append("it has no eos_token, so documents cannot be separated and replies cannot end")
    if tokenizer.pad_token_id is None:
        problems.append("it has no pad_token")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        problems.append(f"pad_token and eos_token are both {tokenizer.eos_token!r}, so masked padding hides the end")
    if not tokenizer.chat_template:
        problems.append("it has no chat template (chat_template.jinja)")
    elif not re.search(r"{%-?\s*generation\b", tokenizer.chat_template):
        problems.append("its chat template has no {% generation %} block, so the assistant's words cannot be found")
    if problems:
        raise UserError(
            f"the tokenizer in {path} cannot be trained with: {'; '.join(problems)}. "
            f"Train one with 'minimind tokenizer train', or leave the default."
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of what decides the ids: vocabulary, merges and splitting, not the padding last asked for."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The Rust tokenizer for raw text, in which "<|im_end|>" is ten characters and not the end of a document."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True
    return encoder


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """How many bytes of text each token id stands for; special tokens stand for none.

    In a byte-level vocabulary each character of a token's string is one byte.
    """
    lengths = [0] * len(tokenizer)
    special = set(tokenizer.all_special_ids)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id not in special:
            lengths[token_id] = len(token)
    return lengths
