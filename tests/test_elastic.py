"""A run that another number of processes continues takes the same rows, and ends where the
undisturbed one does."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipeline import NAMES, short_run, write_model

from minimind.common.errors import UserError
from minimind.training.elastic import RowSplit, check_world_size, saved_processes

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
needs_deepspeed = pytest.mark.skipif(
    not (BIN / "deepspeed").exists(), reason="DeepSpeed is not installed"
)


def resized(path, first, wrote, processes, **options):
    """Sizes that `check_world_size` chooses for a run that began as `first` and whose checkpoint
    `wrote` processes."""
    path.mkdir()
    for name in (
        ["rng_state.pth"] if wrote == 1 else [f"rng_state_{rank}.pth" for rank in range(wrote)]
    ):
        (path / name).touch()
    names = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    saved = dict(zip(names, first, strict=True))
    options = {"optim": "adamw_torch_fused", "deepspeed": None, "use_muon": False} | options
    args = SimpleNamespace(resume_from_checkpoint=str(path), **options)
    check_world_size(saved, {"processes": processes}, args)
    return args.per_device_train_batch_size, args.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("first", "processes", "sizes"),
    [
        ((1, 8, 4), 2, (8, 2)),
        ((2, 8, 2), 1, (8, 4)),
        ((2, 4, 2), 4, (4, 1)),
        ((1, 8, 1), 2, (4, 1)),  # no accumulation left to divide: smaller micro-batches
        ((1, 8, 3), 4, (6, 1)),
        ((3, 4, 1), 2, (3, 2)),
    ],
)
def test_the_rows_of_a_step_stay_the_same(first, processes, sizes, tmp_path):
    assert resized(tmp_path / "checkpoint-2", first, first[0], processes) == sizes


def test_back_at_the_first_number_of_processes_a_step_is_shared_as_at_first(tmp_path):
    assert resized(tmp_path / "checkpoint-2", (2, 8, 3), 3, 2) == (8, 3)


def test_every_division_that_is_possible_is_found_and_keeps_the_rows():
    for *numbers, now in itertools.product((1, 2, 3, 4), (1, 3, 8), (1, 2, 5), (1, 2, 3, 6)):
        saved = RowSplit(*numbers)
        found = saved.shared_by(now)
        assert (found is None) == (saved.rows % now != 0)
        if found:
            assert found.rows == saved.rows
            assert found.per_device_train_batch_size <= saved.per_device_train_batch_size


def test_a_batch_that_cannot_be_divided_is_one_error_with_the_numbers_that_work(tmp_path):
    with pytest.raises(
        UserError, match=r"8 rows .* 3 processes cannot share evenly. Start 1, 2, 4 or 8 processes"
    ):
        resized(tmp_path / "checkpoint-2", (2, 2, 2), 2, 3)


def test_an_optimizer_whose_shards_cannot_be_converted_keeps_its_number_of_processes(tmp_path):
    with pytest.raises(UserError, match=r"lion_32bit cannot be redistributed.*Start 2 processes"):
        resized(
            tmp_path / "checkpoint-2",
            (2, 2, 2),
            2,
            1,
            deepspeed="ds_config_zero2.json",
            optim="lion_32bit",
        )


# --- with a launcher
# -----------------------------------------------------------------------------------------------

STEPS = 60
ROWS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tokenizer_dir):
    """Start pretrain.py with some processes; returns its losses by step, its directory and what it
    printed."""
    root = tmp_path_factory.mktemp("elastic")
    words = random.Random(0)
    rows = [
        {"text": " ".join(words.choices([*NAMES, "runs", "sleeps", "狐狸", "回家"], k=40))}
        for _ in range(200)
    ]
    (root / "docs.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    data = [
        "--model_config",
        write_model(root / "model.json"),
        "--tokenizer",
        tokenizer_dir,
        "--train_files",
    ]
    data += [root / "docs.jsonl", "--block_size", "32", "--eval_ratio", "0.1"]
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "MINIMIND_CACHE": str(root / "cache"),
    }
    environment |= {"OMP_NUM_THREADS": "1"}

    def run(name, processes, *extra, fails=False, **options):
        options = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 2e-3} | options
        options = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 10} | options
        launcher = (
            [sys.executable]
            if processes == 1
            else ["torchrun", "--standalone", "--nproc_per_node", processes]
        )
        command = [*launcher, "pretrain.py", *short_run(root / name, **options), *data, *extra]
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if fails:
            assert done.returncode != 0
            return done.stderr
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        log = [
            json.loads(line) for line in (root / name / "train_log.jsonl").read_text().splitlines()
        ]
        return (
            {entry["step"]: entry["loss"] for entry in log if "loss" in entry},
            root / name,
            done.stdout,
        )

    return run


def assert_continues(losses, undisturbed):
    """A continued run has all steps in its log, the former process's too."""
    assert list(losses) == list(range(1, STEPS + 1))
    assert max(abs(loss - undisturbed[step]) for step, loss in losses.items()) < 1e-3


