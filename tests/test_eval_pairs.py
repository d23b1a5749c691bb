"""Minimal pairs during training: chosen, scored, logged, and of no influence on the training."""

import json
import random

import numpy as np
import pytest
import torch
from pipeline import document_rows, failure, minimal_pair_rows, run_script, short_run, write_model
from safetensors.torch import load_file
from small_run import equal

from minimind.evaluation.scoring import ModelSubject
from minimind.generation import load_for_generation
from minimind.score_card import PairsTask, read_pairs
from minimind.stage_directory import read_stage
from minimind.training.arguments import DPOStageConfig, PretrainConfig, RewardStageConfig
from minimind.training.command_line import parse
from minimind.training.definition import definition_of
from minimind.training.eval_pairs import choose_pairs, pair_metrics
from minimind.training.plots import charts, read_log


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of pairs."""
    root = tmp_path_factory.mktemp("pairs")
    rows = minimal_pair_rows()
    return [str(write(root / "order.jsonl", rows)), str(write(root / "few.jsonl", rows[:3]))]


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory, tokenizer_dir):
    """Run pretrain.py on a few rows; returns the stage directory."""
    root = tmp_path_factory.mktemp("runs")
    model = write_model(root / "model.json")
    documents = write(root / "docs.jsonl", document_rows())

    def run(name, *words, **options):
        words += ("--model_config", model, "--tokenizer", tokenizer_dir, "--block_size", 32)
        words += ("--train_files", documents, "--sample_steps", -1, "--eval_ratio", 0.2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINIMIND_CACHE", str(root / "cache"))
            run_script(patch, "pretrain", *short_run(root / name, **options), *words)
        return root / name

    return run


@pytest.fixture(scope="module")
def runs(pretrain, files):
    """The same run without and with pairs."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    return [pretrain("without", **options), pretrain("with", "--eval_pairs", *files, **options)]


def test_as_many_pairs_of_each_paradigm_are_chosen_and_the_same_ones_each_time(write_jsonl):
    rows = [
        {"UID": name, "sentence_good": f"{name} {i}", "sentence_bad": f"{i} {name}", "pairID": i}
        for name, count in (("a", 50), ("b", 2), ("c", 50))
        for i in range(count)
    ]
    file = write_jsonl("pairs.jsonl", rows)
    chosen = choose_pairs((file,), 12)["pairs"]
    counts = [[pair.paradigm for pair in chosen].count(name) for name in "abc"]
    assert counts == [5, 2, 5]
    assert {pair.key for pair in chosen if pair.paradigm == "a"} != {f"a/{i}" for i in range(5)}
    choose_pairs.cache_clear()
    random.seed(5)
    assert choose_pairs((file,), 12)["pairs"] == chosen
    assert len(choose_pairs((file,), 1000)["pairs"]) == 102


def test_each_evaluation_has_the_shares_that_the_task_finds(runs, files):
    _, stage = runs
    subject = ModelSubject(*load_for_generation(stage))
    expected = {}
    for form in ("sum", "mean"):
        found = [PairsTask(read_pairs([file])).run(subject).section["all"] for file in files]
        names = [f"pairs_{form}/order", f"pairs_{form}/few"]
        expected |= dict(zip(names, (each[form] for each in found), strict=True))
        whole = sum(each["n"] * each[form] for each in found) / sum(each["n"] for each in found)
        expected[f"pairs_{form}"] = whole
    assert len({*expected.values()}) > 2
    after = read_stage(stage)["metrics"]["after"]
    measured = {name: value for name, value in after.items() if name.startswith("pairs")}
    assert measured == pytest.approx(expected, abs=1e-6)

    # The log: before the first step, after each, and at the end
    log = read_log(stage / "train_log.jsonl")
    assert [entry["step"] for entry in log if "eval_pairs_mean/few" in entry] == [0, 1, 2]
    page = charts(log, "nats per token")
    assert "eval_pairs_sum/few" in page
    assert "minimal pairs won" in (stage / "report.html").read_text()


def test_pairs_change_no_bit_of_the_training(runs):
    weights = [[*load_file(run / "model.safetensors").values()] for run in runs]
    assert equal(*weights)
    states = [
        torch.load(run / "checkpoint-2" / "rng_state.pth", weights_only=False) for run in runs
    ]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"])
    assert (states[0]["python"], str(states[0]["numpy"])) == (
        states[1]["python"],
        str(states[1]["numpy"]),
    )


