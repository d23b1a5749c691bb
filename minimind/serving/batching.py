"""Continuous batching: texts join and leave one batch between two tokens.

The library's own, `ContinuousBatchingManager` of transformers 5.23, gives all requests the sampling
of the first and one random state, and knows no stop strings. On a CPU it is slower: 16 texts of a
26M model come at 118 tokens/s, its start included, and here at 424.
"""

import copy
import math
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Full

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from minimind.common.language import say

READ_AT_ONCE = 8192  # tokens of new prompts between two tokens of the texts that are being written
SMALL = 256  # tokens of a nucleus that is found without sorting the vocabulary


class Stopped(Exception):  # noqa: N818 (what happened, not what is wrong)
    """What ends the texts that are not complete when their batch is stopped."""


@dataclass(eq=False)
class Job:
    """A text to write after the tokens `ids`, at most `limit` of them.

    The thread of the batch calls `take` with each token, which returns whether more are wanted,
    and `fail` with an error that ends it. `cancel` may be called by any thread.
    """

    ids: Sequence[int]
    limit: int
    temperature: float  # 0 takes the most likely token
    top_p: float
    take: Callable[[int], bool]
    fail: Callable[[Exception], None]
    draws: random.Random = field(default_factory=random.Random)
    written: list[int] = field(default_factory=list)
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Leave the batch before the next token."""
        self.is_cancelled = True

    def accept(self, token: int) -> bool:
        """Take a token; whether the text goes on."""
        self.written.append(token)
        return self.take(token) and len(self.written) < self.limit

    @property
    def length(self) -> int:
        """The tokens that are in the cache: all but the last one written."""
        return len(self.ids) + len(self.written) - 1


def choose(logits: torch.Tensor, jobs: Sequence[Job]) -> list[int]:
    """The next token of each job, from logits (B, V)."""
    if not any(job.temperature for job in jobs):
        return logits.argmax(-1).tolist()
    # Row by row in numpy: torch would sort all rows in full, in the time of a third of a step
    rows = logits.float().cpu().numpy()
    return [sample(row, job) for row, job in zip(rows, jobs, strict=True)]


def sample(logits: np.ndarray, job: Job) -> int:
    """One token, from logits (V,), by the inverse of the cumulative distribution.

    The number in [0, 1) comes from the job's own random state: what a seed gives depends neither on
    the device nor on the other jobs.
    """
    if not job.temperature:
        return int(logits.argmax())
    shares = np.exp((logits - logits.max()) / job.temperature)
    tokens = nucleus(shares, job.top_p) if job.top_p < 1 else np.arange(len(shares))
    mass = shares[tokens].cumsum(dtype=np.float64)
    place = np.searchsorted(mass, job.draws.random() * mass[-1], side="right")
    return int(tokens[min(place, len(tokens) - 1)])


def nucleus(shares: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of tokens whose part of all shares (V,) reaches `top_p` (Holtzman et al.,
    2020), the most likely first."""
    limit, size = top_p * shares.sum(dtype=np.float64), len(shares)
    for count in (min(SMALL, size), size):  # it is seldom larger
        tokens = np.argpartition(-shares, count - 1)[:count]
        tokens = tokens[np.argsort(-shares[tokens], kind="stable")]
        mass = shares[tokens].cumsum(dtype=np.float64)
        if mass[-1] >= limit:
            break
    return tokens[: np.searchsorted(mass, limit) + 1]


class RoomyLayer(DynamicLayer):
    """The library's layer of keys and values, except: it has room for more tokens, so that one more
    is written into it and does not copy all others."""

    room: Sequence[torch.Tensor] = ()  # keys and values are views of their beginnings
    known: torch.Tensor | None = None  # the keys that are one

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each layer of the model with the keys and values (B, H, S, D) of new tokens;
        returns those of all."""
        begin = self.keys.shape[-2] if self.is_initialized else 0
        end = begin + key_states.shape[-2]
        if not begin or self.keys is not self.known or end > self.room[0].shape[-2]:
            self.make_room(key_states, value_states, end + end // 4 + 64)
        keys, values = self.room
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.keys = self.known = keys[:, :, :end]
        self.values = values[:, :, :end]
        return self.keys, self.values

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor, size: int) -> None:
        """Copy what there is to where `size` tokens have room; others may have replaced it, where
        rows joined or left."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.room = []
        for new, old in ((key_states, self.keys), (value_states, self.values)):
            self.room.append(new.new_zeros(*new.shape[:2], size, new.shape[-1]))
            if old.numel():
                self.room[-1][:, :, : old.shape[-2]] = old


def new_cache() -> Cache:
    """An empty cache."""
    return Cache(layer_class_to_replicate=RoomyLayer)


