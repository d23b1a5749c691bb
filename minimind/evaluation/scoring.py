"""Log-probabilities of continuations: what minimal pairs, choices and bits per byte are made of."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.language import translated
from minimind.evaluation.replies import Sampling, sample_replies
from minimind.generation import Reply

BATCH_TOKENS = 2**11  # of one batch, padding included
MAX_LOGITS = 2**25  # of one batch


class Request(NamedTuple):
    """Token ids: `continuation` is predicted after `context`, which has one id at least."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Subject(Protocol):
    """What is scored: a model, or a control that takes a model's place."""

    tokenizer: PreTrainedTokenizerFast
    max_length: int  # of context and continuation together, in tokens

    def log_probabilities(
        self, requests: Sequence[Request], title: str = "scoring"
    ) -> list[np.ndarray]:
        """In nats, of each token of each continuation: float64 arrays of (tokens,)."""
        ...

    def replies(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """What follows each prompt of token ids; the first sample."""
        ...


class ModelSubject:
    """A causal language model and its tokenizer as a `Subject`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length = model.config.max_position_embeddings

    @torch.inference_mode()
    def log_probabilities(
        self, requests: Sequence[Request], title: str = "scoring"
    ) -> list[np.ndarray]:
        """See `Subject`. Requests with the same input are computed once; those of about one length
        are in one batch, padded on the right, where no token sees the padding."""
        inputs = [(*request.context, *request.continuation)[:-1] for request in requests]
        waiting = sorted(dict.fromkeys(inputs), key=lambda ids: (-len(ids), ids))
        owners: dict[tuple[int, ...], list[int]] = {}
        for index, ids in enumerate(inputs):
            owners.setdefault(ids, []).append(index)
        results: list[np.ndarray] = [np.empty(0)] * len(requests)
        limit = min(BATCH_TOKENS, MAX_LOGITS // self.model.config.vocab_size)
        with tqdm(total=len(requests), desc=translated(title), disable=None) as progress:
            while waiting:
                count = max(1, limit // len(waiting[0]))
                chosen, waiting = waiting[:count], waiting[count:]
                rows = pad_sequence([torch.tensor(ids) for ids in chosen], batch_first=True)
                logits = self.model(rows.to(self.model.device), use_cache=False).logits
                for ids, row in zip(chosen, logits, strict=True):
                    for index in owners[ids]:
                        targets = torch.tensor(requests[index].continuation, device=row.device)
                        own = row[len(ids) - len(targets) : len(ids)].float().log_softmax(-1)
                        found = own.gather(1, targets[:, None])[:, 0]
                        results[index] = found.double().cpu().numpy()
                    progress.update(len(owners[ids]))
        return results

    def replies(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """See `Subject`; those of about one length are in one batch."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        chosen = [prompts[index] for index in order]
        steps = sample_replies(
            self.model, self.tokenizer, chosen, sampling, title=translated("replies")
        )
        found = [samples[0] for _, step in steps for samples in step]
        return [found[place] for place in np.argsort(order)]
