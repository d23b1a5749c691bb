"""Scores are those of lm-evaluation-harness on the same files, where it is installed."""

import json
import random
import sys

import pytest
import torch
from pipeline import failure, run_cli

from minimind.common.errors import UserError
from minimind.evaluation.scoring import ModelSubject
from minimind.evaluation.statistics import estimate
from minimind.score_card import (
    ChoicesTask,
    HarnessTask,
    PairsTask,
    held_out_task,
    read_multiple_choice,
    read_pairs,
)
from minimind.tokenizer import save_tokenizer

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {output}
doc_to_text: "{text}"
doc_to_target: {target}
{more}metric_list:
"""
QUESTION = "{{question}}\\n" + "\\n".join(f"{x}. {{{{choices[{i}]}}}}" for i, x in enumerate("ABC"))
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "runs", "home"]


def words(draw, most):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


@pytest.fixture
def subject(model, tokenizer):
    """The tiny model with weights so large that its predictions depend on every token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.2)
    return ModelSubject(model, tokenizer)


@pytest.fixture
def write_task(tmp_path, write_jsonl):
    """Write rows and a task of lm-evaluation-harness that reads them; returns the rows' file."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")

    def write(name, rows, output, text, target, more="", metrics=("acc",)):
        file = write_jsonl(f"{name}.jsonl", rows)
        fields = {"output": output, "text": text, "target": target, "more": more}
        task = TASK.format(name=name, file=file, folder=tmp_path, **fields)
        task += "".join(f"  - metric: {metric}\n" for metric in metrics)
        (tmp_path / f"{name}.yaml").write_text(task, encoding="utf-8")
        return file

    return write


def run_harness(subject, name, tmp_path):
    return HarnessTask([name], str(tmp_path)).run(subject)


def values(result, name):
    return list(result.measures[name].values.values())


def test_pairs_are_scored_as_the_harness_scores_them(subject, write_task, tmp_path):
    draw, names = random.Random(0), ("sentence_good", "sentence_bad")
    rows = [{name: f"{words(draw, 6)} {i}" for i, name in enumerate(names)} for _ in range(40)]
    more = 'doc_to_choice: "{{[sentence_good, sentence_bad]}}"\ntarget_delimiter: ""\n'
    file = write_task("pairs_here", rows, "multiple_choice", "", 0, more)
    found = run_harness(subject, "pairs_here", tmp_path)
    own = PairsTask(read_pairs([file])).run(subject)
    assert values(found, "lm_eval/pairs_here/acc") == values(own, "pairs/all/sum")
    measure = found.measures["lm_eval/pairs_here/acc"]
    assert measure.chance == 0.5
    scores = found.section["results"]["pairs_here"]
    assert scores["acc,none"] == pytest.approx(own.section["all"]["sum"], abs=1e-6)
    assert scores["acc,none"] == pytest.approx(estimate(measure)["score"], abs=1e-6)
    assert scores["acc_stderr,none"] > 0


def test_choices_are_scored_as_the_harness_scores_them(subject, write_task, tmp_path):
    draw = random.Random(0)
    rows = [
        {
            "question": words(draw, 8),
            "choices": [f"{words(draw, 3)} {i}" for i in range(3)],
            "answer": draw.randrange(3),
        }
        for _ in range(40)
    ]
    letters = "doc_to_choice: ['A', 'B', 'C']\n"
    text = QUESTION + "\\nAnswer:"
    write_task("by_letters", rows, "multiple_choice", text, "answer", letters)
    cloze, both = 'doc_to_choice: "{{choices}}"\n', ("acc", "acc_norm")
    file = write_task("cloze", rows, "multiple_choice", "{{question}}", "answer", cloze, both)
    questions, shots = read_multiple_choice([file])
    own = ChoicesTask(questions, shots).run(subject)
    found = run_harness(subject, "by_letters", tmp_path)
    assert values(found, "lm_eval/by_letters/acc") == values(own, "choices/all/letters")
    found = run_harness(subject, "cloze", tmp_path)
    assert values(found, "lm_eval/cloze/acc") == values(own, "choices/all/cloze_sum")
    assert values(found, "lm_eval/cloze/acc_norm") == values(own, "choices/all/cloze_characters")
    assert found.measures["lm_eval/cloze/acc"].chance == pytest.approx(1 / 3)


def test_bits_per_byte_are_those_of_rolling_log_likelihoods(subject, write_task, tmp_path):
    """Documents longer than the model's positions too."""
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=n))} for n in (1, 30, 300, 600)]
    metrics = ("bits_per_byte", "byte_perplexity")
    text = '"{{text}}"'
    file = write_task("rolling", rows, "loglikelihood_rolling", "", text, metrics=metrics)
    task = held_out_task([file], "pretrain", max_length=10**6, max_new_tokens=0, batch_size=1)
    own = task.run(subject).section["all"]
    assert own["tokens"] > 4 * subject.max_length
    found = run_harness(subject, "rolling", tmp_path).section["results"]["rolling"]
    assert found["bits_per_byte,none"] == pytest.approx(own["bits_per_byte"], abs=1e-6)


def test_the_harness_counts_a_tie_as_the_first_choice(subject, write_task, tmp_path):
    """So BLiMP's ties are right there, and half right here."""
    rows = [{"question": "the fox", "choices": ["runs", "runs"], "answer": i} for i in (0, 1)]
    more = 'doc_to_choice: "{{choices}}"\n'
    write_task("ties", rows, "multiple_choice", "{{question}}", "answer", more)
    assert values(run_harness(subject, "ties", tmp_path), "lm_eval/ties/acc") == [1.0, 0.0]


def test_the_card_has_the_tasks_of_the_harness(subject, write_task, tmp_path):
    directory = tmp_path / "model"
    subject.model.save_pretrained(directory)
    save_tokenizer(subject.tokenizer, directory)
    rows = [{"good": "the fox runs", "bad": "the fox run", "answer": 0}] * 3
    more = 'doc_to_choice: "{{[good, bad]}}"\n'
    write_task("in_card", rows, "multiple_choice", "", "answer", more)
    options = ["--include_path", tmp_path, "--output", tmp_path / "card"]
    run_cli("evaluate", directory, "--lm_eval", "in_card", *options)
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    assert card["lm_eval"]["results"]["in_card"]["sample_len"] == 3


def test_unknown_tasks_and_data_out_of_reach_are_refused(write_task, tmp_path):
    write_task("here", [{"a": "b"}], "loglikelihood_rolling", "", "a", metrics=("bits_per_byte",))
    (tmp_path / "here.jsonl").unlink()
    with pytest.raises(UserError, match="--lm_eval here: the task or its data cannot be loaded"):
        HarnessTask(["here"], str(tmp_path))
    with pytest.raises(UserError, match="has no such task, only for example blimp"):
        HarnessTask(["blimpp"], str(tmp_path))


def test_a_missing_harness_is_named_with_the_way_to_install_it(monkeypatch, tmp_path, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    said = failure(capsys, run_cli, "evaluate", tmp_path, "--lm_eval", "blimp")
    assert "expected lm-evaluation-harness. Install it: pip install -e '.[lm-eval]'" in said
