"""Our own evaluation set: what makes its pairs fair, and its table in the guides."""

import json
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from pipeline import run_cli

from minimind.data.world import build_world
from minimind.score_card import own_set
from minimind.score_card.minimal_pairs import read_pairs, won
from minimind.score_card.own_set import PARADIGMS, expand, own_pairs, parse_words, write_pairs
from minimind.tokenizer import save_tokenizer

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "docs" / name for name in ("evaluate.md", "evaluate_zh.md")]


@pytest.fixture(scope="module")
def pairs():
    return own_pairs(count=100)


def words_of(text, language):
    """What a unigram model counts: words and signs in English, characters in Chinese."""
    return list(text) if language == "zh" else re.findall(r"[\w']+|[^\w\s]", text.lower())


def language_of(pair):
    return pair.paradigm[:2]


def by_paradigm(pairs):
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.paradigm].append(pair)
    return groups


def example_rows():
    """The guides' table: the first pair of each paradigm."""
    firsts = [group[0] for group in by_paradigm(own_pairs()).values()]
    return [f"| `{p.paradigm}` | {p.phenomenon[3:]} | {p.good} | {p.bad} |" for p in firsts]


def test_a_context_makes_each_form_right_once_and_without_one_the_order_is_tested():
    assert expand("the (dog|dogs) <is|are> old.") == [
        ("The dog is old.", "The dog are old."),
        ("The dogs are old.", "The dogs is old."),
    ]
    assert expand("他<在家看书|看书在家>。") == [("他在家看书。", "他看书在家。")]
    assert parse_words("dog/dogs, cat") == [("dog", "dogs"), "cat"]


def test_each_language_has_more_than_twenty_paradigms_of_forty_pairs():
    for language in PARADIGMS:
        counts = Counter(pair.paradigm for pair in own_pairs([language]))
        assert len(counts) >= 20
        assert set(counts.values()) == {40}


def test_fewer_pairs_are_the_first_ones_and_another_seed_draws_others(pairs):
    fewer = own_pairs(count=10)
    phenomena = [each for found in PARADIGMS.values() for each in found.values()]
    assert len(fewer) == 10 * sum(map(len, phenomena))
    assert set(fewer) < set(pairs)
    assert set(own_pairs(count=10, seed=1)) != set(fewer)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_guide_shows_the_first_pair_of_each_paradigm(guide):
    """Also that every machine and version of Python draws the same pairs."""
    lines = guide.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"\| `(en|zh)_", line)] == example_rows()


def test_no_pair_comes_twice_and_none_is_of_equal_sentences(pairs):
    assert len({(pair.good, pair.bad) for pair in pairs}) == len(pairs)
    assert len({pair.key for pair in pairs}) == len(pairs)
    assert not {pair.good for pair in pairs} & {pair.bad for pair in pairs}


def test_every_sentence_is_printable_and_properly_punctuated(pairs):
    forms = {
        "en": re.compile(r"[A-Z][A-Za-z']*,?( [A-Za-z']+,?)*[.?]"),
        "zh": re.compile(r"[\u4e00-\u9fff，“”]+[。？]"),
    }
    for pair in pairs:
        for text in (pair.good, pair.bad):
            assert forms[language_of(pair)].fullmatch(text), text
    assert not any("  " in pair.good + pair.bad for pair in pairs)


def test_the_sentences_of_a_pair_have_equally_many_words_and_of_a_paradigm_equal_lengths(pairs):
    for group in by_paradigm(pairs).values():
        for pair in group:
            good, bad = (words_of(text, language_of(pair)) for text in (pair.good, pair.bad))
            assert len(good) == len(bad), pair
        assert sum(len(pair.good) - len(pair.bad) for pair in group) == 0, group[0].paradigm


def test_a_unigram_model_of_words_is_exactly_at_chance_in_every_paradigm(pairs):
    generator = random.Random(0)
    weights = defaultdict(lambda: -generator.randrange(1, 1000))
    counted = Counter(
        word
        for pair in pairs
        for text in (pair.good, pair.bad)
        for word in words_of(text, language_of(pair))
    )
    for model in (weights, counted):
        for name, group in by_paradigm(pairs).items():
            wins = [
                won(*(sum(model[word] for word in words_of(text, name[:2])) for text in pair[1:3]))
                for pair in group
            ]
            assert sum(wins) / len(wins) == 0.5, name


def test_a_unigram_model_of_the_shipped_tokens_is_near_chance(default):
    """Exactly in English, where tokens end at words; in Chinese a token may hold two characters
    that are neighbours in one of the sentences alone."""
    pairs = own_pairs()
    encoded = default([text for pair in pairs for text in pair[1:3]]).input_ids
    counted = Counter(token for ids in encoded for token in ids)
    scores = [round(sum(math.log(counted[token] / 1e6) for token in ids), 6) for ids in encoded]
    for language, tolerance in (("en", 1e-9), ("zh", 0.05)):
        own = [number for number, pair in enumerate(pairs) if language_of(pair) == language]
        wins = [won(scores[2 * number], scores[2 * number + 1]) for number in own]
        assert sum(wins) / len(wins) == pytest.approx(0.5, abs=tolerance)


def test_no_sentence_is_in_the_embedded_corpus():
    world = json.dumps(build_world(), ensure_ascii=False)
    corpus = set(re.split(r'(?<=[.?!。？！])\s*|\\n|"', world))
    assert {"Where does Lena live?", "你是谁？"} < corpus
    assert {text for pair in own_pairs() for text in pair[1:3]} & corpus == set()


def test_written_pairs_are_read_back(tmp_path):
    pairs = own_pairs(count=4)
    write_pairs(pairs, tmp_path / "own.jsonl")
    found = read_pairs([str(tmp_path / "own.jsonl")])
    assert [pair[:5] for pair in found] == [pair[:5] for pair in pairs]
    first, *_, last = map(json.loads, (tmp_path / "own.jsonl").read_text("utf-8").splitlines())
    assert (first["language"], first["pairID"], last["language"]) == ("en", "0", "zh")


@pytest.fixture
def few(monkeypatch):
    """The first paradigm of each language alone."""
    small = {}
    for language, found in PARADIGMS.items():
        phenomenon, paradigms = next(iter(found.items()))
        small[language] = {phenomenon: dict(list(paradigms.items())[:1])}
    monkeypatch.setattr(own_set, "PARADIGMS", small)


def test_a_model_is_evaluated_by_our_own_set_where_nothing_else_is_given(
    model, tokenizer, few, tmp_path, capsys
):
    model_dir = tmp_path / "model"
    model.save_pretrained(model_dir)
    save_tokenizer(tokenizer, model_dir)
    written = tmp_path / "own.jsonl"

    def card_of(*options):
        capsys.readouterr()
        run_cli("evaluate", model_dir, *options)
        printed = capsys.readouterr().out
        return json.loads(printed[printed.index("{\n") :])

    card = card_of()
    assert card["pairs"]["all"]["n"] == 80
    assert set(card["pair_files"]) == {"own set, en", "own set, zh"}

    chinese = card_of("--own_set", "zh", "--write_own_set", written)
    assert chinese["pairs"]["zh_classifier_noun"] == card["pairs"]["zh_classifier_noun"]
    assert chinese["pairs"]["all"]["n"] == 40

    again = card_of("--pairs", written)
    assert again["pairs"] == chinese["pairs"]
