"""Several replies of a model to each of many prompts, sampled in batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import UserError
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.conversations import Conversation
from minimind.generation import Reply, generate_batch

Model = tuple[PreTrainedModel, PreTrainedTokenizerFast]
Replies = list[list[Reply]]  # for each of some prompts, its replies


class Sampling(NamedTuple):
    """How replies are sampled; with a model and its prompts it decides every one of them."""

    samples: int  # for each prompt
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int  # replies at a time


def encode_fitting(
    prompts: Sequence[Conversation], models: Sequence[Model], max_new_tokens: int
) -> tuple[list[Conversation], list[list[list[int]]]]:
    """The prompts that leave each model positions for a reply, and for each model their ids.

    Raises:
        UserError: no prompt does, or a template cannot express one.
    """
    encoded = [encode_prompts(prompts, ChatEncoder(tokenizer)) for _, tokenizer in models]
    rooms = [model.config.max_position_embeddings - max_new_tokens for model, _ in models]
    kept = [
        index
        for index in range(len(prompts))
        if all(len(ids[index]) <= room for ids, room in zip(encoded, rooms, strict=True))
    ]
    if not kept:
        shortest = min(map(len, encoded[0]))
        raise UserError(
            f"all prompts are too long: the shortest has {shortest:,} tokens, and the model has"
            f" positions for {min(rooms):,} and a reply. Give shorter prompts, or a smaller"
            " --max_new_tokens."
        )
    return [prompts[i] for i in kept], [[ids[i] for i in kept] for ids in encoded]


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    done: Mapping[int, Replies] | None = None,
    keep: Callable[[int, Replies], None] | None = None,
    title: str = "sampling",
) -> Iterator[tuple[int, Replies]]:
    """Yield the replies to some prompts of token ids at a time, with the index of the first.

    Each step has a seed of its own, made of the seed and that index: the replies are the same
    whether the steps before it are computed now or were `done` before. A step computed now is given
    to `keep` first.

    Raises:
        UserError: see `decode`.
    """
    done, samples = done or {}, sampling.samples
    step = max(1, sampling.batch_size // samples)
    with tqdm(total=len(prompts) * samples, unit=" replies", desc=title, disable=None) as progress:
        for start in range(0, len(prompts), step):
            replies = done.get(start)
            if replies is None:
                chosen = prompts[start : start + step]
                state = np.random.SeedSequence([sampling.seed, start]).generate_state(1)
                torch.manual_seed(int(state[0]))
                rows = [prompt for prompt in chosen for _ in range(samples)]
                written = []
                for first in range(0, len(rows), sampling.batch_size):
                    batch = rows[first : first + sampling.batch_size]
                    written += generate_batch(model, tokenizer, batch, *sampling[1:4])
                replies = [written[i : i + samples] for i in range(0, len(rows), samples)]
                if keep:
                    keep(start, replies)
            progress.update(len(replies) * samples)
            yield start, replies
