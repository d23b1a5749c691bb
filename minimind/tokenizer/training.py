"""Train a byte-level BPE tokenizer with ChatML."""

import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import UserError
from minimind.tokenizer.cutting import Cutter
from minimind.tokenizer.splitting import PRE_TOKENIZERS

# The order fixes the ids 0, 1, 2. Padding must not be the end token: masking the padding would then
# mask the end of every reply, and the model would never learn to stop.
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN)
CHAT_TEMPLATE = Path(__file__).parent / "chatml.jinja"


def new_bpe(pre_tokenizer: str) -> Tokenizer:
    """BPE without a vocabulary, to be trained; raises UserError for a name that is not in
    PRE_TOKENIZERS."""
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise UserError(
            f"--pre_tokenizer {pre_tokenizer}: expected one of {', '.join(PRE_TOKENIZERS)}."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    return bpe


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 6400,
    pre_tokenizer: str = "qwen2",
    min_frequency: int = 0,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer for chat on `texts`; the same texts give the same tokenizer.

    The result has fewer tokens than `vocab_size` if the texts have no more pairs to merge.

    Args:
        pre_tokenizer: one of `splitting.PRE_TOKENIZERS`.
        min_frequency: pairs that occur less often are not merged.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the special tokens,
            `pre_tokenizer` is unknown, or `min_frequency` is below 0.
        BadRowError: a text that `Cutter` refuses.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"--vocab_size {vocab_size} is too small: 256 bytes and the special tokens need"
            f" {smallest}."
        )
    if min_frequency < 0:
        raise UserError(f"--min_frequency {min_frequency}: expected 0 or more.")
    bpe = new_bpe(pre_tokenizer)
    cut = Cutter(new_bpe(pre_tokenizer))  # another one: a tokenizer in training cannot be used
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        # The trainer's own bars, for reading and for merging
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator((piece for text in texts for piece in cut(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )
