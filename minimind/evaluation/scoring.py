"""Log-probabilities of continuations: what minimal pairs, choices and bits per byte are made of."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import UserError
from minimind.common.language import translated
from minimind.evaluation.replies import Sampling, sample_replies
from minimind.generation import Reply
from minimind.stage_directory import virtual_tokens

# Tokens up to which inputs share a row, by the share of its tokens that one has in common with the
# one before: in long rows the mask costs more than a little sharing saves
ROWS = {1 / 2: 1024, 1 / 4: 128}
# Tokens of one batch, padding included, and its logits
LIMITS = {"cpu": (2**11, 2**25), "other": (2**15, 2**28)}
# Architectures in which a token sees what the mask shows it and nothing else
TREES = ("minimind", "llama", "qwen2", "qwen3", "qwen3_moe")


class Request(NamedTuple):
    """Token ids: `continuation` is predicted after `context`, which has one id at least."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Subject(Protocol):
    """What is scored: a model, or a control that takes a model's place."""

    tokenizer: PreTrainedTokenizerFast
    max_length: int  # of an input: context and continuation without its last token

    def log_probabilities(
        self, requests: Sequence[Request], title: str = "scoring"
    ) -> list[np.ndarray]:
        """In nats, of each token of each continuation: float64 arrays of (tokens,)."""
        ...

    def replies(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """What follows each prompt of token ids; the first sample."""
        ...


class InputRow:
    """Inputs that are computed together, since they begin alike: a tree of tokens.

        who is he / who is she       ids         who is he she
                                     positions     0  1  2   2
                                     she sees    who is    she

    `places` has for each input the places of its tokens in the row.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.places: list[np.ndarray] = []
        self.is_tree = False  # else each input is the beginning of the next

    def add(self, ids: tuple[int, ...], common: int) -> None:
        """Add an input that has its first `common` tokens in common with the one before."""
        start = len(self.ids)
        shared = self.places[-1][:common] if common else np.arange(0)
        self.is_tree |= common < start
        self.ids += ids[common:]
        self.positions += range(common, len(ids))
        self.places.append(np.r_[shared, start : len(self.ids)])


class ModelSubject:
    """A causal language model and its tokenizer as a `Subject`, in the precision of its weights."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model.eval(), tokenizer
        config = model.config
        self.max_length = config.max_position_embeddings - virtual_tokens(model)
        self.with_trees = (
            config.model_type in TREES
            and config._attn_implementation == "sdpa"
            and getattr(config, "sliding_window", None) is None
            and not virtual_tokens(model)
        )

    @torch.inference_mode()
    def log_probabilities(
        self, requests: Sequence[Request], title: str = "scoring"
    ) -> list[np.ndarray]:
        """See `Subject`. The same input is computed once, and so is a beginning that inputs share.
        Only the tokens that predict one of a continuation go through the head.

        Raises:
            UserError: a request is longer than the model's positions.
        """
        owners: dict[tuple[int, ...], list[int]] = {}  # of each input, its requests
        for index, request in enumerate(requests):
            ids = (*request.context, *request.continuation)[:-1]
            if len(ids) > self.max_length:
                raise UserError(
                    f"found {len(ids) + 1:,} tokens, expected at most {self.max_length + 1:,}, the"
                    f" model's positions: {self.tokenizer.decode(ids[:20])!r} ... Leave this text"
                    " out, or make it shorter."
                )
            owners.setdefault(ids, []).append(index)
        inputs = sorted(owners)
        rows = shared_rows(inputs, self.with_trees)
        members = iter(inputs)
        own = {id(row): [owners[next(members)] for _ in row.places] for row in rows}
        rows.sort(key=lambda row: -len(row.ids))  # little padding

        results: list[np.ndarray] = [np.empty(0)] * len(requests)
        with tqdm(total=len(requests), desc=translated(title), disable=None) as progress:
            for batch in self._batches(rows):
                # The places of the predictions, and what is predicted there
                width, places, targets, indices = len(batch[0].ids), [], [], []
                for number, row in enumerate(batch):
                    for path, each in zip(row.places, own[id(row)], strict=True):
                        for index in each:
                            continuation = requests[index].continuation
                            places.append(number * width + path[len(path) - len(continuation) :])
                            targets.append(continuation)
                            indices.append(index)
                needed, which = np.unique(np.concatenate(places), return_inverse=True)
                logits = self._logits(batch, needed)
                which = torch.from_numpy(which).to(logits.device)
                target = torch.tensor(np.concatenate(targets), device=logits.device)
                found = logits[which, target] - logits.logsumexp(-1)[which]
                found = found.double().cpu().numpy()
                ends = np.cumsum([len(each) for each in targets])[:-1]
                for index, values in zip(indices, np.split(found, ends), strict=True):
                    results[index] = values
                progress.update(len(indices))
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

    def _batches(self, rows: Sequence[InputRow]) -> Iterator[list[InputRow]]:
        """Rows of about one length, the longest first; trees apart from the others."""
        tokens, logits = LIMITS["cpu" if self.model.device.type == "cpu" else "other"]
        limit = min(tokens, logits // self.model.config.vocab_size)
        for is_tree in (False, True):
            waiting = [row for row in rows if row.is_tree == is_tree]
            while waiting:
                count = max(1, limit // len(waiting[0].ids))
                chosen, waiting = waiting[:count], waiting[count:]
                yield chosen

    def _logits(self, batch: Sequence[InputRow], needed: np.ndarray) -> torch.Tensor:
        """The logits (needed, V) at some places of a batch's (R * L) tokens, in fp32."""
        width, device = len(batch[0].ids), self.model.device
        ids = np.zeros((len(batch), width), dtype=np.int64)
        keep = np.zeros(ids.size, dtype=bool)
        keep[needed] = True
        for number, row in enumerate(batch):
            ids[number, : len(row.ids)] = row.ids
        keep = np.pad(keep.reshape(ids.shape), ((0, 0), (virtual_tokens(self.model, True), 0)))
        options = {}
        if batch[0].is_tree:
            positions = np.zeros_like(ids)
            for number, row in enumerate(batch):
                positions[number, : len(row.ids)] = row.positions
            options = {
                "position_ids": torch.from_numpy(positions).to(device),
                "attention_mask": torch.from_numpy(visible(batch, width)).to(device),
            }
        # Without a mask, which is slow: no token sees the padding after it
        return self.model(
            torch.from_numpy(ids).to(device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(keep).to(device),
            **options,
        ).logits.float()


def shared_rows(inputs: Sequence[tuple[int, ...]], with_trees: bool) -> list[InputRow]:
    """Sorted inputs -> rows with one or several of them, in their order.

    An input that is the beginning of the next one costs nothing. `with_trees`, the next may also
    branch off, see `ROWS`.
    """
    rows: list[InputRow] = []
    last: tuple[int, ...] = ()
    for ids in inputs:
        common = next(
            (i for i, (a, b) in enumerate(zip(last, ids, strict=False)) if a != b), len(last)
        )
        row = rows[-1] if rows else InputRow()
        size = len(row.ids) + len(ids) - common
        branches = with_trees and any(
            common >= share * len(ids) and size <= most for share, most in ROWS.items()
        )
        if not rows or not (branches or common == len(last) == len(row.ids)):
            rows.append(row := InputRow())
            common = 0
        row.add(ids, common)
        last = ids
    return rows


def visible(batch: Sequence[InputRow], width: int) -> np.ndarray:
    """The attention mask (R, 1, L, L) of trees, True where a token sees another; padding sees
    itself, since a softmax over nothing is no number."""
    mask = np.repeat(np.eye(width, dtype=bool)[None], len(batch), axis=0)
    for number, row in enumerate(batch):
        for path in row.places:
            mask[number][np.ix_(path, path)] |= np.tri(len(path), dtype=bool)
    return mask[:, None]
