"""`minimind plan`: every figure against an independent account of the same thing."""

import json
import math
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from pipeline import (
    MODEL,
    PAIR_LENGTHS,
    assistant,
    chat_rows,
    document_rows,
    failure,
    pair_rows,
    run_cli,
    run_script,
    short_run,
    user,
    write_model,
)

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.costs.devices import DEVICES
from minimind.costs.memory import memory
from minimind.costs.parameters import empty_model
from minimind.costs.step import Step
from minimind.costs.this_machine import find_device, this_cpu
from minimind.data import formats, lines
from minimind.planning import counting, measuring, planned_runs, plans
from minimind.planning.computing import largest_batch, make_plan
from minimind.stage_directory import read_stage
from minimind.training import plan_callback

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

# The size of a batch


def test_the_largest_batch_fits_and_one_more_does_not(config):
    model, step = empty_model(config), Step(1, 128, precision="bf16")
    usable = 2**28
    largest = largest_batch(model, step, usable)
    assert memory(model, replace(step, batch_size=largest))["peak"] <= usable
    assert memory(model, replace(step, batch_size=largest + 1))["peak"] > usable
    assert largest_batch(model, step, 1000) == 0


# Recipes


DATA = {"pretrain": document_rows, "sft": chat_rows, "lora": chat_rows, "dpo": pair_rows}
DATA["reward"] = pair_rows


def read(tmp_path, stage, words=(), **keys):
    """A recipe in a folder of its stage's name, and as a plan reads it."""
    path = write_recipe(tmp_path, stage, **keys)
    return planned_runs.read_recipes([str(path)], [str(word) for word in words])


def write_recipe(tmp_path, stage, folder=None, **keys):
    path = tmp_path / (folder or stage) / f"{stage}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.fixture
def files(tmp_path, write_jsonl):
    """Data of every stage, and what the tiny recipes have in common."""
    model = write_model(tmp_path / "model.json")
    data = {stage: write_jsonl(f"{stage}.jsonl", rows()) for stage, rows in DATA.items()}
    return types.SimpleNamespace(model=model, **data)


@pytest.fixture
def pipeline(tmp_path, files, tokenizer_dir):
    """Five recipes, each starting from what the one before it writes; none has run."""
    common = {"per_device_train_batch_size": 2, "eval_ratio": 0.2}
    start = {"model_config": files.model, "tokenizer": str(tokenizer_dir), "block_size": 32}
    runs, paths = tmp_path / "runs", {}
    for stage, parent in (
        ("pretrain", None),
        ("sft", "pretrain"),
        ("lora", "sft"),
        ("dpo", "lora"),
        ("reward", "lora"),
    ):
        keys = {"train_files": [getattr(files, stage)], "output_dir": str(runs / stage)} | common
        if parent:
            keys |= PAIR_LENGTHS if stage in ("dpo", "reward") else {"max_length": 64}
            keys |= {"model_name_or_path": str(runs / parent)}
        else:
            keys |= start
        if stage == "lora":
            keys |= {"use_peft": True, "lora_r": 4}
        paths[stage] = write_recipe(tmp_path, stage, **keys)
    return paths


SCRIPTS = {
    "pretrain": "pretrain",
    "sft": "finetune_sft",
    "lora": "finetune_sft",
    "dpo": "train_dpo",
    "reward": "train_reward",
}


def test_steps_and_tokens_are_those_of_the_real_runs(tmp_path, pipeline, monkeypatch):
    planned = {}
    for stage, recipe in pipeline.items():
        words = ["--num_train_epochs", "3", "--gradient_accumulation_steps", "3", "--bf16", "false"]
        (read_back,) = planned_runs.read_recipes([str(recipe)], words)
        planned[stage] = make_plan(read_back, DEVICES["h100"])  # before its parent is written
        run_script(monkeypatch, SCRIPTS[stage], "--config", recipe, *words, "--report_to", "none")
    for stage, plan in planned.items():
        record = read_stage(tmp_path / "runs" / stage)
        assert plan.steps == record["steps"]
        assert plan.tokens == record["tokens_seen"]
        assert plan.rows.exact


