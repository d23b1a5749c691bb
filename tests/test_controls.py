"""Controls are at chance where a task is fair, and the card says where they are not."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from minimind.evaluation.scoring import ModelSubject, Request
from minimind.evaluation.statistics import estimate
from minimind.score_card import PairsTask
from minimind.score_card.controls import (
    RememberingSubject,
    UnigramSubject,
    controls,
    count_tokens,
    random_subject,
)
from minimind.score_card.minimal_pairs import MinimalPair
from minimind.stage_directory import Ancestor


def pairs_task(texts):
    """Pairs of good and bad sentences as a task."""
    return PairsTask(
        [MinimalPair(f"p/{i}", *each, "p", None, "file") for i, each in enumerate(texts)]
    )


def scores(result, form="sum"):
    return estimate(result.measures[f"pairs/all/{form}"])


class Counting:
    """A subject that prefers the words in `good`, and counts what it is asked."""

    def __init__(self, tokenizer, good=""):
        self.tokenizer, self.max_length = tokenizer, 255
        self.good, self.asked = set(tokenizer.encode(good)), []

    def log_probabilities(self, requests, title=""):
        self.asked.append(list(requests))
        return [
            np.array([-1.0 if token in self.good else -2.0 for token in request.continuation])
            for request in requests
        ]


@pytest.fixture
def fair():
    """200 pairs whose good and bad sentences are drawn alike: 12 letters each."""
    draw = random.Random(0)
    letters = [["".join(draw.choices("abcdefgh", k=12)) for _ in range(2)] for _ in range(200)]
    return pairs_task(letters)


def run_controls(subject, task, ancestors=()):
    return controls(lambda: RememberingSubject(subject), [task], ancestors)


def test_all_controls_are_at_chance_on_fair_pairs(model, bytewise, fair):
    found = run_controls(ModelSubject(model, bytewise), fair)
    assert len(found.measures) == 4
    for name, measure in found.measures.items():
        assert 0.4 < estimate(measure)["score"] < 0.6, name  # 2.8 standard errors
    assert found.section["remarks"] == []


def test_the_length_control_ties_on_all_pairs_of_equal_length(bytewise, fair):
    """Ties count half: counted as right, they would make 100 % of a subject that knows nothing."""
    subject = UnigramSubject(bytewise, 255, np.zeros(len(bytewise)))
    result = fair.run(subject)
    assert scores(result)["score"] == scores(result, "mean")["score"] == 0.5


def test_word_order_is_nothing_to_a_unigram_model(bytewise):
    """Each pair is of the same tokens, whose sums in another order must tie."""
    draw = random.Random(1)
    texts = []
    for _ in range(100):
        letters = draw.choices("abcdefghijklmnop", k=40)
        texts.append(["".join(letters), "".join(sorted(letters))])
    counts = np.array([draw.randrange(10**6) for _ in range(len(bytewise))])
    result = pairs_task(texts).run(UnigramSubject(bytewise, 255, counts))
    assert set(result.measures["pairs/all/sum"].values.values()) == {0.5}


def test_what_lengths_and_frequencies_give_away_is_said(model, bytewise, write_jsonl):
    """The good sentences are shorter, and of letters that the training text has."""
    task = pairs_task([["ab" * n, "xy" * n + "z"] for n in range(1, 30)])
    file = write_jsonl("train.jsonl", [{"text": "ab" * 50}])
    ancestors = [Ancestor("runs/pretrain", "pretrain", [file])]
    found = run_controls(ModelSubject(model, bytewise), task, ancestors)
    measures = {name.split("/")[1]: estimate(each) for name, each in found.measures.items()}
    assert measures["length"]["score"] == measures["unigram"]["score"] == 1.0
    said = "\n".join(found.section["remarks"])
    assert "for which all tokens are equally probable scores 100.0%, better than chance" in said
    assert "a model of the frequencies of tokens scores 100.0%, better than chance (50.0%)" in said
    assert found.section["unigrams_of"] == [file]
    # By the mean, lengths alone say nothing
    assert found.section["length"]["pairs"]["all"]["mean"] == 0.5


def test_shuffled_labels_are_at_chance_for_a_model_that_is_always_right(bytewise):
    subject = Counting(bytewise, good="a")
    task = pairs_task([["a" * n, "b" * n] for n in range(1, 201)])
    assert scores(task.run(subject))["score"] == 1.0
    shuffled = task.shuffled(np.random.default_rng(0)).run(subject)
    assert 0.4 < scores(shuffled)["score"] < 0.6
    values = shuffled.measures["pairs/all/sum"].values
    assert set(values.values()) == {0.0, 1.0}
    assert values.keys() == {pair.key for pair in task.pairs}


def test_shuffled_labels_need_no_second_forward(bytewise, fair):
    subject = Counting(bytewise)
    remembering = RememberingSubject(subject)
    fair.run(remembering)
    fair.shuffled(np.random.default_rng(0)).run(remembering)
    assert [len(set(each)) for each in subject.asked] == [400]
    assert remembering.max_length == subject.max_length


def test_a_remembered_score_is_that_of_its_own_request(bytewise):
    remembering = RememberingSubject(Counting(bytewise, good="a"))
    a, b = (Request((2,), tuple(bytewise.encode(text))) for text in ("a", "bb"))
    remembering.log_probabilities([a])
    assert [each.tolist() for each in remembering.log_probabilities([b, a, b])] == [
        [-2.0, -2.0],
        [-1.0],
        [-2.0, -2.0],
    ]


def test_a_unigram_is_a_share_of_the_counted_tokens_with_one_added(bytewise):
    counts = np.zeros(len(bytewise))
    a, b, c = bytewise.encode("abc")
    counts[[a, b]] = 7, 2
    subject = UnigramSubject(bytewise, 255, counts)
    (found,) = subject.log_probabilities([Request((2,), (a, b, c))])
    total = 9 + len(bytewise)
    assert np.exp(found) == pytest.approx([8 / total, 3 / total, 1 / total])
    assert math.isclose(np.exp(subject.log_shares).sum(), 1, rel_tol=1e-6)


def test_tokens_are_counted_as_the_library_encodes_them(tokenizer):
    texts = [f"the quick brown fox {number} 敏捷的棕色狐狸" for number in range(600)]
    expected = Counter(token for text in texts for token in tokenizer.encode(text))
    expected[tokenizer.eos_token_id] += len(texts)
    counts = count_tokens(tokenizer, iter(texts), len(tokenizer))
    assert {token: count for token, count in enumerate(counts) if count} == expected


def test_without_training_files_the_texts_of_the_tasks_are_counted(model, bytewise):
    task = pairs_task([["aaaa", "bbba"]])
    found = run_controls(ModelSubject(model, bytewise), task)
    assert found.section["unigrams_of"] == "the tasks' own texts"
    assert scores_of(found, "unigram") == 1.0


def scores_of(result, control):
    return estimate(result.measures[f"controls/{control}/pairs/all/sum"])["score"]


def test_random_weights_depend_on_the_seed_and_nothing_else(model, bytewise):
    subject = ModelSubject(model, bytewise)
    before = torch.get_rng_state()
    first, second, other = (random_subject(subject, seed).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [each.state_dict()["model.embed_tokens.weight"] for each in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.config.to_dict() == model.config.to_dict()
