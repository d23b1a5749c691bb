"""The curve of a run: the cards of its checkpoints by their steps."""

import json

import pytest
import torch
from pipeline import failure, minimal_pair_rows, run_cli

from minimind import MiniMindForCausalLM
from minimind.score_card.curve import curve_of


@pytest.fixture
def run(tmp_path, config, tokenizer):
    """A run whose checkpoints are models of several seeds."""
    root = tmp_path / "run"
    for step in (5, 10, 100):
        torch.manual_seed(step)
        path = root / f"checkpoint-{step}"
        MiniMindForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        state = {"global_step": step, "num_input_tokens_seen": step * 32}
        (path / "trainer_state.json").write_text(json.dumps(state))
    (root / "checkpoint-200").mkdir()  # being written
    (root / "run.json").write_text("{}")
    return root


@pytest.fixture
def evaluate(capsys, write_jsonl):
    pairs = write_jsonl("pairs.jsonl", minimal_pair_rows())

    def call(*words):
        run_cli("evaluate", *words, "--pairs", pairs, "--json")
        return json.loads(capsys.readouterr().out)

    return call


def test_a_run_is_the_cards_of_its_checkpoints_in_the_order_of_their_steps(run, evaluate, tmp_path):
    found = evaluate(run, "--checkpoints", "--output", tmp_path / "out")
    assert found["directory"] == str(run)
    points = found["checkpoints"]
    assert [(each["step"], each["tokens"]) for each in points] == [(5, 160), (10, 320), (100, 3200)]
    alone = evaluate(run / "checkpoint-10")
    assert points[1]["pairs"] == alone["pairs"]
    assert points[0]["pairs"] != points[1]["pairs"]
    lines = (tmp_path / "out" / "card.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["5", "10", "100"]
    assert (tmp_path / "out" / "card.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_as_a_shell_lists_them_are_a_curve_and_two_are_compared(run, evaluate):
    listed = [*sorted(run.glob("checkpoint-*0")), run / "checkpoint-5"]
    listed.remove(run / "checkpoint-200")
    assert [each["step"] for each in evaluate(*listed)["checkpoints"]] == [5, 10, 100]
    assert "differences" in evaluate(*listed[:2])
    assert curve_of([str(run), *map(str, listed)]) is None


def test_several_runs_are_several_curves(run, evaluate, tmp_path):
    other = tmp_path / "other"
    (run / "checkpoint-200").rmdir()
    run.rename(other)
    run.mkdir()
    (other / "checkpoint-5").rename(run / "checkpoint-5")
    (run / "run.json").write_text("{}")
    found = evaluate(run, other, "--checkpoints")["runs"]
    steps = {each["directory"]: [p["step"] for p in each["checkpoints"]] for each in found}
    assert steps == {str(run): [5], str(other): [10, 100]}


def test_the_weights_of_a_complete_run_are_a_point_of_their_own_step(run, config, tokenizer):
    def points():
        return [path.rpartition("/")[2] for path in curve_of([str(run)], expand=True)]

    assert points() == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    record = {"stage": "pretrain", "weights_step": 60, "steps": 120, "weights": "x"}
    (run / "stage.json").write_text(json.dumps(record))
    assert points() == ["checkpoint-5", "checkpoint-10", "run", "checkpoint-100"]
    (run / "stage.json").write_text(json.dumps(record | {"weights_step": 100}))
    assert points() == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]


def test_a_run_without_checkpoints_is_refused(tmp_path, capsys):
    message = failure(capsys, run_cli, "evaluate", tmp_path, "--checkpoints")
    assert "found no checkpoint" in message
