"""Whether two models differ: paired tests, their intervals, and what the command says of it."""

import itertools
import json
import math

import numpy as np
import pytest
from judged import PROMPTS, write_talker
from pipeline import MODEL, failure, minimal_pair_rows, run_cli

from minimind import MiniMindConfig
from minimind.evaluation.statistics import (
    Measure,
    binomial_test,
    difference,
    estimate,
    holm,
    paired_interval,
    sign_flip_test,
)
from minimind.score_card import Card, TaskResult, differences


def measure(values, **options):
    return Measure({str(index): value for index, value in enumerate(values)}, **options)


def test_an_estimate_outside_of_shares_is_a_bootstrap_and_chance_has_a_good_side():
    found = estimate(measure([3.0, 5.0] * 50))
    assert found["score"] == 4
    assert found["interval"] == pytest.approx([4 - 1.96 / 10, 4 + 1.96 / 10], abs=0.05)
    few = estimate(measure([0.0] * 9 + [1.0], chance=0.5))
    assert few["above_chance"] is False
    lower = estimate(measure([0.0] * 9 + [1.0], chance=0.5, higher_is_better=False))
    assert lower["above_chance"] is True


# Tests and intervals


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (1, 6), (8, 10), (5, 10), (30, 90)])
def test_right_and_wrong_items_have_mcnemars_exact_p(wins, count):
    tail = sum(math.comb(count, k) for k in range(min(wins, count - wins) + 1))
    exact = min(1.0, 2 * tail / 2**count)
    assert binomial_test(wins, count) == pytest.approx(exact, rel=1e-9)
    signs = np.array([1.0] * wins + [-1.0] * (count - wins) + [0.0] * 7)
    assert sign_flip_test(signs) == pytest.approx(exact, rel=1e-9)


def test_many_items_overflow_nothing():
    assert 0 < binomial_test(49_000, 100_000) < 1e-9
    assert binomial_test(50_000, 100_000) == 1


def test_differences_of_several_sizes_are_tested_by_their_signs():
    """The oracle: all 2 ** 10 signs."""
    values = np.array([0.3, 1.2, -0.4, 0.9, 0.1, -0.2, 1.5, 0.7, 0.6, -0.1])
    sums = [abs((values * signs).sum()) for signs in itertools.product((-1, 1), repeat=10)]
    exact = np.mean([each >= abs(values.sum()) - 1e-9 for each in sums])
    assert sign_flip_test(values) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(values) == sign_flip_test(values)
    assert sign_flip_test(np.zeros(4)) == 1


def test_the_interval_of_a_difference_holds_the_true_one_in_95_of_100_comparisons():
    count, gain, loss = 40, 0.3, 0.1
    held = 0.0
    for gained in range(count + 1):
        for lost in range(count + 1 - gained):
            low, high = paired_interval(gained, lost, count)
            same = count - gained - lost
            ways = math.comb(count, gained) * math.comb(count - gained, lost)
            chance = ways * gain**gained * loss**lost * (1 - gain - loss) ** same
            held += chance * (low <= gain - loss <= high)
    assert held == pytest.approx(0.95, abs=0.015)


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


# A difference


def test_items_are_paired_so_that_a_small_gain_on_the_same_items_is_seen():
    """Each score alone would lie within the other's interval."""
    a, b = [1] * 50 + [0] * 50, [1] * 58 + [0] * 42
    found = difference(measure(a), measure(b))
    assert (found["n"], found["score_a"], found["score_b"]) == (100, 0.5, 0.58)
    assert found["p"] == pytest.approx(2 / 2**8)
    assert found["better"] == "b"
    assert estimate(measure(a))["interval"][1] > 0.58
    # The same scores by other items say nothing
    other = difference(measure(a), measure(b[::-1]))
    assert other["difference"] == found["difference"]
    assert other["better"] is None


def test_the_other_order_has_the_other_sign_and_lower_may_be_better():
    a, b = measure([0.0] * 20), measure([1.0] * 12 + [0.0] * 8)
    one, back = difference(a, b), difference(b, a)
    assert back["difference"] == -one["difference"] == -0.6
    assert back["interval"] == pytest.approx([-each for each in reversed(one["interval"])])
    assert (one["better"], back["better"]) == ("b", "a")
    a, b = (each._replace(higher_is_better=False) for each in (a, b))
    assert difference(a, b)["better"] == "a"


def test_only_items_of_both_count_and_only_where_they_weigh_the_same():
    a, b = Measure({"x": 1, "y": 0, "z": 0}), Measure({"z": 1, "x": 1, "w": 0})
    found = difference(a, b)
    assert (found["n"], found["score_a"], found["score_b"]) == (2, 0.5, 1)
    assert difference(a, Measure({"w": 1})) is None
    assert difference(a, b._replace(weights={"z": 2, "x": 1, "w": 1})) is None


