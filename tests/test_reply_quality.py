"""What replies are like, against counts by hand and sacrebleu itself."""

import importlib.util
import math

import pytest
import sacrebleu
from judged import Scripted

from minimind.common.errors import UserError
from minimind.evaluation.comparison import describe_replies
from minimind.evaluation.scoring import ModelSubject
from minimind.generation import Reply
from minimind.score_card import RepliesTask, parse_decodings, read_referenced_prompts
from minimind.score_card.overlap import corpus_scores, longest_common_subsequence, rouge
from minimind.score_card.replies import GREEDY, Decoding


def longest_by_table(a, b):
    """The oracle: the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else best
    return table[-1][-1]


@pytest.mark.parametrize(
    ("a", "b"),
    [("abcbdab", "bdcaba"), ("", "a"), ("aaaa", "aa"), ("abc", "xyz"), ("ab" * 40, "ba" * 35)],
)
def test_the_longest_common_subsequence_is_the_textbooks(a, b):
    assert longest_common_subsequence(a, b) == longest_by_table(a, b)


def test_rouge_of_english_by_hand():
    # 5 words and 6; common words: the, cat, on, the = 4; bigrams "on the" and "the cat": 2 of 4, 5
    scores = rouge("the cat lay on the.", ["The cat sat on the mat"])
    assert scores["rouge_1"] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert scores["rouge_2"] == pytest.approx(2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert scores["rouge_l"] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    # A word counts as often as in the other text
    assert rouge("the the the", ["the"])["rouge_1"] == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))


def test_rouge_of_chinese_is_of_characters_and_the_best_reference_counts():
    # 我爱北京 and 我在北京: 3 of 4 characters, "北京" of 3 bigrams
    scores = rouge("我爱北京。", ["我在北京", "上海"])
    assert scores == pytest.approx({"rouge_1": 3 / 4, "rouge_2": 1 / 3, "rouge_l": 3 / 4})
    assert rouge("", ["我"]) == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}


def test_bleu_and_chrf_are_sacrebleus_with_the_tokens_of_the_references_language():
    english = ["the cat sat on the mat, again", "a dog runs home"]
    chinese = ["我今天去北京看朋友", "他们在公园里跑步"]
    texts = [
        "the cat sat on the mat again",
        "the dog runs home",
        "我今天去北京看书",
        "他在公园里跑步",
    ]
    found = corpus_scores(texts, [[text] for text in english + chinese])
    assert found == pytest.approx(
        {
            "bleu_en": sacrebleu.corpus_bleu(texts[:2], [english]).score,
            "bleu_zh": sacrebleu.corpus_bleu(texts[2:], [chinese], tokenize="zh").score,
            "chrf": sacrebleu.corpus_chrf(texts, [english + chinese]).score,
        }
    )
    assert found["bleu_zh"] > 10  # without its tokens each text would be one word
    assert "bleu_zh" not in corpus_scores(texts[:2], [[text] for text in english])


def test_an_item_may_have_fewer_references_than_another():
    texts, first, second = ["a b c d e", "x y z w"], ["a b c d f", "x y z v"], ["a b c d e"]
    found = corpus_scores(texts, [[first[0], second[0]], [first[1]]])
    expected = sacrebleu.corpus_bleu(texts, [first, [second[0], None]]).score
    assert found["bleu_en"] == pytest.approx(expected)


# Settings


def test_settings_of_decoding_are_parsed():
    assert parse_decodings(["greedy", "temperature=0.7,top_p=0.9", "top_p=0.5,seed=3"]) == [
        GREEDY,
        Decoding("temperature=0.7,top_p=0.9", 0.7, 0.9),
        Decoding("top_p=0.5,seed=3", 1.0, 0.5, 3),
    ]


@pytest.mark.parametrize(
    "text",
    ["temperatur=1", "temperature", "temperature=x", "temperature=-1", "temperature=nan", "top_p=0",
     "top_p=2", "seed=1.5", "seed=-1", "", "temperature=1,,top_p=1", "top_p=1,top_p=0.5",
     "greedy,top_p=1"],
)  # fmt: skip
def test_wrong_settings_are_refused(text):
    with pytest.raises(UserError, match="expected greedy, or temperature"):
        parse_decodings([text])
    with pytest.raises(UserError, match="found it twice"):
        parse_decodings(["greedy", "top_p=0.5", "top_p=0.5"])


# The task


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b c"}]


def test_counts_of_replies_by_hand(write_jsonl, chatty):
    rows = [{"conversations": CHAT, "language": "en"}, {"prompt": "你", "references": ["我爱北京"],
            "language": "zh"}, {"prompt": "x"}]  # fmt: skip
    replies = [
        Reply("a b a b", [1, 2, 1, 2, 1, 2], True),  # runs: 1212 2121 1212: one of 3 repeated
        Reply("我在北京", [5, 6, 7, 8], False),
        Reply("", [], True),
    ]
    task = RepliesTask(read_referenced_prompts([write_jsonl("set.jsonl", rows)]))
    result = task.run(Scripted(chatty, replies))
    entry = result.section["greedy"]["all"]
    assert entry["replies"] == 3
    assert entry["tokens"] == pytest.approx(10 / 3, abs=1e-6)
    assert entry["stopped"] == pytest.approx(2 / 3, abs=1e-6)
    assert entry["repetition"] == 1 / 4
    assert describe_replies([[reply] for reply in replies])["repetition"] == 1 / 4
    assert entry["distinct_1"] == 6 / 8  # a b, 我 在 北 京 of 4 + 4
    assert entry["distinct_2"] == pytest.approx(5 / 6, abs=1e-6)  # ab ba, 我在 在北 北京 of 3 + 3
    assert entry["distinct_3"] == 1
    assert entry["references"] == 2
    in_english = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    assert entry["rouge_1"] == pytest.approx((in_english + 3 / 4) / 2, abs=1e-6)
    assert set(result.section["greedy"]) == {"all", "en", "zh"}
    assert next(iter(result.measures)) == "replies/greedy/all/rouge_l"
    assert not result.measures["replies/greedy/all/repetition"].higher_is_better
    assert "replies/greedy/zh/repetition" in result.measures


def test_without_references_repetition_stands_for_the_task_and_nothing_is_compared(
    write_jsonl, chatty, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task = RepliesTask(read_referenced_prompts([write_jsonl("set.jsonl", [{"prompt": "x"}])]))
    result = task.run(Scripted(chatty, [Reply("a", [1, 2, 3, 4], True)]))
    assert next(iter(result.measures)) == "replies/greedy/all/repetition"
    assert not {"bleu_en", "rouge_l", "references"} & result.section["greedy"]["all"].keys()
    with pytest.raises(UserError, match=r"not installed: pip install -e '.\[evaluate\]'"):
        read_referenced_prompts([write_jsonl("set.jsonl", [{"conversations": CHAT}])])


def test_each_decoding_is_repeatable_and_has_a_part_of_its_own(model, chatty, tmp_path):
    (tmp_path / "prompts.txt").write_text("the dog\nthe fox runs\n")
    rows = read_referenced_prompts([str(tmp_path / "prompts.txt")])
    decodings = parse_decodings(["greedy", "temperature=5", "temperature=5,seed=1"])
    task = RepliesTask(rows, decodings, max_new_tokens=8)
    one, other = (task.run(ModelSubject(model, chatty)).section for _ in range(2))
    assert one == other
    assert list(one) == ["greedy", "temperature=5", "temperature=5,seed=1"]
    assert one["greedy"]["all"]["replies"] == 2
    parts = [part["all"]["distinct_1"] for part in one.values()]
    assert all(math.isfinite(part) for part in parts)
    assert one["temperature=5"]["all"] != one["temperature=5,seed=1"]["all"]


BAD = {
    "empty reference": ({"prompt": "q", "reference": " "}, 'reference: found " ", expected a text'),
    "number": ({"prompt": "q", "references": ["a", 3]}, "references: found 3, expected a text"),
    "no prompt": ({"reference": "a"}, "expected"),
    "same id": ({"prompt": "q", "id": 1}, "found the id 1 twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_rows_are_named_with_their_line(write_jsonl, name):
    row, message = BAD[name]
    path = write_jsonl("set.jsonl", [{"prompt": "q", "id": 1}, row])
    with pytest.raises(UserError) as error:
        read_referenced_prompts([path], on_bad_rows="error")
    assert "set.jsonl:2: " in str(error.value)
    assert message in str(error.value)
