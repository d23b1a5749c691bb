"""Every launcher line of the README, started as a user would, with processes of its own; and what
two processes compute."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from pipeline import (
    MODEL,
    PAIR_LENGTHS,
    at_free_port,
    chat_rows,
    document_rows,
    minimal_pair_rows,
    pair_rows,
    run_script,
    short_run,
    write_model,
)
from ranks import run_ranks, start, until_done

from minimind.common.launch import release_shared_buffers
from minimind.evaluation.scoring import ModelSubject
from minimind.generation import load_for_generation
from minimind.score_card import PairsTask, read_pairs
from minimind.stage_directory import read_stage

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DEEPSPEED = ("--deepspeed", "ds_config_zero2.json")
STEPS = 6
RECIPE = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
}
# Of two processes, in one
WHOLE_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}

needs_deepspeed = pytest.mark.skipif(
    not (BIN / "deepspeed").exists(), reason="DeepSpeed is not installed"
)
pytestmark = [
    pytest.mark.launcher,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_dir):
    """Data files, a model JSON and a cache; stages are written beside them."""
    root = tmp_path_factory.mktemp("launch")
    # Two more pairs, so that those of an epoch's last micro-batch differ in number between two
    # processes.
    pairs = [
        *pair_rows(),
        *({"prompt": f"who sleeps? {i}", "chosen": "the fox", "rejected": "no"} for i in range(2)),
    ]
    files = {"docs": document_rows(), "chats": chat_rows(), "pairs": pairs}
    for name, rows in (files | {"minimal_pairs": minimal_pair_rows()}).items():
        (root / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        )
    write_model(root / "model.json")
    return root


def stage_words(world, tokenizer_dir, output, script, options):
    """Options of a stage with its data."""
    if script == "pretrain.py":
        config = options.pop("model_config", world / "model.json")
        data = ["--model_config", config, "--tokenizer", tokenizer_dir, "--train_files"]
        data += [world / "docs.jsonl", "--block_size", "32"]
    else:
        parent, rows = ("pretrain", "chats") if script == "finetune_sft.py" else ("sft", "pairs")
        data = [
            "--model_name_or_path",
            world / parent,
            "--train_files",
            world / f"{rows}.jsonl",
        ]
        options = ({"max_length": 64} if rows == "chats" else PAIR_LENGTHS) | options
    return *short_run(output, **RECIPE | options), *data, "--eval_ratio", "0.2"


def launch(world, tokenizer_dir, *command, **options):
    """Run a command in the project's root, a stage's data and options included; returns what it
    printed."""
    script = next(word for word in command if word.endswith(".py"))
    output = Path(tempfile.mkdtemp(dir=world)) / "run"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "WORLD_SIZE"))
    }
    environment |= {
        "MINIMIND_CACHE": str(world / "cache"),
        "PATH": f"{BIN}{os.pathsep}{environment['PATH']}",
    }
    words = [*at_free_port(*command), *stage_words(world, tokenizer_dir, output, script, options)]
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output, done.stdout


def run_here(world, tokenizer_dir, script, *argv, **options):
    """The same stage in this process alone; returns its directory."""
    output = Path(tempfile.mkdtemp(dir=world)) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(world / "cache"))
        words = stage_words(world, tokenizer_dir, output, script, options)
        run_script(patch, script.removesuffix(".py"), *argv, *words)
    return output


@pytest.fixture(scope="module")
def pretrained(world, tokenizer_dir):
    """pretrain.py under `deepspeed` with two processes, which the other stages start from.

    It takes what a launcher could break: another schedule, another optimizer, the best of its
    models, samples, early stopping, minimal pairs.
    """
    options = {"lr_scheduler_type": "warmup_stable_decay", "lr_decay_steps": 0.5, "sample_steps": 2}
    options |= {"optim": "muon"}
    options |= {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "early_stopping_patience": 3,
        "sample_tokens": 4,
        "eval_pairs": world / "minimal_pairs.jsonl",
    }
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        "pretrain.py",
        *DEEPSPEED,
        "--load_best_model_at_end",
    ]
    output, said = launch(world, tokenizer_dir, *command, **options)
    output.rename(world / "pretrain")
    return world / "pretrain", said


def run_pair(world, tokenizer_dir, script, **options):
    """Run two processes under DeepSpeed as its launcher starts them; returns what they printed."""
    output = Path(tempfile.mkdtemp(dir=world)) / "run"
    words = stage_words(world, tokenizer_dir, output, script, options)
    return output, run_ranks(script, *DEEPSPEED, *words, log=output.with_suffix(".log"))


@pytest.fixture(scope="module")
def tuned(pretrained, world, tokenizer_dir):
    output, said = run_pair(world, tokenizer_dir, "finetune_sft.py")
    output.rename(world / "sft")
    return world / "sft", said


def log_of(stage):
    return [json.loads(line) for line in (stage / "train_log.jsonl").read_text().splitlines()]


def expected_rates():
    """Linear warm-up over 2 steps to the peak, then cosine to a tenth."""
    cosine = [
        0.1 + 0.9 * (1 + math.cos(math.pi * step / (STEPS - 2))) / 2 for step in range(STEPS - 2)
    ]
    return [RECIPE["learning_rate"] * factor for factor in (1 / 2, 1, *cosine)]


@needs_deepspeed
def test_pretraining_under_deepspeed_with_two_processes_uses_its_engine(pretrained):
    _, said = pretrained
    assert "fp32, cpu x 2, DeepSpeed" in said


def test_the_shared_buffers_of_a_run_lose_their_names_and_those_of_others_keep_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("minimind.common.launch.SHARED_MEMORY", tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    own, other = (f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{p}" for p in (29500, 29501))
    for name in (own, other):
        for rank in (0, 1):
            (tmp_path / f"{name}_{rank}").touch()
    release_shared_buffers()
    assert {path.name for path in tmp_path.iterdir()} == {f"{other}_0", f"{other}_1"}


@needs_deepspeed
def test_the_learning_rate_of_every_step_follows_the_recipe_under_deepspeed(pretrained, tuned):
    factors = [1 / 2, 1, 1, *(1 - (step / 3) ** 0.5 for step in range(3))]  # warm-up, stable, decay
    expected = {
        pretrained[0]: [RECIPE["learning_rate"] * factor for factor in factors],
        tuned[0]: expected_rates(),
    }
    for stage, rates in expected.items():
        assert [
            entry["learning_rate"] for entry in log_of(stage) if "loss" in entry
        ] == pytest.approx(rates, rel=1e-6)


@needs_deepspeed
def test_a_run_keeps_its_best_model_and_shows_samples_under_deepspeed(pretrained):
    stage, said = pretrained
    losses = {
        entry["step"]: entry["eval_loss"] for entry in log_of(stage)[:-1] if "eval_loss" in entry
    }
    record = read_stage(stage)
    assert record["best"]["value"] == min(losses.values())
    assert record["metrics"]["after"]["loss"] == pytest.approx(record["best"]["value"], abs=1e-5)
    samples = [
        json.loads(line)["step"] for line in (stage / "samples.jsonl").read_text().splitlines()
    ]
    assert samples == [2] * 4 + [4] * 4 + [6] * 4
    assert said.count("samples after step 2") == 1  # one process speaks


def has_pair_metrics(stage, file):
    """Whether a stage records what its model scores on a file of minimal pairs."""
    found = PairsTask(read_pairs([str(file)])).run(ModelSubject(*load_for_generation(stage)))
    after = read_stage(stage)["metrics"]["after"]
    return all(after[f"pairs_{form}"] == found.section["all"][form] for form in ("sum", "mean"))


@needs_deepspeed
def test_processes_that_share_the_minimal_pairs_find_what_one_finds(pretrained, world):
    assert has_pair_metrics(pretrained[0], world / "minimal_pairs.jsonl")


@needs_deepspeed
def test_a_stage_written_under_zero_2_holds_tied_weights_once(pretrained):
    from safetensors import safe_open

    with safe_open(pretrained[0] / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)


@needs_deepspeed
def test_sft_and_dpo_run_under_deepspeed_with_two_processes(tuned, world, tokenizer_dir):
    assert "cpu x 2, DeepSpeed" in tuned[1]
    pairs = world / "minimal_pairs.jsonl"
    stage, said = run_pair(world, tokenizer_dir, "train_dpo.py", eval_pairs=pairs)
    assert has_pair_metrics(stage, pairs)
    assert "cpu x 2, DeepSpeed" in said
    assert read_stage(stage)["data"]["train"]["rows"] % 4 == 3
    first = next(entry["loss"] for entry in log_of(stage) if "loss" in entry)
    assert first == pytest.approx(0.693147, abs=1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            ["accelerate", "launch", "--num_processes", "1", "pretrain.py"], marks=pytest.mark.slow
        ),
        ["torchrun", "--nproc_per_node", "1", "pretrain.py"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_the_other_launchers_start_deepspeed(command, world, tokenizer_dir):
    _, said = launch(world, tokenizer_dir, *command, *DEEPSPEED)
    assert "cpu x 1, DeepSpeed" in said


@needs_deepspeed
def test_a_process_without_a_launcher_trains_an_adapter_under_deepspeed(
    pretrained, world, tokenizer_dir
):
    output = Path(tempfile.mkdtemp(dir=world)) / "run"
    words = stage_words(world, tokenizer_dir, output, "finetune_sft.py", {})
    log = output.with_suffix(".log")
    process = start("finetune_sft.py", "--use_peft", *DEEPSPEED, *words, log=log)
    assert "cpu x 1, DeepSpeed" in until_done(process, log=log)


@pytest.mark.slow
def test_a_mixture_of_experts_learns_the_same_in_two_processes_as_in_one(world, tokenizer_dir):
    """The router's loss weighs a hundred times its usual: counted per rank or micro-batch it could
    not be missed."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "seq_aux": True, "router_aux_loss_coef": 1.0}
    (world / "moe.json").write_text(json.dumps(MODEL | moe))
    options = {"model_config": world / "moe.json"}
    two, said = launch(
        world, tokenizer_dir, "torchrun", "--nproc_per_node", "2", "pretrain.py", **options
    )
    assert "cpu x 2, plain" in said
    one = run_here(world, tokenizer_dir, "pretrain.py", **options | WHOLE_BATCH)
    for key in ("loss", "grad_norm"):
        values = [
            [entry[key] for entry in log_of(stage) if "loss" in entry] for stage in (two, one)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert any(key.startswith("router_load/") for key in log_of(two)[-3])


@pytest.fixture
def weighted_chats(world):
    """Weights that differ a hundredfold between rows, in place of the other tests' rows."""
    file, rows = world / "chats.jsonl", chat_rows()
    before = file.read_text()
    rows = [{**row, "weight": [0.1, 10][index % 2]} for index, row in enumerate(rows)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    yield
    file.write_text(before)


@pytest.mark.slow
def test_weighted_losses_are_the_same_in_two_processes_as_in_one(
    world, tokenizer_dir, weighted_chats
):
    """A denominator per rank or micro-batch could not be missed."""
    if not (world / "pretrain").exists():
        run_here(world, tokenizer_dir, "pretrain.py").rename(world / "pretrain")
    weighted = (
        "--weighted_loss",
        "true",
        "--loss_normalization",
        "conversation",
        "--packing",
        "false",
    )
    two, said = launch(
        world, tokenizer_dir, "torchrun", "--nproc_per_node", "2", "finetune_sft.py", *weighted
    )
    assert "cpu x 2, plain" in said
    one = run_here(world, tokenizer_dir, "finetune_sft.py", *weighted, **WHOLE_BATCH)
    for key in ("loss", "grad_norm"):
        values = [
            [entry[key] for entry in log_of(stage) if "loss" in entry] for stage in (two, one)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("torchrun", "--nproc_per_node", "2", "train_reward.py"),
        pytest.param(
            ("deepspeed", "--num_accelerators", "2", "train_reward.py", *DEEPSPEED),
            marks=needs_deepspeed,
        ),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_a_reward_model_learns_the_same_in_two_processes_as_in_one(command, world, tokenizer_dir):
    for script, stage in (("pretrain.py", "pretrain"), ("finetune_sft.py", "sft")):
        if not (world / stage).exists():
            run_here(world, tokenizer_dir, script).rename(world / stage)
    # An epoch's last rows are not divided, so that each process has as many
    step = {"max_steps": 1, "warmup_steps": 0}
    two, said = launch(world, tokenizer_dir, *command, **step)
    assert "cpu x 2" in said
    one = run_here(world, tokenizer_dir, "train_reward.py", **step | WHOLE_BATCH)
    for key in ("loss", "accuracy", "margin", "grad_norm"):
        values = [next(e[key] for e in log_of(stage) if "loss" in e) for stage in (two, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)
    metrics = [read_stage(stage)["metrics"]["after"] for stage in (two, one)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-4)