def test_a_weighted_difference_is_that_of_the_weighted_means():
    generator = np.random.default_rng(1)
    first, weights = generator.random(30), generator.integers(1, 9, 30).astype(float)
    second = first - 0.1 + 0.02 * generator.random(30)
    sizes = measure(weights).values
    a, b = (measure(each, weights=sizes, higher_is_better=False) for each in (first, second))
    found = difference(a, b)
    mean = np.average(second, weights=weights) - np.average(first, weights=weights)
    assert found["difference"] == pytest.approx(mean)
    assert found["interval"][0] < mean < found["interval"][1] < 0
    assert (found["p"], found["better"]) == (1 / 10_001, "b")


# Of cards


def card(name, values):
    """A card whose first measure is that of all items, and the others those of ten each."""
    groups = {"all": values} | {str(i): values[i : i + 10] for i in range(0, len(values), 10)}
    measures = {f"t/{group}": measure(each) for group, each in groups.items()}
    return Card(name, {"t": TaskResult(measures, {})})


def test_the_first_measure_stands_for_a_task_and_the_others_are_corrected_for_their_number():
    a, b = card("a", [0] * 100), card("b", [1] * 6 + [0] * 94)
    found = {each["measure"]: each for each in differences([a, b])}
    assert found["t/all"]["verdict"] == "B is better"
    assert "p_adjusted" not in found["t/all"]
    group = found["t/0"]  # the same six items, but one of ten groups
    assert group["p"] == found["t/all"]["p"] < 0.05 < group["p_adjusted"]
    assert group["verdict"] == "not distinguishable"
    for each in (a, b):
        each.results["controls"] = each.results["t"]
    assert len(differences([a, b])) == len(found)
    alone = differences([a, card("c", [1] * 10 + [0] * 90)])
    assert [each["measure"] for each in alone if each["better"]] == ["t/all", "t/0"]


def test_among_many_groups_of_equal_models_none_is_better():
    generator = np.random.default_rng(0)
    a, b = (card(name, generator.integers(2, size=4000).tolist()) for name in "ab")
    found = differences([a, b])
    assert len(found) == 401
    assert min(each["p"] for each in found[1:]) < 0.05  # by chance
    assert not [each for each in found if each["better"]]


# The command


@pytest.fixture(scope="module")
def talkers(tmp_path_factory, tokenizer):

    root, config = (
        tmp_path_factory.mktemp("talkers"),
        MiniMindConfig(vocab_size=len(tokenizer), **MODEL),
    )
    return [write_talker(root / str(seed), config, tokenizer, seed) for seed in range(3)]


@pytest.fixture
def evaluate(capsys):
    def run(*words):
        run_cli("evaluate", *words, "--json")
        return json.loads(capsys.readouterr().out)

    return run


def test_each_later_model_is_compared_with_the_first(talkers, evaluate, write_jsonl, tmp_path):
    pairs = write_jsonl("pairs.jsonl", minimal_pair_rows())
    words = (talkers[0], talkers[0], talkers[1], "--pairs", pairs, "--output", tmp_path / "out")
    found = evaluate(*words)
    assert len(found["models"]) == 3
    assert {(each["a"], each["b"]) for each in found["differences"]} == {
        (str(talkers[0]), str(talkers[0])),
        (str(talkers[0]), str(talkers[1])),
    }
    same, other = found["differences"][0], found["differences"][len(found["differences"]) // 2]
    assert (same["measure"], same["n"]) == (other["measure"], 8) == ("pairs/all/sum", 8)
    assert (same["difference"], same["p"]) == (0, 1)
    scores = [model["pairs"]["all"]["sum"] for model in found["models"][1:]]
    assert [other["score_a"], other["score_b"]] == scores
    table = (tmp_path / "out" / "card.md").read_text()
    assert table.count("| pairs/all/sum |") == 3 + 2
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == found


def test_the_win_rates_of_a_card_are_those_of_compare(talkers, evaluate, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    judge = ("--by_length", "longer", "--max_new_tokens", 12)
    found = evaluate(*talkers, "--prompts", prompts, *judge, "--output", tmp_path / "out")
    assert "differences" not in found  # nothing was measured of each model alone
    for talker, win in zip(talkers[1:], found["win_rates"], strict=True):
        run_cli("compare", talkers[0], talker, prompts, *judge, "--json")
        assert json.loads(capsys.readouterr().out) == win
    assert "B wins" in (tmp_path / "out" / "card.md").read_text()


def test_what_compares_nothing_is_refused(talkers, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hi\n")

    def refused(*words):
        return failure(capsys, run_cli, "evaluate", *words)

    assert "and there is one" in refused(talkers[0], "--prompts", prompts, "--rule_regex", "a")
    assert "found none" in refused(*talkers[:2], "--prompts", prompts)
    assert "--rule_regex judges" in refused(*talkers[:2], "--rule_regex", "a")
    missing = tmp_path / "missing.txt"
    judge = ("--rule_regex", "a")
    assert "missing.txt" in refused(*talkers[:2], "--prompts", missing, *judge)