def test_scoring_draws_no_random_number_and_leaves_the_mode_as_it_was(make_trainer, files):
    trainer = make_trainer(eval_pairs=files)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for training in (True, False):
        trainer.model.train(training)
        assert set(pair_metrics(trainer)) >= {"eval_pairs_sum", "eval_pairs_mean/few"}
        assert trainer.model.training is training
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    trainer.train()  # what was cached under inference can still be trained


def test_each_process_scores_its_own_part(make_trainer, files, monkeypatch):
    trainer = make_trainer(eval_pairs=files[:1])
    whole = pair_metrics(trainer)
    parts = []
    monkeypatch.setattr(
        "minimind.training.eval_pairs.gather_object", lambda part: parts.append(part) or part
    )
    monkeypatch.setattr(type(trainer.args), "world_size", 3)
    for rank in range(3):
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        pair_metrics(trainer)
    assert [len(part) for part in parts] == [3, 3, 2]
    wins = [row[1] for part in parts for row in part]
    assert sum(wins) / len(wins) == whole["eval_pairs_sum"]


@pytest.mark.parametrize("metric", ["pairs_mean", "eval_pairs_sum", "pairs_sum/loss"])
def test_a_larger_share_of_pairs_is_better_and_chooses_the_best_model(metric, tmp_path):
    words = ["--eval_strategy", "epoch", "--load_best_model_at_end"]
    words += ["--metric_for_best_model", metric, "--output_dir", str(tmp_path / "run")]
    (config,) = parse(PretrainConfig, argv=words)
    assert config.greater_is_better is True


def test_a_run_depends_on_the_content_of_pairs_only_where_they_may_stop_it(
    pretrain, files, write_jsonl, monkeypatch
):
    stop = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 1}

    def definition(**options):
        seen = {}

        def spy(name, args, *rest):
            seen.update(definition_of(name, args, *rest))
            raise KeyboardInterrupt

        monkeypatch.setattr("minimind.training.run.definition_of", spy)
        with pytest.raises(SystemExit):
            pretrain("other", *options.pop("words", ()), **options)
        return seen

    one, other = ({"words": ("--eval_pairs", file)} for file in files)
    assert definition(**one) == definition()
    assert definition(**one, **stop) != definition(**other, **stop)
    moved = write_jsonl("moved.jsonl", minimal_pair_rows())
    assert definition(**one, **stop) == definition(words=("--eval_pairs", moved), **stop)


BAD = {
    "missing": ("nowhere.jsonl", [], "nowhere.jsonl"),
    "no text": ("bad.jsonl", [{"sentence_good": "a"}], "bad.jsonl:1: sentence_bad: found nothing"),
    "equal": ("bad.jsonl", [{"sentence_good": "a", "sentence_bad": "a"}], "found the same text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used_stops_the_run_before_it_begins(
    case, pretrain, write_jsonl, capsys, tmp_path
):
    name, rows, message = BAD[case]
    file = write_jsonl(name, rows) if rows else str(tmp_path / name)
    assert message in failure(capsys, pretrain, f"bad {case}", "--eval_pairs", file)
    assert not list((tmp_path.parent).glob(f"runs*/bad {case}"))


def test_what_does_not_go_together_with_pairs_is_said(pretrain, files, capsys, tmp_path):
    def refused(*words, **options):
        return failure(capsys, lambda: pretrain("refused", *words, **options))

    copy = tmp_path / "copy" / "few.jsonl"
    copy.parent.mkdir()
    write(copy, minimal_pair_rows())
    assert "two files named few" in refused("--eval_pairs", files[1], copy)
    assert "there are none" in refused("--eval_pairs", files[0], max_eval_rows=0)
    assert "at least 1" in refused("--eval_pairs", files[0], max_eval_pairs=0)
    with pytest.raises(ValueError, match=r"eval_pairs .* has no meaning here"):
        RewardStageConfig(output_dir=str(tmp_path / "run"), eval_pairs=files)
    assert DPOStageConfig(output_dir=str(tmp_path / "run"), eval_pairs=files).held_out_pairs()
