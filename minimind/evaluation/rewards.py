"""Rewards: replies scored by a reward model, and how well its scores tell the chosen reply of a
pair from the rejected one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.conversations import Conversation
from minimind.data.messages import Message
from minimind.evaluation.losses import held_out_metrics
from minimind.evaluation.statistics import wilson_interval
from minimind.generation import best_device, check_finite
from minimind.stage_directory import check_vocabulary, load_model, require_stage
from minimind.tokenizer import load_tokenizer

BATCH_TOKENS = 2**14  # of one batch, padding included
# Pairs by the length of their replies: how much longer the chosen one is, as a share of the longer
MUCH = 1 / 3
BY_LENGTH = {
    "chosen_much_shorter": lambda share: share < -MUCH,
    "chosen_shorter": lambda share: (share >= -MUCH) & (share < 0),
    "same_length": lambda share: share == 0,
    "chosen_longer": lambda share: (share > 0) & (share <= MUCH),
    "chosen_much_longer": lambda share: share > MUCH,
}


class RewardModel:
    """A reward model, its tokenizer and chat template. It reads texts, so that the model that wrote
    them may have another tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder = ChatEncoder(tokenizer)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device | None = None) -> "RewardModel":
        """The reward model of a stage directory, adapters included, on a device or the best one.

        Raises:
            UserError: there is none, its files do not belong together, or it has no chat template.
        """
        path = require_stage(directory)
        model, tokenizer = load_model(path, scores=True), load_tokenizer(path)
        check_vocabulary(model, tokenizer, path)
        check_finite(model, path)
        if model.config.num_labels != 1:
            raise UserError(
                f"{path}: the model has {model.config.num_labels} outputs, expected one: the"
                " reward."
            )
        if not tokenizer.chat_template:
            raise UserError(
                f"{path}: its tokenizer has no chat template, so it cannot read conversations."
                " Give a reward model of train_reward.py."
            )
        return cls(model.to(device or best_device()), tokenizer)

    def encode(
        self, conversations: Sequence[Conversation | Sequence[Message]]
    ) -> list[list[int] | BadRowError]:
        """The ids of conversations that end with a reply, or why one cannot be scored."""
        conversations = [
            each if isinstance(each, Conversation) else Conversation(list(each))
            for each in conversations
        ]
        last = [each.messages[-1]["role"] if each.messages else "nothing" for each in conversations]
        replies = [index for index, role in enumerate(last) if role == "assistant"]
        results: list[list[int] | BadRowError] = [
            BadRowError(f"found {role} at the end, expected a reply of the assistant")
            for role in last
        ]
        positions = self.model.config.max_position_embeddings
        encoded = self.encoder.encode([conversations[index] for index in replies])
        for index, chat in zip(replies, encoded, strict=True):
            if not isinstance(chat, BadRowError) and len(chat.ids) > positions:
                chat = BadRowError(
                    f"found {len(chat.ids):,} tokens, expected at most {positions:,}: the reward"
                    " model's positions"
                )
            results[index] = chat if isinstance(chat, BadRowError) else list(chat.ids)
        return results

    def score(self, conversations: Sequence[Conversation | Sequence[Message]]) -> list[float]:
        """The reward of the last reply of each conversation, in their order.

        Raises:
            UserError: a conversation does not end with a reply, is too long, or the template cannot
                express it.
        """
        encoded = self.encode(conversations)
        for number, ids in enumerate(encoded, 1):
            if isinstance(ids, BadRowError):
                raise UserError(f"conversation {number}: {ids}.")
        return self.score_ids(encoded)

    @torch.inference_mode()
    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """The reward of each sequence of token ids, computed in batches of about one length."""
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        rewards = [0.0] * len(sequences)
        title = translated("scoring")
        quiet = len(sequences) <= 64 or None
        with tqdm(total=len(order), unit=" replies", desc=title, disable=quiet) as progress:
            while order:
                count = max(1, BATCH_TOKENS // len(sequences[order[0]]))
                chosen, order = order[:count], order[count:]
                rows = [torch.tensor(sequences[index]) for index in chosen]
                # Without a mask, which is slow: no token sees the padding after it
                ids = pad_sequence(rows, True, self.model.config.pad_token_id)
                outputs = self.model(ids.to(self.model.device), use_cache=False)
                for index, reward in zip(chosen, outputs.logits[:, 0].tolist(), strict=True):
                    rewards[index] = reward
                progress.update(len(chosen))
        return rewards


# How good the scores of pairs are


def pair_metrics(rewards: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How well rewards (pairs, 2) of chosen and rejected replies with `lengths` (pairs, 2) in
    tokens tell the two apart. What cannot be computed is left out.

    loss: mean of -log sigmoid(margin), the margin being the chosen reply's reward less the other's.
    accuracy: the share of pairs with a margin above 0 (0 counts half), with its 95 % interval
        accuracy_low, accuracy_high (Wilson, 1927).
    accuracy/margin_quarter_1 ... 4: the same in the quarter of the pairs whose rewards differ
        least, ..., most.
    accuracy/chosen_much_shorter ... chosen_much_longer, and the number of these pairs/...: by how
        much longer the chosen reply is, "much" being a third of the longer one.
    longer_preferred, longer_chosen: the share of the pairs with two lengths in which the longer
        reply has the higher reward, in which it is the chosen one.
    length_correlation: of reward and length over all replies (Pearson).
    """
    rewards, lengths = np.asarray(rewards, dtype=np.float64), np.asarray(lengths)
    margins = rewards[:, 0] - rewards[:, 1]
    correct = (np.sign(margins) + 1) / 2
    low, high = wilson_interval(correct.mean(), len(correct))
    metrics = {
        "loss": np.logaddexp(0, -margins).mean(),
        "accuracy": correct.mean(),
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": len(margins),
        "margin": margins.mean(),
        "min_reward": rewards.min(),
        "mean_reward": rewards.mean(),
        "max_reward": rewards.max(),
    }
    for number, quarter in enumerate(np.array_split(np.argsort(np.abs(margins)), 4), 1):
        if len(quarter):
            metrics[f"accuracy/margin_quarter_{number}"] = correct[quarter].mean()

    # Lengths
    differences = lengths[:, 0] - lengths[:, 1]
    shares = differences / lengths.max(axis=1)
    for name, condition in BY_LENGTH.items():
        if (count := condition(shares).sum()) > 0:
            metrics[f"accuracy/{name}"] = correct[condition(shares)].mean()
            metrics[f"pairs/{name}"] = count
    if (unequal := differences != 0).any():
        longer = differences[unequal] > 0
        metrics["longer_chosen"] = longer.mean()
        preferred = np.where(longer, correct[unequal], 1 - correct[unequal])
        metrics["longer_preferred"] = preferred.mean()
    if lengths.std() and rewards.std():
        metrics["length_correlation"] = np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1]
    return {name: float(value) for name, value in metrics.items()}


def read_rewards(metrics: dict[str, float]) -> list[str]:
    """What `pair_metrics` say, in sentences."""
    accuracy, low, high = (metrics[f"accuracy{end}"] for end in ("", "_low", "_high"))
    found = [
        f"{accuracy:.1%} of {metrics['pairs']:,.0f} pairs are ranked as chosen (95 % interval"
        f" {low:.1%} to {high:.1%})"
    ]
    if low <= 0.5 <= high:
        found.append(
            "this is not distinguishable from chance: train on more pairs or for longer, or hold"
            " more out"
        )
    elif high < 0.5:
        found.append("this is worse than chance: chosen and rejected may be the wrong way round")
    quarters = [metrics.get(f"accuracy/margin_quarter_{number}") for number in range(1, 5)]
    if None not in quarters:
        shown = " / ".join(f"{value:.1%}" for value in quarters)
        found.append(f"by margin, from the smallest quarter to the largest: {shown}")

    # Lengths
    sides = {}
    for side in ("shorter", "longer"):
        names = [f"chosen_{side}", f"chosen_much_{side}"]
        counts = [metrics.get(f"pairs/{name}", 0) for name in names]
        if pairs := sum(counts):
            right = sum(
                count * metrics.get(f"accuracy/{name}", 0)
                for name, count in zip(names, counts, strict=True)
            )
            sides[side] = right / pairs, pairs
            found.append(
                f"where the chosen reply is the {side} one: {right / pairs:.1%} of {pairs:,.0f}"
            )
    if "longer_preferred" in metrics:
        found.append(
            f"the longer reply has the higher reward in {metrics['longer_preferred']:.1%} of the"
            f" pairs, and is the chosen one in {metrics['longer_chosen']:.1%}"
        )
    if "length_correlation" in metrics:
        found.append(f"correlation of reward and length: {metrics['length_correlation']:+.2f}")
    if len(sides) == 2:
        intervals = {side: wilson_interval(*values) for side, values in sides.items()}
        for side, other in (("longer", "shorter"), ("shorter", "longer")):
            if intervals[side][0] > intervals[other][1]:
                found.append(
                    f"length bias: {side} replies are favoured. Add pairs whose chosen reply is the"
                    f" {other} one"
                )
    return found


def reward_metrics(trainer: Trainer) -> dict[str, dict[str, float]]:
    """`held_out_metrics` of a reward model, and what they say on the terminal."""
    metrics = held_out_metrics(trainer)
    if metrics["after"] and is_main_process():
        say("held-out pairs")
        for sentence in read_rewards(metrics["after"]):
            say(f"  {sentence}")
    return metrics
