"""`minimind evaluate`: minimal pairs, texts, and the card that is written and continued."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from pipeline import failure, run_cli

from minimind.evaluation.scoring import ModelSubject, Request
from minimind.evaluation.texts import windows
from minimind.score_card import Finished, PairsTask, card_table, make_card, read_pairs
from minimind.score_card.minimal_pairs import MinimalPair
from minimind.tokenizer import text_encoder
from minimind.tokenizer_evaluation.texts import script

PAIRS = [
    {"UID": "agreement", "linguistics_term": "form", "pairID": "1", **texts}
    for texts in ({"sentence_good": "the dog runs", "sentence_bad": "the dog run"},)
] + [
    {
        "UID": "order",
        "pairID": 1,
        "sentence_good": "the fox jumps",
        "sentence_bad": "fox jumps the",
    },
    {"UID": "order", "pairID": 2, "sentence_good": "狐狸跳过了狗", "sentence_bad": "狐狸跳过狗了"},
]


class Table:
    """A subject with given probabilities of tokens, whatever is before them."""

    max_length = 64

    def __init__(self, tokenizer, probabilities):
        self.tokenizer, self.probabilities, self.requests = tokenizer, probabilities, []

    def log_probabilities(self, requests, title=""):
        self.requests += requests
        return [
            np.log([self.probabilities.get(token, 0.1) for token in request.continuation])
            for request in requests
        ]


@pytest.fixture
def directory(model, tokenizer, tmp_path):
    """A stage directory whose model is far from random start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def card(directory, capsys):
    """Run the command with --json, and return the object that it prints."""

    def run(*words):
        run_cli("evaluate", directory, *words, "--json")
        return json.loads(capsys.readouterr().out)

    return run


def pair(key, good, bad, paradigm="p", phenomenon=None, file="f"):
    return MinimalPair(key, good, bad, paradigm, phenomenon, file)


# Minimal pairs


def test_pairs_are_won_by_the_sum_and_by_the_mean_of_all_tokens_after_the_end_token(
    model, tokenizer, write_jsonl
):
    """The oracle: each sentence alone, with the end token in front."""
    model.eval()

    def score(text):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            found = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        values = [found[i, token].item() for i, token in enumerate(ids[1:])]
        return sum(values), sum(values) / len(values)

    rows = read_pairs([write_jsonl("pairs.jsonl", PAIRS)])
    found = PairsTask(rows).run(ModelSubject(model, tokenizer))
    for form, index in (("sum", 0), ("mean", 1)):
        wins = [float(score(row.good)[index] > score(row.bad)[index]) for row in rows]
        assert list(found.measures[f"pairs/all/{form}"].values.values()) == wins
        assert found.section["all"][form] == pytest.approx(sum(wins) / 3, abs=1e-6)
        assert found.section["order"][form] == pytest.approx(sum(wins[1:]) / 2)
    assert found.section.keys() == {"all", "agreement", "order"}
    assert found.entries.keys() == {"phenomena"}
    assert found.entries["phenomena"]["form"]["n"] == 1


def test_a_tie_counts_one_half_and_never_as_right(bytewise):
    """A model that finds everything equally probable, and word orders under one without order."""
    same = pair("1", "ab", "cd"), pair("2", "wxyz", "ywzx")
    uneven = dict(zip(bytewise("wxyz")["input_ids"], (0.1, 0.2, 0.3, 0.7), strict=True))
    for probabilities in ({}, uneven):
        section = PairsTask(same).run(Table(bytewise, probabilities)).section["all"]
        assert (section["sum"], section["mean"]) == (0.5, 0.5)
        assert section["verdict"] == "not distinguishable from chance"


def test_a_model_whose_numbers_are_broken_is_not_right(bytewise):
    nothing = {index: float("nan") for index in range(300)}
    section = PairsTask([pair("1", "ab", "cd")]).run(Table(bytewise, nothing)).section["all"]
    assert section["sum"] == 0.5


