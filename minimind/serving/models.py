"""Stage directories -> the models of a server: exported once, loaded, each with its batch."""

import sys
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from minimind.common.cache import content_hash, find_or_build
from minimind.common.errors import BadRowError, UserError
from minimind.common.language import say
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.conversations import Conversation
from minimind.data.long_conversations import turns
from minimind.export import export
from minimind.export.layouts import natural_layout, obstacles
from minimind.generation import end_tokens, is_base_model, load_for_generation, text_start
from minimind.serving.batching import Batcher
from minimind.serving.requests import RequestError
from minimind.stage_directory import holds_reward_model, load_config, provenance, require_stage
from minimind.tokenizer.loading import TOKENIZER_FILES

KEPT_FILES = ("config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES)


def names_of(directories: Sequence[str | Path]) -> list[str]:
    """The models' names: the ends of their paths, as short as tells them apart.

    Raises:
        UserError: a directory is given twice.
    """
    paths = [Path(directory).resolve() for directory in directories]
    for size in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-size:]) for path in paths]
        if len({*names}) == len(names):
            return names
    raise UserError(f"{directories[0]}: found it twice, expected two different models.")


def exported(directory: str) -> Path:
    """The model of a stage directory in the stock layout, from the cache where it was exported
    before; a model that no stock layout expresses stays in ours, and a stock model as it is.

    Raises:
        UserError: it holds no language model, or cannot be exported; see `export`.
    """
    path = require_stage(directory)
    if holds_reward_model(path):
        raise UserError(
            f"{path} is a reward model: it scores replies and writes none. Give a chat model or a"
            " base model."
        )
    config = load_config(path)
    if config.model_type != "minimind":
        return path
    layout = natural_layout(config)
    layout = "minimind" if obstacles(config, layout) else layout

    # What decides the export: the weights and small files of the directory and of an adapter's base
    weights, places, origin = [], [], provenance(path)
    while origin:
        weights.append(origin["weights"])
        places.append(Path(origin["directory"]))
        origin = origin.get("base")
    files = [place / name for place in places for name in KEPT_FILES]
    key = {
        "weights": weights,
        "files": content_hash(file for file in files if file.is_file()),
        "layout": layout,
    }

    def build(out: Path) -> dict:
        say(f"exporting {path} ({layout}), once for these weights", file=sys.stderr)
        export(path, out, layout)
        return {}

    return find_or_build("exports", key, build)[0]


class Served:
    """A model that a server offers under a name, and the batch that writes its texts.

    Args:
        most: texts at a time.

    Raises:
        UserError: see `exported`.
    """

    def __init__(self, directory: str, name: str, most: int):
        self.name, self.directory, self.path = name, directory, exported(directory)
        self.model, self.tokenizer = load_for_generation(str(self.path))
        self.is_base = is_base_model(directory, self.tokenizer)
        self.encoder = None if self.is_base else ChatEncoder(self.tokenizer)
        # A copy: the batch's thread reads it while prompts are encoded
        self.decoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self.ends = end_tokens(self.model)
        self.positions = self.model.config.max_position_embeddings
        self.batcher = Batcher(self.model, most)
        self.batcher.start()

    def chat_prompt(self, conversation: Conversation, limit: int) -> tuple[list[int], int]:
        """The ids of a conversation, ready for a reply of `limit` tokens, and how many of its
        messages are left out: as `minimind chat` does, the first turns where all do not fit.

        Raises:
            RequestError: it is a base model, the template refuses the conversation, or the last
                turn alone does not fit.
        """
        if self.encoder is None:
            raise RequestError(
                400,
                f"{self.name} is a base model: it continues texts and has not learned to answer."
                " Use /v1/completions.",
                "model",
            )
        messages, borders = conversation.messages, turns(conversation.messages)
        opening = messages[: borders[0][0]]
        room = max(self.positions - limit, self.positions // 2)

        @cache
        def encode(first: int) -> list[int]:
            kept = [*opening, *messages[borders[first][0] :]]
            (encoded,) = self.encoder.encode([conversation._replace(messages=kept)], prompt=True)
            if isinstance(encoded, BadRowError):
                raise RequestError(400, f"{encoded}.", "messages")
            return list(encoded.ids)

        def fits(first: int) -> bool:
            return len(encode(first)) <= room

        # Of a conversation that is far too long, at most twice the last turns that fit are encoded
        first, last, count = 0, len(borders) - 1, 1
        if sum(len(message["content"]) for message in messages) > 8 * self.positions:
            while count <= last and fits(last + 1 - count):
                count *= 2
            first = max(0, last + 1 - count)
        if not fits(first):
            first += 1 + bisect_left(range(first + 1, last + 1), True, key=fits)
        if first > last:
            self.refuse_long(len(encode(last)), room)
        return encode(first), borders[first][0] - len(opening)

    def text_prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """The ids that texts, or lists of ids, are continued from; raises RequestError."""
        rows = []
        for prompt in prompts or [[]]:
            ids = text_start(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
            if not ids or not all(0 <= token < self.model.config.vocab_size for token in ids):
                raise RequestError(400, "prompt: expected texts, or ids of tokens.", "prompt")
            if len(ids) >= self.positions:
                self.refuse_long(len(ids), self.positions - 1)
            rows.append(ids)
        return rows

    def refuse_long(self, tokens: int, room: int) -> None:
        """Raise RequestError for a prompt that does not fit."""
        raise RequestError(
            400,
            f"the prompt has {tokens:,} tokens, and {self.name} has room for {room:,}.",
            code="context_length_exceeded",
        )
