"""scripts/quickstart.sh: which kind of machine this is, about how long it takes there, and how its
stages are run."""

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
    monkeypatch.setattr(quickstart, "FORKS", True)
    monkeypatch.setattr(quickstart.time, "time", lambda: 1300.0)
    quickstart.introduce(started=100.0)
    machine, time, advice = capsys.readouterr().out.splitlines()[-3:]
    assert machine.startswith(f"This machine: {quickstart.processor()}, ")
    assert said in machine
    # 20 min of loading, here once, and 250 + 82.5 + 52.5 + 96 + 96 steps of 2 s: 2,354 s
    assert time.startswith(
        "A pretraining step takes 2 s just now, and all stages are worth 577 of them: about 39 min"
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


def test_stages_run_in_order_until_one_fails_and_finished_ones_are_left_out(
    tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(quickstart, "FORKS", False)  # no fork of the process that runs the tests
    for name, code in (("first", 0), ("second", 0), ("third", 5), ("last", 0)):
        (tmp_path / f"{name}.py").write_text(f"import sys\nprint(sys.argv)\nsys.exit({code})")
    (tmp_path / "second.json").touch()
    lines = [
        f"{name} {tmp_path}/{name}.json python {tmp_path}/{name}.py --option 'two words'"
        for name in ("first", "second", "third", "last")
    ]
    with pytest.raises(SystemExit) as ended:
        quickstart.run_stages(lines)
    assert ended.value.code == 5
    said = [line for line in capfd.readouterr().out.splitlines() if line]
    expected = []
    for name in ("first", "third"):
        words = [f"{tmp_path}/{name}.py", "--option", "two words"]
        expected += [f"== {name}: python {words[0]} --option 'two words'", str(words)]
    expected.insert(2, f"== second: finished before ({tmp_path}/second.json)")
    assert said == expected