def test_the_sum_favours_the_shorter_text_and_the_mean_does_not(bytewise):
    """Under a model that finds every byte equally probable, only the length decides the sum."""
    pairs = [pair(str(i), "abc" + "d" * i, "xyz") for i in range(4)]
    found = PairsTask(pairs).run(Table(bytewise, {})).section["all"]
    assert found["sum"] == (0.5 + 0 + 0 + 0) / 4
    assert found["mean"] == 0.5
    assert (found["same_length"], found["good_longer"]) == (0.25, 1)


def test_the_context_of_a_text_is_the_end_token_alone(tokenizer):
    subject = Table(tokenizer, {})
    PairsTask([pair("1", "a <|im_end|>", "b")]).run(subject)
    ids = text_encoder(tokenizer).encode("a <|im_end|>", add_special_tokens=False).ids
    assert subject.requests[0] == Request((tokenizer.eos_token_id,), tuple(ids))
    assert tokenizer.eos_token_id not in ids  # words of a text end nothing


def test_the_verdict_says_where_a_score_stands_to_chance(bytewise):
    likely = dict.fromkeys(bytewise("a")["input_ids"], 0.9)
    pairs = [pair(str(i), "a", "b") for i in range(20)]
    turned = [pair(str(i), "b", "a") for i in range(20)]
    for found, expected in (
        (pairs, "better than chance"),
        (turned, "worse than chance"),
        (pairs[:10] + turned[10:], "not distinguishable from chance"),
    ):
        result = PairsTask(found).run(Table(bytewise, likely))
        assert result.section["all"]["verdict"] == expected
        low, high = result.section["all"]["sum_interval"]
        assert low <= result.section["all"]["sum"] <= high


def test_each_of_several_files_has_its_total(write_jsonl, card):
    files = [write_jsonl("a.jsonl", PAIRS[:1]), write_jsonl("b.jsonl", PAIRS[1:])]
    found = card("--pairs", *files)
    assert [found["pair_files"][file]["n"] for file in files] == [1, 2]
    assert found["pairs"]["all"]["n"] == 3
    assert "pair_files" not in card("--pairs", files[1])


def test_a_directory_of_files_has_a_paradigm_a_file(write_jsonl, tmp_path):
    """The layout of ZhoBLiMP; several files may number their pairs alike."""
    (tmp_path / "zh").mkdir()
    row = {"sentence_good": "狐狸", "sentence_bad": "狸狐", "phenomenon": "order", "pairID": 0}
    for name in ("one", "two"):
        write_jsonl(f"zh/{name}.jsonl", [row])
    found = read_pairs([str(tmp_path / "zh")])
    assert [(each.paradigm, each.phenomenon) for each in found] == [
        ("one", "order"),
        ("two", "order"),
    ]
    assert len({each.key for each in found}) == 2
    row = {name: row[name] for name in ("sentence_good", "sentence_bad")}
    found = read_pairs([write_jsonl("a.jsonl", [row] * 2), write_jsonl("b.jsonl", [row])])
    assert len({each.key for each in found}) == 3
    assert {each.paradigm for each in found} == {None}


# Texts


def test_windows_predict_every_token_once_with_as_much_before_it_as_fits():
    assert list(windows([*range(1, 11)], 0, 4)) == [
        Request((0,), (1, 2, 3, 4)),
        Request((4,), (5, 6, 7, 8)),
        Request((6, 7, 8), (9, 10)),
    ]
    assert list(windows([1, 2, 3, 4], 0, 4)) == [Request((0,), (1, 2, 3, 4))]
    assert list(windows([1], 0, 4)) == [Request((0,), (1,))]


