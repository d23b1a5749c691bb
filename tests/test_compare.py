"""`minimind compare`: a win rate with its interval, and what it does not show."""

import json
import math
from html.parser import HTMLParser

import pytest
from judged import PROMPTS, RULES, write_talker
from pipeline import chat_rows, failure, pair_rows, run_cli, user

from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.conversations import Conversation
from minimind.evaluation import (
    Sampling,
    compare_replies,
    comparison_page,
    comparison_report,
    describe_replies,
    evaluate,
    sample_replies,
    win_rate,
)
from minimind.evaluation.comparison import sentence
from minimind.evaluation.judges import Judge, PairwiseJudge, make_judge
from minimind.generation import Reply, complete, load_for_generation

PROMPT = Conversation([user("hi")])
LONGER = Judge(lambda messages, reply: float(len(reply)))


def replies(*texts):
    """One reply to each prompt."""
    return [[Reply(text, list(text.encode()), True)] for text in texts]


def compared(a, b, judge=LONGER):
    result = compare_replies([PROMPT] * len(a), a, b, judge)
    return win_rate(result, judge)


def test_the_win_rate_counts_ties_half_and_the_other_order_gives_its_complement():
    a, b = replies("aa", "aa", "aa", "aa"), replies("b", "bb", "bbb", "bbbb")
    win = compared(a, b)
    assert (win["rate"], win["win"], win["tie"], win["loss"]) == (5 / 8, 2, 1, 1)
    back = compared(b, a)
    assert back["rate"] == 3 / 8
    assert back["interval"] == pytest.approx([1 - limit for limit in reversed(win["interval"])])


def test_b_is_better_only_where_the_interval_says_so():
    wins, losses = replies(*["bb"] * 40), replies(*["b"] * 40)
    a = replies(*["aa"] * 20 + ["a"] * 20)
    assert compared(losses, wins)["better"] == "b"
    assert compared(wins, losses)["better"] == "a"
    assert compared(a, wins)["better"] == "b"  # 20 ties and 20 wins
    few = compared(replies("a", "a", "aa"), replies("bb", "bb", "b"))
    assert few["better"] is None
    assert "not distinguishable" in sentence(few)


def test_several_samples_of_a_prompt_narrow_no_interval():
    one = compared(replies("a", "aaa"), replies("bb", "bb"))
    three = compared(
        [each * 3 for each in replies("a", "aaa")], [each * 3 for each in replies("bb", "bb")]
    )
    assert three["interval"] == one["interval"]
    assert three["win"] == 3 * one["win"] == 3


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_interval_holds_the_true_rate_in_95_of_100_comparisons(share):
    n = 60
    held = 0.0
    for wins in range(n + 1):
        low, high = win_rate_of(wins, n)["interval"]
        chance = math.comb(n, wins) * share**wins * (1 - share) ** (n - wins)
        held += chance * (low <= share <= high)
    assert held == pytest.approx(0.95, abs=0.02)


def win_rate_of(wins, n):
    return compared(replies(*["a"] * n), replies(*["bb"] * wins + [""] * (n - wins)))


def test_a_rule_that_prefers_what_it_sees_first_decides_nothing():
    first = PairwiseJudge(lambda messages, first, second: 1.0)
    win = compared(replies("a", "a"), replies("bb", "b"), first)
    assert (win["rate"], win["tie"], win["order_agreement"]) == (0.5, 2, 0)
    fair = PairwiseJudge(lambda messages, first, second: len(first) - len(second))
    win = compared(replies("a", "aa"), replies("bb", "b"), fair)
    assert (win["win"], win["loss"], win["order_agreement"]) == (1, 1, 1)