def test_a_parent_that_is_still_to_be_written_is_taken_from_the_recipe_that_writes_it(
    tmp_path, pipeline
):
    (recipe,) = planned_runs.read_recipes([str(pipeline["dpo"])], [])
    plan = make_plan(recipe, DEVICES["a100"])
    assert (
        plan.parameters["total"]
        == MiniMindForCausalLM(MiniMindConfig(**MODEL, vocab_size=300)).num_parameters()
    )
    assert any("still to be written" in note and "pretrain.yaml" in note for note in plan.notes)
    pipeline["sft"].unlink()
    with pytest.raises(UserError, match="no such directory"):
        make_plan(*planned_runs.read_recipes([str(pipeline["lora"])], []), DEVICES["a100"])


@pytest.mark.parametrize(
    ("stage", "words", "corpus", "parent"),
    [
        ("pretrain", [], "pretrain", None),
        ("sft", [], "sft", "runs/pretrain"),
        ("sft", ["--use_peft", "true"], "lora", "runs/sft"),
        ("lora", ["--use_peft", "true"], "lora", "runs/sft"),
        ("dpo", [], "dpo", "runs/sft"),
        ("dpo", ["--use_peft", "true"], "dpo", "runs/sft"),
        ("reward", [], "dpo", "runs/sft"),
    ],
)
def test_without_files_and_parent_a_run_has_its_part_of_the_corpus_and_its_stage_before(
    tmp_path, monkeypatch, stage, words, corpus, parent
):
    monkeypatch.chdir(tmp_path)
    for directory in ("runs/pretrain", "runs/sft"):
        Path(directory).mkdir(parents=True)
    (run,) = read(tmp_path, stage, words)
    assert [Path(file).name for file in run.data_args.train_files] == [f"{corpus}.jsonl"]
    assert run.parent == parent


@pytest.mark.parametrize("stage", DATA)
def test_the_stage_is_told_from_folder_keys_or_data(tmp_path, files, stage):
    assert planned_runs.stage_of(write_recipe(tmp_path, stage), []) == stage
    keys = {
        "pretrain": {"block_size": 8},
        "sft": {"packing": False},
        "lora": {"use_peft": True, "packing": True},
        "dpo": {"beta": 0.1, "max_prompt_length": 32},
        "reward": {"center_rewards_coefficient": 0.01},
    }
    given = write_recipe(tmp_path, stage, folder="elsewhere", **keys[stage])
    assert planned_runs.stage_of(given, []) == stage
    data = {"train_files": [getattr(files, stage)]}
    data |= {"use_peft": True} if stage == "lora" else {}
    path = write_recipe(tmp_path, stage, folder="elsewhere", **data)
    assert planned_runs.stage_of(path, []) == ("dpo" if stage == "reward" else stage)


SAMPLED = {
    "pretrain": [{"packing_strategy": "wrapped"}, {"packing_strategy": "bfd_split"}],
    "sft": [{"packing": True}, {"packing": False}],
    "lora": [{"packing": True}],
    "dpo": [{}],
    "reward": [{}],
}


@pytest.mark.parametrize(
    ("stage", "packing"), [(stage, each) for stage, every in SAMPLED.items() for each in every]
)
def test_a_sample_of_large_files_estimates_what_counting_finds(
    tmp_path, write_jsonl, tokenizer_dir, monkeypatch, stage, packing
):
    rows = [row for _ in range(20) for row in DATA[stage]()]
    files = [write_jsonl(f"{stage}{i}.jsonl", rows) for i in range(2)]
    keys = (
        {"block_size": 32, "tokenizer": str(tokenizer_dir)}
        if stage == "pretrain"
        else PAIR_LENGTHS
        if stage in ("dpo", "reward")
        else {"max_length": 64}
    ) | packing
    (recipe,) = read(tmp_path, stage, eval_files=files[:1], train_files=files, **keys)
    tokenizer = recipe.starting_point()[1]
    counted = recipe.rows(tokenizer)
    monkeypatch.setattr(counting, "COUNTED", 0)
    monkeypatch.setattr(counting, "SAMPLE", 2**12)
    for module in (formats, lines):  # a sample ends where a piece that is read at once does
        monkeypatch.setattr(module, "BUFFER", 2**9)
    # Else the prepared rows are found
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "other"))
    sampled = recipe.rows(tokenizer)
    assert counted.exact
    assert not sampled.exact
    assert "estimated" in sampled.how
    assert sampled.tokens == pytest.approx(counted.tokens, rel=0.1)
    assert sampled.rows == pytest.approx(counted.rows, rel=0.1)


