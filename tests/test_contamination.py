"""The training files of a model's lineage, and the test items that are in them."""

import json
import random

import pytest
from pipeline import document_rows, run_cli

from minimind.cleaning.duplicates import NgramIndex
from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.data.documents import load_blocks
from minimind.evaluation.statistics import Measure
from minimind.score_card.contamination import contamination, find_overlaps
from minimind.score_card.tasks import TaskResult
from minimind.stage_directory import Ancestor, lineage
from minimind.tokenizer import save_tokenizer
from minimind.training.data_arguments import DataArguments

WORDS = [f"word{number}" for number in range(14)]
HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"


# Lineage


def write_stage(directory, stage, files, parent=None, **facts):
    """A stage directory's record of training on files, as paths from its parent's directory."""
    directory.mkdir(parents=True)
    paths = [directory.parent / file for file in files]
    record = {"stage": stage, "weights": f"weights of {directory.name}", "parent": None}
    if parent:
        record["parent"] = {"directory": parent, "stage": "", "weights": f"weights of {parent}"}
    train = {"files": list(map(str, files)), "hash": content_hash(paths), **facts}
    record["data"] = {"train": train, "eval": {"files": []}}
    (directory / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return directory


@pytest.fixture
def runs(write_jsonl, tmp_path):
    """An adapter on a model on its pretraining, each with a file of its own."""
    (tmp_path / "data").mkdir()
    for name in ("a", "b", "c"):
        write_jsonl(f"data/{name}.jsonl", [{"text": f"text of {name}"}])
    write_stage(tmp_path / "pretrain", "pretrain", ["data/a.jsonl"])
    write_stage(tmp_path / "sft", "sft", ["data/b.jsonl"], "pretrain")
    return write_stage(tmp_path / "lora", "lora", ["data/c.jsonl"], "sft")


def test_a_lineage_goes_back_to_random_weights_from_any_directory(runs, tmp_path):
    found = lineage(runs)
    assert [each.stage for each in found] == ["lora", "sft", "pretrain"]
    files = [[tmp_path / "data" / f"{name}.jsonl"] for name in "cba"]
    assert [each.files for each in found] == files
    assert {each.problem for each in found} == {None}


def test_changed_and_missing_training_files_are_named(runs, tmp_path):
    with (tmp_path / "data" / "c.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    (tmp_path / "data" / "b.jsonl").unlink()
    lora, sft, pretrain = lineage(runs)
    assert lora.files == sft.files == []
    assert "c.jsonl: not as they were (stage.json has another hash)" in lora.problem
    assert "b.jsonl: does not exist" in sft.problem
    assert len(pretrain.files) == 1


def test_a_parent_that_is_gone_or_was_trained_again_ends_the_lineage(runs, tmp_path):
    record = tmp_path / "sft" / "stage.json"
    record.write_text(record.read_text().replace("weights of sft", "other"))
    for _ in range(2):
        found = lineage(runs)
        assert [each.directory for each in found] == [str(runs), "sft"]
        assert found[1].problem == "the directory is not there, or holds other weights now"
        if (tmp_path / "sft").exists():
            (tmp_path / "sft").rename(tmp_path / "elsewhere")


def test_a_model_without_a_record_has_no_training_files(tmp_path):
    (found,) = lineage(tmp_path)
    assert found.files == []
    assert found.problem == "it has no stage.json, which would name its training files"


@pytest.mark.parametrize("train", [{"files": 3}, {"files": ["a"], "sources": [1]}, None, 7])
def test_a_record_of_another_form_names_no_training_files(train, tmp_path):
    (tmp_path / "a").write_text('{"text": "a"}\n')
    (tmp_path / "stage.json").write_text(json.dumps({"stage": "sft", "data": {"train": train}}))
    (found,) = lineage(tmp_path)
    assert found.files == []
    assert found.problem


def test_the_hash_of_mixed_sources_is_the_one_that_pretraining_records(
    tokenizer, write_jsonl, tmp_path
):
    names = [write_jsonl(f"{name}.jsonl", document_rows()) for name in ("a", "b", "c")]
    mixed = [f"{names[0]}:0.5", f"{tmp_path}/[bc].jsonl:0.5"]
    facts = load_blocks(DataArguments(mixed, [names[0]]), tokenizer, 64).facts
    record = {"stage": "pretrain", "data": facts}
    (tmp_path / "stage.json").write_text(json.dumps(record))
    (found,) = lineage(tmp_path)
    assert list(map(str, found.files)) == names
    assert found.problem is None


# Overlap


def overlaps(tmp_path, items, *texts):
    """The keys of the items that are in the training texts."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return find_overlaps({"task": items}, [file])["task"]


def test_thirteen_words_or_twenty_chinese_characters_in_common_are_an_overlap(tmp_path):
    items = {
        "13 words": [" ".join([*WORDS[:13], "and", "other", "words"])],
        "12 words": [" ".join([*WORDS[2:], "and", "other", "words"])],
        "20 characters": [f"{HAN[4:24]}与其他文字"],
        "19 characters": [f"{HAN[5:]}与其他的文字也没有关系啊"],
    }
    found = overlaps(tmp_path, items, f"So: {' '.join(WORDS)}!", f"又说{HAN}。")
    assert sorted(found) == ["13 words", "20 characters"]
    assert found["13 words"].shared == " ".join(WORDS[:13])
    assert found["13 words"].where.endswith("train.jsonl:1")
    assert found["20 characters"].where.endswith("train.jsonl:2")


def test_shorter_texts_are_compared_in_full_but_for_case_and_punctuation(tmp_path):
    items = {
        "in it": ["The fox runs home."],
        "the second text": ["nothing of this kind", "dogs run home fast"],
        "longer": ["the fox runs home today"],
        "too short": ["the fox runs"],
    }
    found = overlaps(tmp_path, items, "'the FOX runs, home', and dogs run home fast")
    assert sorted(found) == ["in it", "the second text"]


def test_of_a_long_document_a_copied_passage_is_found(tmp_path):
    draw = random.Random(0)
    words = [f"w{draw.randrange(10**6)}" for _ in range(1000)]
    items = {"long": [" ".join(words)]}
    assert overlaps(tmp_path, items, f"x {' '.join(words[505:530])} y").keys() == {"long"}
    assert overlaps(tmp_path, items, f"x {' '.join(words[505:517])} y") == {}


def test_training_rows_of_every_kind_are_compared(tmp_path):
    rows = [
        {"conversations": [{"role": "user", "content": "who is the fox there"}]},
        {"prompt": "q", "chosen": "yes that one is good", "rejected": "no it is not there"},
        {"my_column": {"inside": "some columns have other names"}},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["who is the fox there", "no it is not there", "some columns have other names"]
    items = {text: [text] for text in texts}
    assert find_overlaps({"task": items}, [file])["task"].keys() == set(texts)


def test_the_index_finds_what_a_search_of_all_places_finds():
    draw = random.Random(0)
    index, ngrams = NgramIndex(3), {}
    for number in range(60):
        units = draw.choices("abcd", k=draw.randrange(3, 9))
        index.add(units, 5, number)
        n = min(5, len(units))
        for start in range(len(units) - n + 1):
            ngrams.setdefault(tuple(units[start : start + n]), []).append(number)
    index.freeze()
    short = next(list(ngram) for ngram in ngrams if len(ngram) == 3)
    for length in (1, 2, 5, 200):
        text = [*draw.choices("abcde", k=length), *short]
        expected = [
            (start, n, ngrams[tuple(text[start : start + n])])
            for start in range(len(text))
            for n in range(3, 6)
            if start + n <= len(text) and tuple(text[start : start + n]) in ngrams
        ]
        assert list(index.find(text)) == expected
    assert expected


# The section


class Items:
    """A task of items with texts."""

    name = "items"

    def item_texts(self):
        return {"seen": ["the fox runs home"], "new": ["the owl sleeps here"], "short": ["owl"]}


def section(tmp_path, values, text):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    results = {"items": TaskResult({"items/all": Measure(values, chance=0.5)}, {})}
    ancestors = [Ancestor("runs/sft", "sft", [file]), Ancestor("gone", None, [], "no such one")]
    return contamination([Items()], results, ancestors).section


def test_scores_are_given_with_and_without_the_items_in_the_training_text(tmp_path):
    found = section(tmp_path, {"seen": 1.0, "new": 0.0, "short": 0.5}, "and the fox runs home")
    task = found["tasks"]["items"]
    assert [task[name] for name in ("n", "overlapping", "too_short")] == [3, 1, 1]
    assert task["share"] == pytest.approx(1 / 3)
    score = task["scores"]["items/all"]
    assert (score["all"]["score"], score["all"]["n"]) == (0.5, 3)
    assert (score["without"]["score"], score["without"]["n"]) == (0.25, 2)
    (example,) = task["examples"]
    assert (example["item"], example["shared"]) == ("seen", "the fox runs home")
    assert found["remarks"] == [
        "gone: its training text was not compared: no such one",
        "items: 1 of 3 items are in the training text; items/all is 0.5 with them and 0.25 without",
    ]


def test_a_set_that_is_in_the_training_text_in_full_has_no_score_without(tmp_path):
    found = section(tmp_path, {"seen": 1.0}, "the fox runs home")
    score = found["tasks"]["items"]["scores"]["items/all"]
    assert score["without"] is None
    assert found["remarks"][1] == "items: 1 of 3 items are in the training text"


# The command


@pytest.fixture
def trained(model, tokenizer, tmp_path, write_jsonl):
    """A model with the record of a training file, and pairs of which one is in that file."""
    directory = tmp_path / "pretrain"
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    write_jsonl("train.jsonl", [{"text": "the fox runs home and the dog sleeps"}])
    write_stage(tmp_path / "record", "pretrain", ["train.jsonl"])
    record = json.loads((tmp_path / "record" / "stage.json").read_text())
    del record["weights"]
    (directory / "stage.json").write_text(json.dumps(record))
    rows = [("the fox runs home", "the fox run home"), ("a dog sleeps now", "a dog sleep now")]
    pairs = [{"sentence_good": good, "sentence_bad": bad} for good, bad in rows]
    return directory, write_jsonl("pairs.jsonl", pairs)


def test_one_command_adds_controls_and_contamination_to_the_card(trained, tmp_path, capsys):
    model, pairs = trained
    options = ["--controls", "--contamination", "--output", tmp_path / "card", "--json"]
    run_cli("evaluate", model, "--pairs", pairs, *options)
    card = json.loads(capsys.readouterr().out)
    assert card["controls"]["random"]["pairs"]["all"]["n"] == 2
    assert card["controls"]["unigrams_of"] == [str(tmp_path / "train.jsonl")]
    assert card["contamination"]["tasks"]["pairs"]["overlapping"] == 1
    assert card["contamination"]["lineage"][0]["problem"] is None
    text = (tmp_path / "card" / "card.md").read_text()
    assert "controls/shuffled/pairs/all/sum" in text
    assert "- pairs: 1 of 2 items are in the training text" in text

    # What is finished is not computed again, unless the training files are others
    lines = (tmp_path / "card" / "finished.jsonl").read_text()
    run_cli("evaluate", model, "--pairs", pairs, *options)
    assert json.loads(capsys.readouterr().out) == card
    assert (tmp_path / "card" / "finished.jsonl").read_text() == lines
    (tmp_path / "train.jsonl").unlink()
    run_cli("evaluate", model, "--pairs", pairs, *options)
    card = json.loads(capsys.readouterr().out)
    assert card["contamination"]["tasks"]["pairs"]["overlapping"] == 0
    assert card["controls"]["unigrams_of"] == "the tasks' own texts"
    assert "does not exist" in card["contamination"]["remarks"][0]


def test_a_record_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(UserError, match="not JSON, or cut off"):
        lineage(tmp_path)