def test_bits_per_byte_by_source_and_language_are_those_of_their_documents(
    directory, model, tokenizer, write_jsonl, card
):
    """The oracle: each document's windows alone, one after the other."""
    rows = [
        {"text": "the quick brown fox jumps over the lazy dog", "source": "tales"},
        {"text": "敏捷的棕色狐狸"},
        {"text": "brown foxes", "source": "tales", "language": "de"},
    ]
    model.eval()

    def nats(text):
        ids = [2, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        total = 0.0
        for start in range(1, len(ids), 8):
            stop = min(start + 8, len(ids))
            before = max(0, stop - 9)
            with torch.no_grad():
                found = model(torch.tensor([ids[before : stop - 1]]), use_cache=False).logits[0]
            for place in range(start, stop):
                total -= found.log_softmax(-1)[place - 1 - before, ids[place]].item()
        return total

    file = write_jsonl("texts.jsonl", rows)
    found = card(file, "--max_length", 8)
    groups = {
        ("all",): rows,
        ("sources", "tales"): [rows[0], rows[2]],
        ("sources", "texts.jsonl"): [rows[1]],
        ("languages", "en"): [rows[0]],
        ("languages", "zh"): [rows[1]],
        ("languages", "de"): [rows[2]],
    }
    for path, members in groups.items():
        section = found["texts"]
        for name in path:
            section = section[name]
        total, size = (
            sum(f(row["text"]) for row in members) for f in (nats, lambda t: len(t.encode()))
        )
        assert section["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
        assert section["perplexity"] == pytest.approx(math.exp(total / section["tokens"]), rel=1e-3)
        assert (section["documents"], section["bytes"]) == (len(members), size)
        low, high = section["bits_per_byte_interval"]
        assert low <= section["bits_per_byte"] + 1e-6
        assert high >= section["bits_per_byte"] - 1e-6
    assert found["documents"] == 3
    assert found["tokens"] == found["texts"]["all"]["tokens"] + 3  # with the end tokens


def test_a_language_is_that_of_most_of_the_writing():
    texts = ("a fox", "狐狸 fox", "лиса", "42")
    assert [script(text).language for text in texts] == ["en", "zh", "other", "other"]


# The card


def test_a_card_is_written_and_its_finished_tasks_are_not_run_again(
    directory, write_jsonl, card, tmp_path, monkeypatch
):
    pairs = write_jsonl("pairs.jsonl", PAIRS)
    output = tmp_path / "card"
    found = card("--pairs", pairs, "--output", output)
    names = {file.name for file in output.iterdir()}
    assert names == {"card.json", "card.md", "card.png", "items.jsonl", "finished.jsonl"}
    assert json.loads((output / "card.json").read_text()) == found
    assert (output / "card.png").read_bytes()[:4] == b"\x89PNG"
    items = [*map(json.loads, (output / "items.jsonl").read_text().splitlines())]
    assert [item["item"] for item in items] == ["agreement/1", "order/1", "order/2"]
    won = [item["values"]["pairs/all/sum"] for item in items]
    assert sum(won) / 3 == pytest.approx(found["pairs"]["all"]["sum"], abs=1e-6)

    # Everything else than the new task is kept
    ran = []
    score = ModelSubject.log_probabilities

    def counted(self, requests, title):
        ran.append(title)
        return score(self, requests, title)

    monkeypatch.setattr(ModelSubject, "log_probabilities", counted)
    assert card("--pairs", pairs, "--output", output) == found
    assert ran == []
    text = write_jsonl("text.jsonl", [{"text": "the fox"}])
    assert card(text, "--pairs", pairs, "--output", output)["pairs"] == found["pairs"]
    assert ran == ["texts"]

    # Other pairs, or other weights, are not those
    other = write_jsonl("pairs.jsonl", PAIRS[:2])
    assert card("--pairs", other, "--output", output)["pairs"]["all"]["n"] == 2
    assert ran == ["texts", "minimal pairs"]
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    card("--pairs", other, "--output", output)
    assert ran == ["texts", "minimal pairs", "minimal pairs"]


def test_an_interrupted_card_goes_on_with_the_next_task(directory, tokenizer, tmp_path):
    class Interrupted(PairsTask):
        name = "later"

        def run(self, subject):
            raise KeyboardInterrupt

    first = PairsTask([pair("1", "the fox", "fox the")])
    file = tmp_path / "finished.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make_card(str(directory), [first, Interrupted(first.pairs)], Finished(file))
    with file.open("a") as half_written:
        half_written.write('{"key": "x", "measures": {')
    again = Finished(file)
    assert len(again.results) == 1
    first.run = None  # it must not run
    del first.run
    found = make_card(str(directory), [first], again)
    assert found.results["pairs"].section["all"]["n"] == 1


def test_several_models_are_in_one_object_one_table_and_one_markdown(
    directory, write_jsonl, card, capsys
):
    pairs = write_jsonl("pairs.jsonl", PAIRS)
    found = card(directory, "--pairs", pairs)
    one = card("--pairs", pairs)
    assert [model["pairs"] for model in found["models"]] == [one["pairs"]] * 2
    result = make_card(str(directory), [PairsTask(read_pairs([pairs]))], Finished(None))
    table = card_table([result])
    lines = table.markdown().splitlines()
    assert len({line.count(" | ") for line in lines}) == 1
    assert "not distinguishable from chance" in lines[2]
    assert table.for_terminal().row_count == len(lines) - 2


def test_a_terminal_gets_a_table_and_a_pipe_json(directory, write_jsonl, capsys, monkeypatch):
    words = ("evaluate", directory, "--pairs", write_jsonl("pairs.jsonl", PAIRS))
    run_cli(*words)
    assert capsys.readouterr().out.startswith("{")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run_cli(*words)
    out = capsys.readouterr().out
    assert "distinguishable" in out
    assert not out.startswith("{")


# Mistakes


GOOD = PAIRS[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence_bad": None}, "pairs.jsonl:2: sentence_bad: found nothing, expected a text"),
        ({"sentence_good": "  "}, r'pairs.jsonl:2: sentence_good: found "  ", expected a text'),
        ({"sentence_good": 7}, "pairs.jsonl:2: sentence_good: found 7, expected a text"),
        ({"sentence_bad": "the dog runs"}, "pairs.jsonl:2: found the same text as sentence_good"),
        ({"sentence_bad": "a"}, "pairs.jsonl:2: found the pair agreement/1 again"),
        ({"UID": "all", "pairID": 9}, "pairs.jsonl:2: UID: found 'all'"),
    ],
)
def test_a_bad_pair_is_named_before_a_model_is_loaded(
    row, message, write_jsonl, capsys, tmp_path, directory, monkeypatch
):
    monkeypatch.setattr("minimind.score_card.card.load_for_generation", None)
    file = write_jsonl("pairs.jsonl", [GOOD, {**GOOD, **row}])
    words = ("evaluate", directory, "--pairs", file, "--output", tmp_path / "card")
    assert message in failure(capsys, run_cli, *words)
    assert not (tmp_path / "card").exists()


def test_each_mistake_is_one_message_and_nothing_is_written(
    directory, write_jsonl, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("minimind.score_card.card.load_for_generation", None)
    pairs = write_jsonl("pairs.jsonl", PAIRS)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    chats = write_jsonl(
        "chats.jsonl",
        [{"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}],
    )
    reward = tmp_path / "reward"
    reward.mkdir()
    for file in directory.iterdir():
        (reward / file.name).write_bytes(file.read_bytes())
    config = json.loads((reward / "config.json").read_text())
    config["architectures"] = ["MiniMindForSequenceClassification"]
    (reward / "config.json").write_text(json.dumps(config))
    base = tmp_path / "base"
    base.mkdir()
    for file in directory.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "stage.json").write_text('{"stage": "pretrain"}')

    output = "--output", tmp_path / "card"
    for words, expected in (
        ((tmp_path, "--pairs", pairs), "is not a complete stage directory"),
        ((tmp_path / "none", "--pairs", pairs), "no such directory"),
        ((directory, "--pairs", tmp_path / "none.jsonl"), "none.jsonl: does not exist"),
        ((directory, "--pairs", empty), "empty.jsonl: found an empty file"),
        ((directory, tmp_path / "none.jsonl"), "none.jsonl: does not exist"),
        ((directory, reward, "--pairs", pairs), "holds a reward model"),
        ((base, chats), "found a base model, which has not learned to answer"),
        ((directory, "--pairs", pairs, "--output", pairs), "cannot be written"),
    ):
        words = words if "--output" in words else (*words, *output)
        assert expected in failure(capsys, run_cli, "evaluate", *words), words
        assert not (tmp_path / "card").exists()