def test_a_deepspeed_json_says_stage_and_offloading():
    def options(value):
        return types.SimpleNamespace(deepspeed=value)

    assert planned_runs.deepspeed_of(options(None)) == (None, False, False)
    assert planned_runs.deepspeed_of(options("ds_config_zero2.json")) == (2, False, False)
    offloaded = {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "nvme"},
    }
    assert planned_runs.deepspeed_of(options(json.dumps({"zero_optimization": offloaded}))) == (
        3,
        True,
        True,
    )
    with pytest.raises(UserError, match="no such file"):
        planned_runs.deepspeed_of(options("nowhere.json"))


# The command


def plan_json(capsys, *words):
    capsys.readouterr()
    run_cli("plan", *words, "--json")
    return json.loads(capsys.readouterr().out)


def test_json_has_hours_and_cost_of_each_stage_and_in_all(pipeline, capsys):
    paths = list(pipeline.values())
    words = ["--device", "rtx3090", "--price", "8/h", "--processes", "2"]
    found = plan_json(capsys, *paths, *words, "--num_train_epochs", "4")
    assert [stage["stage"] for stage in found["stages"]] == list(SCRIPTS)
    for stage in found["stages"]:
        seconds = stage["hardware_flops"] / (71e12 * 0.40 * 2)
        assert math.isclose(stage["hours"], seconds / 3600)
        assert math.isclose(stage["cost"], stage["hours"] * 2 * 8)
        assert math.isclose(
            stage["tokens_per_parameter"], stage["tokens"] / stage["parameters"]["total"]
        )
        parts = [value for name, value in stage["memory"].items() if name not in ("peak", "host")]
        assert math.isclose(sum(parts), stage["memory"]["peak"], abs_tol=len(parts))
    assert math.isclose(found["total"]["hours"], sum(stage["hours"] for stage in found["stages"]))
    assert math.isclose(found["total"]["cost"], sum(stage["cost"] for stage in found["stages"]))


def test_each_zero_stage_takes_less_and_the_chosen_one_is_the_plans(pipeline, capsys):
    words = ["--device", "a100", "--processes", "4", "--deepspeed", "ds_config_zero2.json"]
    (stage,) = plan_json(capsys, pipeline["pretrain"], *words)["stages"]
    peaks = list(stage["peak_under"].values())
    assert peaks[:4] == sorted(peaks[:4], reverse=True)
    assert (
        stage["peak_under"]["ZeRO-2, offloading"]
        < stage["peak_under"]["ZeRO-2"]
        == stage["memory"]["peak"]
    )


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3}, "has stage 3"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "offloads the optimizer"),
    ],
)
def test_a_plan_refuses_what_the_run_would_and_shows_no_stage_that_muon_cannot_take(
    pipeline, capsys, tmp_path, zero, expected
):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    words = ["--optim", "muon", "--device", "a100", "--processes", "4", "--deepspeed"]
    message = failure(capsys, run_cli, "plan", pipeline["pretrain"], *words, tmp_path / "zero.json")
    assert expected in message and "--optim adamw_torch_fused" in message
    (stage,) = plan_json(capsys, pipeline["pretrain"], *words, "ds_config_zero2.json")["stages"]
    assert list(stage["peak_under"]) == ["ZeRO-1", "ZeRO-2"]


def test_a_reference_takes_memory_on_the_device_only_where_it_is_kept_there(pipeline, capsys):
    peaks = {}
    for place, words in {
        "reference precomputed": [],
        "reference in memory": ["--precompute_ref_log_probs", "false"],
        "reference on the CPU": ["--precompute_ref_log_probs=false", "--ref_model_on_cpu=true"],
    }.items():
        (recipe,) = planned_runs.read_recipes([str(pipeline["dpo"])], words)
        plan = make_plan(recipe, DEVICES["h100"])
        peaks[place] = plan.memory["peak"]
        weights = 4 * plan.parameters["total"]
        assert plan.memory["reference"] == weights * (place == "reference in memory")
        assert plan.memory["host"] == weights * (place == "reference on the CPU")
        assert plan.peak_with_reference[place] == plan.memory["peak"]
    assert plan.peak_with_reference == peaks
    for words in (["--use_peft", "true"], ["--loss_type", "simpo"]):
        (recipe,) = planned_runs.read_recipes([str(pipeline["dpo"])], words)
        assert make_plan(recipe, DEVICES["h100"]).peak_with_reference == {}


