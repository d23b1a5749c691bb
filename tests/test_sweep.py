"""benchmarks/sweep.py, with a script that records what it was given in place of a stage's."""

import json
import sys

import pytest

from benchmarks import sweep

# Loss = learning rate + seed; a rate of 0.9 diverges, one of 0.8 is refused
SCRIPT = """
import json, pathlib, sys
options = dict(word.removeprefix("--").split("=") for word in sys.argv if "=" in word)
directory = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
rate = float(options["learning_rate"])
directory.mkdir()
if rate != 0.8:
    (directory / "train_log.jsonl").touch()
if rate >= 0.8:
    sys.exit("error: at this rate nothing can be done")
metrics = {"before": {"loss": 5.0}, "after": {"loss": rate + int(options["seed"])}}
record = {"seconds": 1.0, "metrics": metrics, "options": options}
(directory / "stage.json").write_text(json.dumps(record))
"""


@pytest.fixture
def run_sweep(tmp_path, monkeypatch, capsys):
    (tmp_path / "finetune_sft.py").write_text(SCRIPT)
    (tmp_path / "sft").mkdir()
    recipe = tmp_path / "sft" / "small.yaml"
    recipe.write_text("weight_decay: 0.1\n")
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    started = []
    subprocess_run = sweep.subprocess.run
    monkeypatch.setattr(
        sweep.subprocess, "run", lambda *a, **k: started.append(a) or subprocess_run(*a, **k)
    )

    def run(*words):
        started.clear()
        output = ["--output", str(tmp_path / "results.jsonl")]
        monkeypatch.setattr(sys, "argv", ["sweep.py", str(recipe), *output, *words])
        sweep.main()
        return capsys.readouterr().out.splitlines(), len(started)

    return run


def test_the_best_setting_is_first_with_its_mean_and_range(run_sweep):
    lines, _ = run_sweep("--set", "learning_rate=0.3,0.1,0.9", "--seeds", "2", "--jobs", "2")
    assert [line.split()[0] for line in lines] == [
        "setting",
        "before",
        "learning_rate=0.1",
        "learning_rate=0.3",
        "learning_rate=0.9",
    ]
    assert "5.0000" in lines[1]
    assert lines[2].split()[1:6] == ["2/2", "0.6000", "(0.1000", "-", "1.1000)"]
    assert lines[4].split(maxsplit=3)[1:] == ["0/2", "-", "at this rate nothing can be done"]


def test_a_second_call_runs_what_is_missing_and_what_failed(run_sweep, tmp_path):
    options = ["--set", "learning_rate=0.1,0.9"]
    assert run_sweep(*options)[1] == 2
    results = tmp_path / "results.jsonl"
    assert [json.loads(line)["run"] for line in results.read_text().splitlines()]
    assert run_sweep(*options)[1] == 1  # the one that failed
    results.write_text(results.read_text() + '{"set": {"learning')  # killed in writing
    lines, started = run_sweep(*options, "--seeds", "2")
    assert started == 3  # that one, and both of the second seed
    assert lines[2].split()[:2] == ["learning_rate=0.1", "2/2"]
    # Another recipe is another run
    (tmp_path / "sft" / "small.yaml").write_text("weight_decay: 0.2\n")
    assert run_sweep("--set", "learning_rate=0.1")[1] == 1


@pytest.mark.parametrize("words", [["--seed=5"], ["--set", "seed=5"]], ids=" ".join)
def test_a_seed_that_is_given_is_that_of_the_run(run_sweep, words):
    lines, started = run_sweep("--set", "learning_rate=0.1", *words)
    assert started == 1
    assert "5.1000" in lines[2]


@pytest.mark.parametrize(
    ("setting", "message", "runs"),
    [
        ("learning_rte=1,2", "unknown option --learning_rte", 0),
        ("learning_rate=0.1,fast", "--learning_rate", 0),
        ("learning_rate", "--set learning_rate: expected NAME=VALUE", 0),
        ("learning_rate=0.8", "at this rate nothing can be done", 1),
    ],
)
def test_what_the_script_refuses_is_said_once(run_sweep, tmp_path, capsys, setting, message, runs):
    with pytest.raises(SystemExit) as stopped:
        run_sweep("--set", setting, "--seeds", "3")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count(message) == 1
    assert not (tmp_path / "results.jsonl").exists()