@pytest.mark.slow
@pytest.mark.launcher
def test_one_two_and_one_process_again_continue_one_curve(launch):
    undisturbed, one, _ = launch("one", 1, **ROWS)
    losses, two, said = launch("two", 2, "--resume_from_checkpoint", one / "checkpoint-10", **ROWS)
    assert "and continues with 4 rows (2 x 1 accumulation x 2 processes)" in said
    assert saved_processes(two / "checkpoint-20") == 2
    assert_continues(losses, undisturbed)
    losses, _, said = launch("again", 1, "--resume_from_checkpoint", two / "checkpoint-30", **ROWS)
    assert "and continues with 4 rows (2 x 2 accumulation x 1 process)" in said
    assert_continues(losses, undisturbed)


@pytest.mark.slow
@pytest.mark.launcher
@needs_deepspeed
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_two_one_and_four_processes_continue_one_curve_under_zero_2(launch, optim):
    zero = ("--deepspeed", "ds_config_zero2.json", "--optim", optim)
    undisturbed, two, _ = launch(f"zero2-{optim}", 2, *zero, **ROWS)
    losses, one, said = launch(
        f"zero1-{optim}", 1, *zero, "--resume_from_checkpoint", two / "checkpoint-10", **ROWS
    )
    assert "and continues with 8 rows (2 x 4 accumulation x 1 process)" in said
    assert_continues(losses, undisturbed)
    losses, four, said = launch(
        f"zero4-{optim}", 4, *zero, "--resume_from_checkpoint", one / "checkpoint-20", **ROWS
    )
    assert "and continues with 8 rows (2 x 1 accumulation x 4 processes)" in said
    assert_continues(losses, undisturbed)
    assert not list(one.glob(".universal*"))  # the converted copy is gone
    assert len(list(four.glob("checkpoint-30/global_step30/*optim_states.pt"))) == 4


@pytest.mark.slow
@pytest.mark.launcher
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_muon_under_zero_is_the_plain_runs_and_resumes_exactly(launch, tmp_path, stage):
    zero = json.loads((ROOT / "ds_config_zero2.json").read_text())
    zero["zero_optimization"]["stage"] = stage
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    words = ("--deepspeed", tmp_path / "zero.json", "--on_findings", "warn")
    options = {"optim": "muon", "bf16": "false", "max_steps": 20, "max_grad_norm": 0.5} | ROWS
    plain, _, _ = launch(f"plain{stage}", 1, **options | {"per_device_train_batch_size": 4})
    losses, whole, _ = launch(f"muon{stage}", 2, *words, **options)
    assert list(losses) == list(plain)
    assert max(abs(loss - plain[step]) for step, loss in losses.items()) < 1e-3
    assert plain[1] - plain[20] > 1
    resume = ("--resume_from_checkpoint", whole / "checkpoint-10")
    _, resumed, _ = launch(f"resumed{stage}", 2, *words, *resume, **options)
    ends = [(directory / "model.safetensors").read_bytes() for directory in (whole, resumed)]
    assert ends[0] == ends[1]
