"""Write and load a tokenizer's directory; its hash, and the bytes of its tokens."""

import json
import os
import tempfile
from pathlib import Path

import xxhash
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minimind.common.errors import UserError, reason
from minimind.common.files import read_file, read_json

# As byte-level vocabularies write them
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEFAULT_TOKENIZER = Path(__file__).parent / "default"
COPY = "Copy the file again from where it is complete, or write the directory again."


def check_destination(directory: Path) -> None:
    """Raises UserError for a directory whose tokenizer belongs to a model, or to another
    program."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output_dir {directory} is a file. Give a directory.")
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    strangers = sorted(name for name in names - {*TOKENIZER_FILES} if not name.startswith("."))
    if strangers and names & {*TOKENIZER_FILES}:
        raise UserError(
            f"--output_dir {directory} holds a tokenizer and more: found"
            f" {', '.join(strangers[:3])}. A model is read with the tokenizer beside it, and"
            " another one would spoil it. Give a directory that does not exist yet."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a tokenizer's files, `tokenizer.json` last: a directory that has it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial") as partial:
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == "tokenizer.json"):
            file.replace(directory / file.name)


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer in directory `path`, by default the 6,400-token one of the package.

    What a tokenizer lacks is judged where it is needed: the end token by `documents.preparation`,
    the chat template by `template_choice.set_chat_template`.
    It may lack an end token or a chat template; those who need one check that.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.
    """
    path = Path(path or DEFAULT_TOKENIZER)
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path} holds no tokenizer: tokenizer.json was not found. Expected a stage directory"
            " or the output of 'minimind tokenizer train'."
        )
    check_side_files(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise unreadable(path, error) from error
    if isinstance(tokenizer.chat_template, dict):  # several by name: for chats, for tools, ...
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.pad_token_id is None:  # padding is masked by position, so any token may pad
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def check_side_files(path: Path) -> None:
    """Raises UserError for unreadable files beside a tokenizer.json, which the library would
    ignore."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if os.path.lexists(path / name):
            read_json(path / name, COPY, fields={"model_max_length": int | float | None})
    template = path / "chat_template.jinja"
    if os.path.lexists(template):
        try:
            read_file(template, COPY).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{template} is not UTF-8: {error}. {COPY}") from error


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a tokenizer that a library cannot load; raises a more exact UserError if one of
    its files is not JSON."""
    for name in ("tokenizer.json", "config.json"):
        if os.path.lexists(path / name):
            read_json(path / name, COPY)
    files = "tokenizer.json, tokenizer_config.json or config.json"
    return UserError(f"the tokenizer in {path} cannot be read: {reason(error)} (in {files})")


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of what decides the ids: vocabulary, merges and splitting, but not the padding last
    used."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    return xxhash.xxh3_128_hexdigest(json.dumps(state, sort_keys=True).encode())


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The Rust tokenizer for raw text, in which "<|im_end|>" is ten characters, not the end of a
    document."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True
    return encoder


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of text of each id; None for an id without a token."""
    state = json.loads(tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["decoder"]])
    added = {token["id"] for token in state["added_tokens"]}
    vocabulary = tokenizer.get_vocab()
    result: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in added:
            result[index] = token.encode()
        elif byte_level and all(character in BYTE_OF for character in token):
            result[index] = bytes(map(BYTE_OF.get, token))
        elif state["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            result[index] = bytes.fromhex(token[3:5])
        else:  # SentencePiece and WordPiece
            result[index] = token.replace("▁", " ").removeprefix("##").encode()
    return result


def text_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of text of each id; a special token has none."""
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = token_bytes(tokenizer.backend_tokenizer)
    return [b"" if index in special else piece or b"" for index, piece in enumerate(pieces)]


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The number of bytes in `text_bytes` of each id."""
    return [len(piece) for piece in text_bytes(tokenizer)]
