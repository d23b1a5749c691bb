"""The first lines of scripts/quickstart.sh: which kind of machine this is, and about how long it
takes there."""

from pathlib import Path

import pytest
import torch

from minimind import quickstart
from minimind.common.recipes import read_recipe


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(quickstart, "prepare_launch", lambda uses_deepspeed: None)


@pytest.mark.parametrize(
    ("fast", "said"), [(True, "with bf16: training computes in bf16"), (False, "without bf16")]
)
def test_the_first_lines_name_the_kind_of_machine_and_the_time_from_a_measured_step(
    monkeypatch, capsys, fast, said
):
    monkeypatch.setattr(quickstart, "bf16_is_fast", lambda: fast)
    monkeypatch.setattr(quickstart, "seconds_of_a_step", lambda recipe: 2.0)
    monkeypatch.setattr(quickstart, "seen_reasons", lambda *given: ["a busy process"])
    monkeypatch.setattr(quickstart.time, "time", lambda: 110.0)
    quickstart.introduce(started=100.0)
    machine, time, advice = capsys.readouterr().out.splitlines()[-3:]
    assert machine.startswith(f"This machine: {quickstart.processor()}, ")
    assert said in machine
    # 8 times 10 s of starting, and 250 + 127.5 + 52.5 + 96 + 96 steps of 2 s: 1,324 s
    assert time.startswith(
        "A pretraining step takes 2 s just now, and all stages are worth 622 of them: about 22 min"
    )
    assert advice == "It could be faster: a busy process."


def test_the_measured_step_is_one_of_the_recipe(monkeypatch):
    recipe = read_recipe("configs/pretrain/quickstart.yaml") | {
        "per_device_train_batch_size": 1,
        "block_size": 8,
    }
    shapes = []
    draw = torch.randint

    def watched(low, high, size, **options):
        shapes.append(tuple(size))
        return draw(low, high, size, **options)

    monkeypatch.setattr(torch, "randint", watched)
    assert quickstart.seconds_of_a_step(recipe, seconds=0.0) > 0
    assert shapes == [(1, 8)]


def test_the_vocabulary_of_the_measured_step_is_the_one_that_the_script_trains():
    assert f"--vocab_size {quickstart.VOCABULARY}" in Path("scripts/quickstart.sh").read_text()
