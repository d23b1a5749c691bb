"""Rows of preference pairs -> batches: TRL's, and beside it the rows in which a pair has its prompt
once (Wang & Hegde, 2024, https://arxiv.org/abs/2410.20305).

    two sequences       p p p c c     p p p r r r
    one row             p p p c c r r r          several pairs follow each other in a row
    position_ids        0 1 2 3 4 3 4 5          r does not see c
"""

from dataclasses import dataclass

import numpy as np
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

ROW = 1024  # tokens up to which pairs share a row; a longer pair has a row for itself
ROW_STEP = 64  # rows are as long as a multiple of it, see `packing.SHAPE_STEP`
# What a token belongs to: PARTS * pair + one of these. A token sees the earlier ones of its part,
# and those of its pair's SHARED part.
SHARED, CHOSEN, REJECTED, PARTS = 0, 1, 2, 3
PADDING = -PARTS + CHOSEN


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """TRL's, except: of a reply in several messages only the assistant's count, not the results of
    its tools; and with `packed` a batch has the entries of `packed_pairs` too.

    `share_prompts`: a pair has its prompt once, which needs an attention mask.
    """

    packed: bool = False
    share_prompts: bool = True

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        masks = [
            [0] * len(example["prompt_ids"]) + list(example[f"{name}_mask"])
            for name in ("chosen", "rejected")
            for example in examples
        ]
        for row, mask in enumerate(masks):
            batch["completion_mask"][row, : len(mask)] = torch.as_tensor(mask)
        return batch | packed_pairs(batch, self) if self.packed else batch


def packed_pairs(batch: dict[str, torch.Tensor], collator: PreferenceCollator) -> dict:
    """The pairs of TRL's batch of (2 * pairs, S) in fewer rows (R, L) without padding between them.

    A pair's sequences share all that they have in common at their beginning.

    Returns:
        packed_ids, packed_positions, packed_parts: (R, L); the part of each token as above.
        packed_states: (N,), the place in the R * L of each token that predicts one of a reply.
        packed_targets: (N,), the place of its prediction in the 2 * pairs * (S - 1) of TRL's loss.
        packed_ends: (2 * pairs,), the place in the R * L of the last token of each sequence.
    """
    ids, lengths = batch["input_ids"].numpy(), batch["attention_mask"].sum(dim=1).tolist()
    pairs, width = len(ids) // 2, ids.shape[1]

    # How long each pair is, and its place
    common = [0] * pairs
    if collator.share_prompts:
        for pair in range(pairs):
            shorter = min(lengths[pair], lengths[pair + pairs])
            differ = np.flatnonzero(ids[pair, :shorter] != ids[pair + pairs, :shorter])
            common[pair] = int(differ[0]) if len(differ) else shorter
    sizes = [lengths[pair] + lengths[pair + pairs] - common[pair] for pair in range(pairs)]
    rows = balanced_rows(sizes, max(ROW, *sizes))
    longest = max(sum(sizes[pair] for pair in row) for row in rows)
    shape = len(rows), -(-longest // ROW_STEP) * ROW_STEP

    packed_ids = np.full(shape, collator.pad_token_id)
    positions, parts = np.zeros(shape, dtype=int), np.full(shape, PADDING)
    places = np.zeros((2 * pairs, width), dtype=int)  # of each token in the R * L
    for index, row in enumerate(rows):
        end = 0
        for pair in row:
            start, shared = end, common[pair]
            end += shared
            for sequence, part in ((pair, CHOSEN), (pair + pairs, REJECTED)):
                own = lengths[sequence] - shared
                where = np.r_[start : start + shared, end : end + own]
                end += own
                packed_ids[index, where] = ids[sequence, : len(where)]
                positions[index, where] = np.arange(len(where))
                parts[index, where[:shared]] = PARTS * pair + SHARED
                parts[index, where[shared:]] = PARTS * pair + part
                places[sequence, : len(where)] = index * shape[1] + where

    predicted = batch["completion_mask"].numpy()[:, 1:] == 1
    packed = {
        "packed_ids": packed_ids,
        "packed_positions": positions,
        "packed_parts": parts,
        "packed_states": places[:, :-1][predicted],
        "packed_targets": np.flatnonzero(predicted),
        "packed_ends": places[np.arange(2 * pairs), np.array(lengths) - 1],
    }
    return {name: torch.from_numpy(values) for name, values in packed.items()}


def balanced_rows(sizes: list[int], capacity: int) -> list[list[int]]:
    """The items of each row: as few rows as `capacity` allows, and about equally long, so that
    little padding is left.

    >>> balanced_rows([300, 500, 400, 600], 1000)
    [[3, 0], [1, 2]]
    """
    count, order = -(-sum(sizes) // capacity), sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while True:
        rows, totals = [[] for _ in range(count)], [0] * count
        for item in order:
            shortest = totals.index(min(totals))
            rows[shortest].append(item)
            totals[shortest] += sizes[item]
        if max(totals) <= capacity:
            return rows
        count += 1


def visible_tokens(parts: torch.Tensor) -> torch.Tensor:
    """Parts of tokens (R, L) -> attention mask (R, 1, L, L), True where a token sees another."""
    query, key = parts[:, :, None], parts[:, None, :]
    same_pair = query.div(PARTS, rounding_mode="floor") == key.div(PARTS, rounding_mode="floor")
    return (same_pair & ((key % PARTS == SHARED) | (key == query))).tril()[:, None]


def repetitions(parts: torch.Tensor) -> torch.Tensor:
    """Parts of tokens -> in how many sequences each of them is: 2 if shared, 0 if padding."""
    return torch.where(parts % PARTS == SHARED, 2, 1) * (parts >= 0)