def test_the_table_says_what_is_assumed_and_what_does_not_fit(pipeline, capsys):
    words = ["--device", "rtx4090", "--per_device_train_batch_size", "4000000"]
    run_cli("plan", pipeline["pretrain"], *words)
    said = capsys.readouterr().out
    assert "utilisation 35% ASSUMED" in said
    assert "needs" in said
    assert "--gradient_accumulation_steps" in said


def test_tokens_can_be_given_where_there_is_no_data_yet(pipeline, capsys):
    found = plan_json(capsys, pipeline["pretrain"], "--device", "a100", "--tokens", "1e9")[
        "stages"
    ][0]
    assert found["tokens"] == 10**9
    assert found["steps"] == math.ceil(math.ceil(1e9 / 32) / 2)
    refused = failure(
        capsys, run_cli, "plan", pipeline["sft"], "--device", "a100", "--tokens", "1e9"
    )
    assert "a recipe of pretraining" in refused


def test_steps_that_would_not_fit_are_not_measured(pipeline, capsys):
    words = ["--device", "measured", "--per_device_train_batch_size", "4000000"]
    assert "cannot be run here" in failure(capsys, run_cli, "plan", pipeline["pretrain"], *words)


def test_measured_takes_the_time_of_real_steps(pipeline, capsys, monkeypatch):
    found = {"steps": 5, "seconds_per_step": 0.5, "peak_memory": 10**6}
    monkeypatch.setattr(plans, "measure", lambda recipe: found)
    (stage,) = plan_json(capsys, pipeline["pretrain"], "--device", "measured")["stages"]
    assert stage["measured"] == found
    assert math.isclose(stage["hours"], stage["steps"] * 0.5 / 3600)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--device", "gtx1080"],
            "expected one of rtx3060, rtx3080, rtx3090, rtx4090, rtx4090d, t4,",
        ),
        (["--price", "cheap"], "8/h, $1.50/h, 8 CNY/h or 8元/h"),
        (["--price", "-1"], "expected"),
        (["--processes", "0"], "expected at least 1"),
        (["--device", "h100", "--blocksize", "8"], "Did you mean --block_size?"),
        (["--device", "h100", "--block_size", "many"], "block_size"),
        (["--device", "h100", "--block_size", "100000"], "max_position_embeddings"),
        (["--device", "h100", "--per_device_train_batch_size", "0"], "expected at least 1"),
    ],
)
def test_a_mistake_is_one_message(pipeline, capsys, words, said):
    assert said in failure(capsys, run_cli, "plan", pipeline["pretrain"], *words)


def test_a_recipe_that_is_none_is_one_message(tmp_path, capsys):
    assert "no such file" in failure(
        capsys, run_cli, "plan", tmp_path / "nowhere.yaml", "--device", "h100"
    )
    unclear = write_recipe(tmp_path, "sft", folder="elsewhere", num_train_epochs=1)
    assert "--stage" in failure(capsys, run_cli, "plan", unclear, "--device", "h100")


def test_a_card_without_bf16_is_planned_in_what_it_has(pipeline, capsys):
    def precision(*words):
        return plan_json(capsys, pipeline["pretrain"], "--device", "v100", *words)["stages"][0]

    assert precision()["precision"] == "fp32"  # as a run there chooses
    assert any("--fp16 true is faster" in note for note in precision()["notes"])
    assert precision("--fp16", "true")["precision"] == "fp16"
    assert (
        plan_json(capsys, pipeline["pretrain"], "--device", "a10")["stages"][0]["precision"]
        == "bf16"
    )
    refused = failure(
        capsys, run_cli, "plan", pipeline["pretrain"], "--device", "t4", "--bf16", "true"
    )
    assert "T4 cannot compute in it. Give --bf16 false --fp16 true" in refused


def test_the_table_says_in_words_what_is_held_at_another_moment(pipeline, capsys):
    run_cli("plan", pipeline["pretrain"], "--device", "4090", "--per_device_train_batch_size", "64")
    said = capsys.readouterr().out
    assert "gradients, at another moment" in said
    assert "20 tokens for each parameter" in said
    assert "bracket" not in said