class Batch:
    """The texts that are being written, one row each: their keys and values, and which are real.

    Rows end in the same column, so shorter ones have padding on the left.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.jobs = model, []
        # What generation_config.json says about logits, such as a repetition_penalty
        settings = copy.deepcopy(model.generation_config)
        settings.do_sample = False  # each job has its own way
        self.processors = model._get_logits_processor(
            settings, input_ids_seq_length=1, device=str(model.device)
        )
        self.cache, self.mask = new_cache(), torch.zeros(0, 0, dtype=torch.long)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Logits (B, V) of the token after `ids` (B, S); `mask` (B, L) includes what is cached."""
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def admit(self, jobs: list[Job]) -> None:
        """Read the prompts of new jobs, write their first tokens, and add them as rows."""
        device, length = self.model.device, max(len(job.ids) for job in jobs)
        ids = torch.tensor([[0] * (length - len(job.ids)) + list(job.ids) for job in jobs])
        mask = torch.tensor([[0] * (length - len(j.ids)) + [1] * len(j.ids) for j in jobs])
        ids, mask, cache = ids.to(device), mask.to(device), new_cache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.forward(ids, mask, positions, cache)

        # Behind the rows that are there, padded to the same length
        if self.jobs:
            longest = max(length, self.mask.shape[1])
            before, after = longest - self.mask.shape[1], longest - length
            self.mask = torch.cat([pad(self.mask, (before, 0)), pad(mask, (after, 0))])
            for own, new in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    parts = (getattr(own, name), before), (getattr(new, name), after)
                    padded = [pad(states, (0, 0, amount, 0)) for states, amount in parts]
                    setattr(own, name, torch.cat(padded))
        else:
            self.mask, self.cache = mask, cache
        self.jobs = [*self.jobs, *jobs]
        self.give(jobs, logits)

    def step(self) -> None:
        """Write one more token of each text."""
        device = self.model.device
        ids = torch.tensor([[job.written[-1]] for job in self.jobs], device=device)
        positions = torch.tensor([[job.length] for job in self.jobs], device=device)
        self.mask = pad(self.mask, (0, 1), value=1)
        logits = self.forward(ids, self.mask, positions, self.cache)
        self.give(self.jobs, logits)

    def give(self, jobs: list[Job], logits: torch.Tensor) -> None:
        """Give each job its next token; those that want no more leave the batch."""
        if self.processors:
            rows = (torch.tensor([[*job.ids, *job.written]], device=logits.device) for job in jobs)
            logits = torch.cat(
                [self.processors(row, own[None]) for row, own in zip(rows, logits, strict=True)]
            )
        chosen = zip(jobs, choose(logits, jobs), strict=True)
        ended = {id(job) for job, token in chosen if not job.accept(token)}
        if ended:
            self.keep([id(job) not in ended for job in self.jobs])

    def keep(self, kept: list[bool]) -> None:
        """Remove the other rows, and the columns that are padding in all that stay."""
        self.jobs = [job for job, stays in zip(self.jobs, kept, strict=True) if stays]
        if not self.jobs:
            self.mask, self.cache = self.mask[:0], new_cache()
            return
        rows = torch.tensor(kept, device=self.mask.device).nonzero()[:, 0]
        first = self.mask.shape[1] - max(job.length for job in self.jobs)
        self.mask = self.mask[rows, first:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]


class Batcher(threading.Thread):
    """Writes the texts of the jobs that are submitted, at most `most` at a time, in their order."""

    def __init__(self, model: PreTrainedModel, most: int):
        super().__init__(name="batcher", daemon=True)
        self.batch, self.most = Batch(model), most
        self.waiting: deque[Job] = deque()
        self.changed, self.is_stopped = threading.Condition(), False

    def submit(self, jobs: Sequence[Job], most_waiting: float = math.inf) -> None:
        """Write the texts of jobs when there is room; raises queue.Full where more than
        `most_waiting` would wait for it."""
        with self.changed:
            # Clients that are gone leave room to others
            self.waiting = deque(job for job in self.waiting if not job.is_cancelled)
            if len(self.waiting) + len(jobs) > most_waiting:
                raise Full
            self.waiting += jobs
            self.changed.notify()

    def stop(self) -> None:
        """End the thread after the token that it is at; the jobs fail with Stopped."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify()
        if self.is_alive():
            self.join()
        for job in (*self.batch.jobs, *self.waiting):
            job.fail(Stopped())

    def run(self) -> None:
        """The thread."""
        batch = self.batch
        while not self.is_stopped:
            new = self._next(batch.jobs)
            try:
                with torch.inference_mode():
                    if any(job.is_cancelled for job in batch.jobs):
                        batch.keep([not job.is_cancelled for job in batch.jobs])
                    if new:
                        batch.admit(new)
                    if batch.jobs:
                        batch.step()
            except Exception as error:  # such as no memory: these end, others can follow
                say(f"error: {type(error).__name__}: {error}", file=sys.stderr)
                for job in {*batch.jobs, *new}:
                    job.fail(error)
                batch.jobs = []

    def _next(self, running: list[Job]) -> list[Job]:
        """The jobs to admit now; waits for one where nothing is running."""
        with self.changed:
            while not running and not self.waiting and not self.is_stopped:
                self.changed.wait()
            new: list[Job] = []
            longest = 0
            while self.waiting and len(running) + len(new) < self.most:
                longest = max(longest, len(self.waiting[0].ids))
                if new and longest * (len(new) + 1) > READ_AT_ONCE:
                    break
                job = self.waiting.popleft()
                new += [job] * (not job.is_cancelled)
            return new