def test_each_judge_gives_the_better_reply_the_higher_score(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    prompt, texts = Conversation([user("hi")]), ["what?", "thanks"]

    def scores(**option):
        return make_judge(**option).scores([prompt], [texts])[0]

    assert scores(rule=f"{tmp_path}/rules.py:long") == [5, 6]
    assert scores(rule=f"{tmp_path}/rules.py:asks") == [1, 0]
    assert prompt.messages == [user("hi")]  # the rule emptied a list of its own
    assert scores(pairwise_rule=f"{tmp_path}/rules.py:shorter") == [1, 0]
    assert scores(pairwise_rule=f"{tmp_path}/rules.py:first") == [0.5, 0.5]
    assert scores(rule_regex=r"s$") == [0, 1]
    assert scores(by_length="shorter") == [-5, -6]
    assert scores(by_length="longer") == [5, 6]


def test_a_tournament_gives_each_reply_the_share_of_the_others_that_it_beats():
    judge = PairwiseJudge(lambda messages, first, second: len(first) - len(second))
    assert judge.scores([PROMPT], [["a", "bb", "cc", "dddd"]])[0] == [0, 0.5, 0.5, 1]


def test_repetition_ends_and_lengths_are_those_counted_by_hand():
    described = describe_replies(
        [
            [Reply("xyxyxy", [1, 2, 1, 2, 1, 2], True)],  # 1212 2121 1212: one of three again
            [Reply("abc", [1, 2, 3], False)],  # no run of four
            [Reply("abcd", [1, 2, 3, 4], True)],
        ]
    )
    assert described == {
        "replies": 3,
        "tokens": round(13 / 3, 6),
        "characters": round(13 / 3, 6),
        "stopped": round(2 / 3, 6),
        "repetition": 0.25,
    }


def report(a, b, **options):
    usual = {"characters": 100.0, "stopped": 1.0, "repetition": 0.1, "perplexity": 10.0}
    result = compare_replies([PROMPT], replies("a"), replies("bb"), LONGER)
    return comparison_report(usual | a, usual | b, result, LONGER, **options)


def test_what_a_win_rate_hides_is_a_warning():
    assert report({}, {"perplexity": 10.4, "characters": 120.0})["warnings"] == []
    (collapse,) = report({}, {"perplexity": 10.6})["warnings"]
    assert collapse.startswith("B's perplexity is 6.0% higher")
    assert report({}, {"perplexity": 10.6}, same_tokenizer=False)["warnings"] == []
    others = {"characters": 50.0, "stopped": 0.9, "repetition": 0.2}
    warnings = report({}, others)["warnings"]
    assert [text.split(":")[0] for text in warnings] == [
        "B's replies are 50% shorter",
        "B repeats itself more",
        "B stops less often",
    ]


class Texts(HTMLParser):
    """The tags and the words of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_shows_replies_side_by_side_and_runs_nothing_of_them():
    bad = "<script>alert(1)</script>"
    prompts, a, b = [Conversation([user(bad)])], replies(f"{bad} a"), replies("</div><img src=x>")
    result = compare_replies(prompts, a, b, LONGER)
    facts = {"directory": f"runs/{bad}", **describe_replies(a)}
    page = Texts(
        comparison_page(comparison_report(facts, facts, result, LONGER), prompts, a, b, result)
    )
    assert not {"script", "img"} & set(page.tags)
    assert {bad, f"{bad} a", "</div><img src=x>"} <= set(page.words)


@pytest.fixture
def talkers(tmp_path, config, tokenizer):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return [write_talker(tmp_path / str(seed), config, tokenizer, seed) for seed in range(2)]


@pytest.fixture
def compare(tmp_path, capsys):
    """Run the command; returns its report."""

    def run(a, b, *words):
        files = [a, b, tmp_path / "prompts.txt"]
        run_cli(
            "compare", *files, "--by_length", "longer", "--max_new_tokens", 12, "--json", *words
        )
        return json.loads(capsys.readouterr().out)

    return run


def test_a_model_is_not_distinguishable_from_itself(talkers, compare):
    result = compare(talkers[0], talkers[0], "--samples", 3)
    assert result["a"] == result["b"]
    assert result["win_rate"]["tie"] == 3 * len(PROMPTS)
    assert (result["win_rate"]["rate"], result["win_rate"]["better"]) == (0.5, None)
    assert result["warnings"] == []


def test_the_command_measures_both_models_and_writes_the_page(
    talkers, compare, tmp_path, write_jsonl
):
    chats = write_jsonl("chats.jsonl", chat_rows())
    html = tmp_path / "new" / "page.html"
    result = compare(*talkers, "--perplexity_files", chats, "--html", html, "--rows", 2)
    models = [load_for_generation(directory) for directory in talkers]
    for name, model in zip("ab", models, strict=True):
        expected = evaluate(*model, [chats], max_new_tokens=0)
        assert result[name]["perplexity"] == expected["perplexity"]
    win = result["win_rate"]
    assert win["win"] + win["tie"] + win["loss"] == win["prompts"] == len(PROMPTS)
    assert win["rate"] == pytest.approx((win["win"] + win["tie"] / 2) / len(PROMPTS), abs=1e-6)
    assert html.read_text().count("<section") == 2
    back = compare(*reversed(talkers))
    assert back["win_rate"]["rate"] == pytest.approx(1 - win["rate"], abs=1e-6)


def test_greedy_samples_are_the_greedy_replies(talkers):
    model, tokenizer = load_for_generation(talkers[0])
    ids = encode_prompts([[user(text)] for text in PROMPTS], ChatEncoder(tokenizer))
    sampling = Sampling(2, 12, 0.0, 1.0, 0, 4)
    sampled = [each for _, step in sample_replies(model, tokenizer, ids, sampling) for each in step]
    expected = complete(model, tokenizer, ids, 12)
    assert [[reply.text for reply in each] for each in sampled] == [[text] * 2 for text in expected]


def test_what_cannot_be_compared_is_one_message(talkers, capsys, tmp_path, write_jsonl):
    def refused(*words):
        files = [*talkers, tmp_path / "prompts.txt"]
        message = failure(capsys, run_cli, "compare", *files, "--max_new_tokens", 4, *words)
        assert not (tmp_path / "page.html").exists()
        return message

    html = ["--html", tmp_path / "page.html"]
    assert "found none, expected one of --reward_model" in refused(*html)
    pairs = write_jsonl("pairs.jsonl", pair_rows())
    longer = ["--by_length", "longer"]
    assert "found preference pairs" in refused(*longer, *html, "--perplexity_files", pairs)
    assert "is a directory" in refused(*longer, "--html", tmp_path)
    assert "holds a language model, which writes replies and scores none" in refused(
        "--reward_model", talkers[0], *html
    )