# The laptop's recipes, on two cores as `matmul_peak` finds them idle: one kind without bf16, one
# with.
CORES = {
    "without": replace(
        find_device("h100"), kind="cpu", peak_half=78e9, peak_fp32=78e9, utilisation=0.5
    )
}
CORES["with"] = replace(CORES["without"], peak_half=420e9)


def test_the_recipes_for_a_laptop_take_the_time_that_they_say_an_evening_in_all(write_jsonl):
    hours = dict.fromkeys(CORES, 0.0)
    text = "the fox runs home " * 16
    chats = [{"messages": [user(str(number)), assistant(text)]} for number in range(480)]
    rows = {"pretrain": [{"text": text}] * 480, "sft": chats, "lora": chats}
    for stage in DATA:
        path = f"configs/{stage}/laptop.yaml"
        data = ["--train_files", write_jsonl(f"{stage}.jsonl", rows.get(stage) or pair_rows())]
        said = re.search(
            r"about (\d+ \w+).*, or (\d+ \w+) where they have bf16", Path(path).read_text()
        ).groups()
        for (kind, device), time in zip(CORES.items(), said, strict=True):
            plan = make_plan(*planned_runs.read_recipes([path], data), device)
            hours[kind] += plan.hours
            assert 5e6 < plan.parameters["total"] < 10e6
            number, unit = time.split()
            if stage not in (
                "dpo",
                "reward",
            ):  # how long a step of pairs takes is for the data to say
                assert plan.hours == pytest.approx(int(number) / {"h": 1, "min": 60}[unit], rel=0.2)
    assert max(hours.values()) < 5


# A run against its plan


@pytest.mark.slow
def test_the_peak_of_a_real_run_is_within_15_percent_of_the_planned_one(tmp_path, monkeypatch):
    # Each tensor a mapping: resident memory is that of tensors
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.chdir(Path(__file__).parent.parent)
    words = "--per_device_train_batch_size 8 --bf16 false --optim muon"
    (recipe,) = read(
        tmp_path, "pretrain", words.split(), model_config="configs/model/tiny.json", block_size=256
    )
    found = measuring.measure(recipe, steps=2)
    assert make_plan(recipe, this_cpu()).memory["peak"] == pytest.approx(
        found["peak_memory"], rel=0.15
    )
    assert found["seconds_per_step"] > 0


def run_with_plan(monkeypatch, tmp_path, files, tokenizer_dir):
    options = {"max_steps": 6, "block_size": 32, "logging_steps": 2}
    words = ["--train_files", files.pretrain, "--model_config", files.model]
    words += ["--tokenizer", tokenizer_dir, *short_run(tmp_path / "out", **options)]
    run_script(monkeypatch, "pretrain", *words)
    entries = [
        json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines()
    ]
    return [entry for entry in entries if "plan/mfu" in entry]


def test_the_first_steps_of_a_run_are_compared_with_the_plan_once(
    monkeypatch, tmp_path, files, tokenizer_dir, capsys
):
    (entry,) = run_with_plan(monkeypatch, tmp_path, files, tokenizer_dir)
    assert entry["step"] == 6
    assert entry["plan/seconds_per_step"] > 0
    assert entry["plan/seconds_per_step_planned"] > 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: ")]
    assert len(said) == 1
    assert "over the first 6 steps" in said[0]


def test_a_comparison_that_fails_does_not_end_the_run(
    monkeypatch, tmp_path, files, tokenizer_dir, capsys
):
    def broken():
        raise RuntimeError("no such card")

    monkeypatch.setattr(plan_callback, "this_device", broken)
    assert not run_with_plan(monkeypatch, tmp_path, files, tokenizer_dir)
    assert "cannot be compared with one (RuntimeError: no such card)" in capsys.readouterr().out
    assert read_stage(tmp_path / "out")["steps"] == 6


def test_a_report_in_json_has_stdout_for_itself_whatever_the_libraries_say():
    """In a process of its own: what is said is said on import."""
    words = [
        sys.executable,
        "-m",
        "minimind.cli",
        "plan",
        "configs/pretrain/quickstart.yaml",
        "--tokens",
        "1e6",
        "--device",
        "h100",
    ]
    environment = os.environ | {"WANDB_MODE": "offline"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*words, "--json"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]
