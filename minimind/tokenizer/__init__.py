"""Byte-level BPE with ChatML: train a tokenizer, load one from a directory, encode documents.

Any byte sequence can be encoded and decodes to itself; there is no unknown token.
"""

# ruff: noqa: F401 (the public names of this room)

from minimind.tokenizer.loading import (
    DEFAULT_TOKENIZER,
    check_destination,
    load_tokenizer,
    save_tokenizer,
    text_bytes,
    text_encoder,
    token_byte_lengths,
    tokenizer_hash,
)
from minimind.tokenizer.splitting import PRE_TOKENIZERS, SPLIT_PATTERN
from minimind.tokenizer.training import (
    BOS_TOKEN,
    CHAT_TEMPLATE,
    EOS_TOKEN,
    PAD_TOKEN,
    SPECIAL_TOKENS,
    train_tokenizer,
)
