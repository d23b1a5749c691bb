"""Rewards of a reward model, and what they say about pairs."""

import math

import numpy as np
import pytest
import torch

from minimind.common.errors import UserError
from minimind.data.conversations import Conversation
from minimind.evaluation import RewardModel, pair_metrics, read_rewards, rewards, wilson_interval
from minimind.stage_directory import with_score_head


def pairs(count, right, chosen=10, rejected=10):
    """Rewards and lengths of `count` pairs, `right` of them ranked as chosen, by growing
    margins."""
    signs = np.where(np.arange(count) < right, 1.0, -1.0)
    margins = signs * np.linspace(1, 2, count)
    return (
        np.stack([margins, np.zeros(count)], axis=1),
        np.tile([chosen, rejected], (count, 1)),
    )


def joined(*parts):
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [  # R: prop.test(x, n, correct = FALSE)
        (8, 10, (0.4901625, 0.9433178)),
        (85, 100, (0.7671672, 0.9069316)),
        (0, 20, (0.0, 0.1611252)),
    ],
)
def test_the_interval_is_wilsons(right, count, interval):
    assert wilson_interval(right / count, count) == pytest.approx(interval, abs=1e-5)


def test_metrics_of_pairs_are_those_computed_by_hand():
    scores = np.array([[2.0, 1.0], [0.0, 0.5], [1.0, 1.0], [4.0, 0.0]])
    lengths = np.array([[10, 20], [10, 10], [30, 20], [6, 5]])
    found = pair_metrics(scores, lengths)
    margins = [1.0, -0.5, 0.0, 4.0]
    assert found["loss"] == pytest.approx(
        sum(math.log(1 + math.exp(-margin)) for margin in margins) / 4
    )
    assert found["accuracy"] == 2.5 / 4  # equal rewards are half right
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson_interval(2.5 / 4, 4)
    quarters = [found[f"accuracy/margin_quarter_{number}"] for number in range(1, 5)]
    assert quarters == [0.5, 0.0, 1.0, 1.0]  # margins 0, 0.5, 1, 4
    assert found["margin"] == sum(margins) / 4
    assert (found["min_reward"], found["max_reward"]) == (0.0, 4.0)
    by_length = {key: value for key, value in found.items() if "chosen_" in key or "same" in key}
    # The longer reply is longer by a half, by nothing, by exactly a third and by a sixth of itself
    assert by_length == {
        "accuracy/chosen_much_shorter": 1.0,
        "pairs/chosen_much_shorter": 1,
        "accuracy/same_length": 0.0,
        "pairs/same_length": 1,
        "accuracy/chosen_longer": 0.75,
        "pairs/chosen_longer": 2,
    }
    assert found["longer_chosen"] == pytest.approx(2 / 3)
    # 0 for the first, half for the third, 1 for the last
    assert found["longer_preferred"] == pytest.approx(0.5)
    flat, tokens = scores.ravel(), lengths.ravel()
    covariance = ((flat - flat.mean()) * (tokens - tokens.mean())).mean()
    assert found["length_correlation"] == pytest.approx(covariance / flat.std() / tokens.std())


def test_what_cannot_be_computed_is_left_out():
    found = pair_metrics(np.array([[1.0, 0.0]]), np.array([[5, 5]]))
    assert not {"length_correlation", "longer_preferred", "accuracy/margin_quarter_2"} & set(found)
    assert all(math.isfinite(value) for value in found.values())
    assert read_rewards(found)


BIASED = joined(pairs(60, 59, chosen=30), pairs(60, 15, rejected=30))
PLANTED = {
    "not distinguishable from chance": pairs(40, 22),
    "worse than chance": pairs(40, 8),
    "length bias: longer replies are favoured": BIASED,
    "length bias: shorter replies are favoured": (BIASED[0], BIASED[1][:, ::-1]),
    "where the chosen reply is the longer one: 98.3% of 60": BIASED,
    "the longer reply has the higher reward in 86.7% of the pairs": BIASED,
    "and is the chosen one in 50.0%": BIASED,
}


@pytest.mark.parametrize("words", PLANTED)
def test_the_reading_names_what_was_planted(words):
    assert words in "\n".join(read_rewards(pair_metrics(*PLANTED[words])))


def test_good_rewards_are_said_to_have_no_fault():
    fair = joined(pairs(60, 55, chosen=30), pairs(60, 56, rejected=30))
    said = "\n".join(read_rewards(pair_metrics(*fair)))
    assert "92.5% of 120 pairs are ranked as chosen" in said
    assert "chance" not in said
    assert "bias" not in said


# The reward model


CHATS = [
    [{"role": "user", "content": "who runs?"}, {"role": "assistant", "content": text}]
    for text in ("the fox", "the dog and the cat and the owl run home", "no", "the <|im_end|> fox")
]


@pytest.fixture
def reward(model, tokenizer):
    torch.manual_seed(0)
    return RewardModel(with_score_head(model), tokenizer)


def test_scores_are_those_of_each_conversation_alone_and_in_order(reward, monkeypatch):
    alone = []
    for chat in CHATS:
        with torch.no_grad():
            (ids,) = reward.encode([chat])
            alone.append(reward.model(torch.tensor([ids])).logits.item())
    assert reward.score(CHATS) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(CHATS)
    monkeypatch.setattr(rewards, "BATCH_TOKENS", 40)  # several batches
    assert reward.score([*CHATS, Conversation(CHATS[0])]) == pytest.approx(
        [*alone, alone[0]], abs=1e-5
    )
    assert reward.score([]) == []


def test_a_conversation_is_read_as_its_template_writes_it(reward, tokenizer):
    (ids,) = reward.encode(CHATS[:1])
    assert ids == tokenizer.apply_chat_template(CHATS[0], return_dict=False)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (CHATS[0][:1], "found user at the end, expected a reply of the assistant"),
        ([], "found nothing at the end"),
        (
            [CHATS[0][0], {"role": "assistant", "content": "fox " * 300}],
            "expected at most 256: the reward model's positions",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(reward, chat, words):
    with pytest.raises(UserError, match=f"conversation 2: .*{words}"):
        reward.score([CHATS[0], chat])
