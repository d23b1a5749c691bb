"""`minimind plan`: every figure against an independent account of the same thing."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from pipeline import (
    MODEL,
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
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.utils import add_fused_lm_head

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.costs.devices import DEVICES, find_card, find_device, parse_price, this_cpu
from minimind.costs.step import (
    Step,
    empty_model,
    evaluation_memory,
    flops,
    memory,
    model_states,
    parameter_counts,
    saved_per_token,
)
from minimind.planning import counting, measuring, planned_runs
from minimind.planning.plans import largest_batch, make_plan
from minimind.stage_directory import read_stage
from minimind.training.optimizers import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 410,
}
VARIANTS = {
    "dense": {},
    "no qk_norm": {"qk_norm": False},
    "untied": {"tie_word_embeddings": False},
    "experts": {"num_experts": 4, "moe_intermediate_size": 48},
    "shared experts": {"num_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1},
}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def configuration(variant="dense", **fields):
    return MiniMindConfig(**{**SHAPE, **VARIANTS[variant], **fields})


def real_model(config, adapter=None, attention="sdpa", checkpointing=False):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config)
    model.set_attn_implementation(attention)
    if adapter:
        model = get_peft_model(model, adapter)
    if checkpointing:
        if adapter:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model.train()


# Parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_real_model(variant):
    config = configuration(variant)
    model = real_model(config)
    counts = parameter_counts(empty_model(config))
    assert counts["total"] == counts["trained"] == model.num_parameters()
    assert counts["embedding"] == model.get_input_embeddings().weight.numel()


def test_active_parameters_are_those_of_a_model_with_the_visited_experts_alone():
    config = configuration("shared experts")
    visited = MiniMindForCausalLM(
        configuration("shared experts", num_experts=config.num_experts_per_tok)
    )
    routers = (
        (config.num_experts - config.num_experts_per_tok)
        * config.hidden_size
        * config.num_hidden_layers
    )
    assert parameter_counts(empty_model(config))["active"] == visited.num_parameters() + routers


def test_an_adapter_trains_rank_times_both_widths_of_each_linear_layer():
    config = configuration()
    linear = [
        m
        for name, m in real_model(config).named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    ]
    expected = sum(4 * (m.in_features + m.out_features) for m in linear)
    assert parameter_counts(empty_model(config, LORA))["trained"] == expected


# FLOPs


@pytest.mark.parametrize("variant", ["dense", "experts", "shared experts"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_are_those_that_torch_counts(variant, adapter, checkpointing, attention):
    config = configuration(variant)
    model = real_model(config, adapter, attention, checkpointing)
    ids = torch.randint(3, 400, (2, 200))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    step = Step(2, 200, attention=attention, checkpointing=checkpointing)
    assert flops(empty_model(config, adapter), step)["hardware"] == counter.get_total_flops()


def test_flops_of_a_preference_step_are_those_that_torch_counts():
    config = configuration()
    model, reference = real_model(config), real_model(config).requires_grad_(False)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    for each in (model, reference):
        add_fused_lm_head(each, outputs=outputs)
    ids = torch.randint(3, 400, (6, 100))  # three pairs
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
        with torch.no_grad():
            reference(input_ids=ids, labels=ids, fused_lm_head=True)
    # The head's two gradients are addmm_, which torch does not count
    uncounted = 2 * (2 * 64 * 410 * 6 * 99)
    step = Step(3, 100, pairs=True, reference="copy")
    assert flops(empty_model(config), step)["hardware"] == counter.get_total_flops() + uncounted


def test_flops_a_token_are_six_a_weight_and_twelve_a_width_length_and_layer():
    """The usual estimate (Kaplan et al., 2020; Chowdhery et al., 2022), with the head's matrix
    among the weights."""
    config = configuration(attn_implementation="eager")
    model = empty_model(config)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    attention = 12 * config.num_attention_heads * config.head_dim * 128 * config.num_hidden_layers
    step = Step(4, 128, attention="eager")
    assert flops(model, step)["model"] / step.tokens == 6 * weights + attention


# Memory


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "DeepSpeed's bf16"])
@pytest.mark.parametrize(
    ("variant", "attention", "length"),
    [
        *((variant, "sdpa", 200) for variant in VARIANTS),
        ("dense", "sdpa", 1100),
        ("dense", "eager", 200),
    ],
)
def test_activations_are_what_autograd_keeps(variant, adapter, precision, attention, length):
    config = configuration(variant)
    model = real_model(config, adapter, attention)
    if precision.startswith("DeepSpeed"):
        model.bfloat16()
    ids = torch.randint(3, 400, (2, length))
    weights = {tuple(sorted(p.shape)) for p in model.parameters()}
    addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        # Reckoned apart
        cast = tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in weights
        storage = tensor.untyped_storage()
        if not cast and storage.data_ptr() not in addresses:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    autocast = (
        torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = model(input_ids=ids, labels=ids, use_cache=False)
    assert output.loss > 0
    zero_stage = 2 if precision.startswith("DeepSpeed") else None
    step = Step(2, length, precision=precision[-4:], attention=attention, zero_stage=zero_stage)
    saved = saved_per_token(empty_model(config, adapter), step)
    planned = (saved["layer"] * config.num_hidden_layers + saved["head"]) * step.tokens
    assert planned == pytest.approx(sum(size for _, size in kept.values()), rel=0.08)


def allocated_peak(model, optimizer, forward, micro_batches, ids):
    """Bytes of torch's own account at the peak of the second step: what stands between steps, and
    what comes."""

    def step():
        for _ in range(micro_batches):
            forward(input_ids=ids, labels=ids, use_cache=False)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    parts = getattr(optimizer, "parts", [optimizer])
    states = [
        t
        for part in parts
        for state in part.state.values()
        for t in state.values()
        if torch.is_tensor(t)
    ]
    now = sum(t.numel() * t.element_size() for t in [*model.parameters(), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return peak_of(profiler, now)


def peak_of(profiler, now):
    """The peak of torch's own account of allocations, of which `now` bytes were there before."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=now))


@pytest.mark.parametrize(
    ("variant", "step"),
    [
        ("dense", Step(8, 128)),
        ("dense", Step(8, 128, precision="bf16")),
        ("dense", Step(8, 128, optimizer="muon")),
        ("dense", Step(2, 64, precision="bf16", optimizer="muon", accumulation=2)),
        ("dense", Step(8, 256, precision="bf16", checkpointing=True)),
        ("untied", Step(1, 32)),
        ("experts", Step(4, 128, accumulation=2)),
        ("shared experts", Step(8, 64, precision="bf16")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_planned_peak_is_within_15_percent_of_the_allocators(variant, step):
    config = configuration(variant, hidden_size=128, intermediate_size=352, vocab_size=2000)
    model = real_model(config, checkpointing=step.checkpointing)
    settings = types.SimpleNamespace(
        use_muon=step.optimizer == "muon", deepspeed=None, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
        learning_rate=1e-3, weight_decay=0.0,
    )  # fmt: skip
    optimizer = build_optimizer(model, settings) or torch.optim.AdamW(
        model.parameters(), fused=True
    )
    forward = model.forward
    if step.precision == "bf16":
        forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))
    ids = torch.randint(3, 2000, (step.batch_size, step.length))
    real = allocated_peak(model, optimizer, forward, step.accumulation, ids)
    assert memory(empty_model(config), step)["peak"] == pytest.approx(real, rel=0.15)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_planned_peak_of_an_evaluation_is_within_15_percent_of_the_allocators(precision):
    config = configuration(hidden_size=128, intermediate_size=352, vocab_size=2000)
    model, ids = real_model(config).eval(), torch.randint(3, 2000, (8, 128))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        output = convert_outputs_to_fp32(autocast(model.forward))(
            input_ids=ids, labels=ids, use_cache=False
        )
    assert output["logits"].dtype == torch.float
    step = Step(1, 128, precision=precision)
    # No optimizer here
    planned = evaluation_memory(empty_model(config), step, 8) - 8 * model.num_parameters()
    assert planned == pytest.approx(peak_of(profiler, 4 * model.num_parameters()), rel=0.15)


def test_zero_divides_the_states_as_in_its_paper():
    """Figure 1 of Rajbhandari et al., 2020: 7.5 B parameters on 64 devices, in units of 10^9
    bytes."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(7_500_000_000, device="meta"))
    for stage, expected in {0: 120, 1: 31.4, 2: 16.6, 3: 1.9}.items():
        states = model_states(model, Step(1, 1, precision="bf16", processes=64, zero_stage=stage))
        assert round(sum(states.values()) / 1e9, 1) == expected


def test_offloading_moves_states_to_the_host_and_loses_none():
    model = empty_model(configuration())
    here = model_states(model, Step(1, 8, precision="bf16", processes=2, zero_stage=3))
    step = Step(
        1,
        8,
        precision="bf16",
        processes=2,
        zero_stage=3,
        offload_optimizer=True,
        offload_parameters=True,
    )
    there = model_states(model, step)
    assert there["optimizer"] == there["weights"] == 0
    assert there["host"] == here["weights"] + here["gradients"] + here["optimizer"]


def test_muon_keeps_one_moment_for_the_matrices_inside_and_two_for_the_rest():
    config = configuration()
    model = real_model(config)
    settings = types.SimpleNamespace(
        use_muon=True, deepspeed=None, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, learning_rate=1e-3,
        weight_decay=0.0,
    )  # fmt: skip
    optimizer = build_optimizer(model, settings)
    model(input_ids=torch.ones(1, 8).long(), labels=torch.ones(1, 8).long()).loss.backward()
    optimizer.step()
    moments = [
        t for part in optimizer.parts for s in part.state.values() for t in s.values() if t.ndim
    ]
    expected = sum(t.numel() * 4 for t in moments)
    assert model_states(empty_model(config), Step(1, 8, optimizer="muon"))["optimizer"] == expected


def test_the_largest_batch_fits_and_one_more_does_not():
    model, step = empty_model(configuration()), Step(1, 128, precision="bf16")
    usable = 2**28
    largest = largest_batch(model, step, usable)
    assert memory(model, replace(step, batch_size=largest))["peak"] <= usable
    assert memory(model, replace(step, batch_size=largest + 1))["peak"] > usable
    assert largest_batch(model, step, 1000) == 0


# Recipes


DATA = {"pretrain": document_rows, "sft": chat_rows, "lora": chat_rows, "dpo": pair_rows}


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
    """Four recipes, each starting from what the one before it writes; none has run."""
    common = {"per_device_train_batch_size": 2, "eval_ratio": 0.2}
    start = {"model_config": files.model, "tokenizer": str(tokenizer_dir), "block_size": 32}
    made = {"pretrain": write_recipe(tmp_path, "pretrain", train_files=[files.pretrain], **start, **common,
                                     output_dir=str(tmp_path / "runs/pretrain"))}  # fmt: skip
    for stage, parent in (("sft", "pretrain"), ("lora", "sft"), ("dpo", "lora")):
        more = {"use_peft": True, "lora_r": 4} if stage == "lora" else {}
        made[stage] = write_recipe(
            tmp_path, stage, train_files=[getattr(files, stage)], max_length=64, **common, **more,
            model_name_or_path=str(tmp_path / "runs" / parent), output_dir=str(tmp_path / "runs" / stage),
        )  # fmt: skip
    return made


SCRIPTS = {
    "pretrain": "pretrain",
    "sft": "finetune_sft",
    "lora": "finetune_sft",
    "dpo": "train_dpo",
}


def test_steps_and_tokens_are_those_of_the_real_runs(tmp_path, pipeline, monkeypatch):
    plans = {}
    for stage, recipe in pipeline.items():
        words = ["--num_train_epochs", "3", "--gradient_accumulation_steps", "3", "--bf16", "false"]
        (read_back,) = planned_runs.read_recipes([str(recipe)], words)
        plans[stage] = make_plan(read_back, DEVICES["h100"])  # before its parent is written
        run_script(monkeypatch, SCRIPTS[stage], "--config", recipe, *words, "--report_to", "none")
    for stage, plan in plans.items():
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


@pytest.mark.parametrize("stage", DATA)
def test_the_stage_is_told_from_folder_keys_or_data(tmp_path, files, stage):
    assert planned_runs.stage_of(write_recipe(tmp_path, stage), []) == stage
    keys = {
        "pretrain": {"block_size": 8},
        "sft": {"packing": False},
        "lora": {"use_peft": True, "packing": True},
    }
    given = write_recipe(tmp_path, stage, folder="elsewhere", **keys.get(stage, {"beta": 0.1}))
    assert planned_runs.stage_of(given, []) == stage
    told = {"train_files": [getattr(files, stage)]} | (
        {"use_peft": True} if stage == "lora" else {}
    )
    assert (
        planned_runs.stage_of(write_recipe(tmp_path, stage, folder="elsewhere", **told), [])
        == stage
    )


@pytest.mark.parametrize("stage", DATA)
@pytest.mark.parametrize("packing", [True, False])
def test_a_sample_of_large_files_estimates_what_counting_finds(
    tmp_path, write_jsonl, tokenizer_dir, monkeypatch, stage, packing
):
    rows = [row for _ in range(40) for row in DATA[stage]()]
    files = [write_jsonl(f"{stage}{i}.jsonl", rows) for i in range(2)]
    keys = (
        {"block_size": 32, "tokenizer": str(tokenizer_dir)}
        if stage == "pretrain"
        else {"max_length": 64}
    )
    if stage == "pretrain":
        keys["packing_strategy"] = "wrapped" if packing else "bfd_split"
    elif stage != "dpo":
        keys["packing"] = packing
    (recipe,) = read(tmp_path, stage, eval_files=files[:1], train_files=files, **keys)
    tokenizer = recipe.starting_point()[1]
    counted = recipe.rows(tokenizer)
    monkeypatch.setattr(counting, "COUNTED", 0)
    monkeypatch.setattr(counting, "SAMPLE", 2**12)
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
    assert [stage["stage"] for stage in found["stages"]] == ["pretrain", "sft", "lora", "dpo"]
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
    monkeypatch.setattr(measuring, "measure", lambda recipe: found)
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


@pytest.mark.parametrize(
    ("text", "amount", "shown"),
    [
        ("8/h", 8, "16.00"),
        ("8", 8, "16.00"),
        ("$1.5/h", 1.5, "$3.00"),
        ("8 CNY/h", 8, "16.00 CNY"),
        ("¥2/hour", 2, "¥4.00"),
        ("￥2/h", 2, "¥4.00"),
        ("2元/h", 2, "4.00 元"),
        ("1.98 元/小时", 1.98, "3.96 元"),
        ("2元", 2, "4.00 元"),
    ],
)
def test_a_price_is_an_amount_an_hour(text, amount, shown):
    price = parse_price(text)
    assert price.amount == amount
    assert price.shown(2) == shown


# SMs, boost clock in GHz, and FLOPs that an SM makes a clock: half precision with fp32
# accumulation, fp32.
SILICON = {
    "rtx3060": (28, 1.777, 512, 256),
    "rtx3080": (68, 1.71, 512, 256),
    "rtx3090": (82, 1.695, 512, 256),
    "rtx4090": (128, 2.52, 512, 256),
    "rtx4090d": (114, 2.52, 512, 256),
    "l20": (92, 2.52, 512, 256),
    "t4": (40, 1.59, 1024, 128),
    "v100": (80, 1.53, 1024, 128),
    "a10": (72, 1.695, 1024, 256),
    "a100": (108, 1.41, 2048, 128),
    "a800": (108, 1.41, 2048, 128),
    "h100": (132, 1.83, 4096, None),  # in fp32 at another clock
    "h800": (132, 1.83, 4096, None),
    "h200": (132, 1.83, 4096, None),
}


@pytest.mark.parametrize("name", DEVICES)
def test_the_peak_of_a_card_is_what_its_silicon_makes(name):
    if name == "h20":  # by the sheet alone: its peak is held down
        assert DEVICES[name].peak("bf16") == 148e12
        return
    processors, clock, half, single = SILICON[name]
    assert DEVICES[name].peak("bf16") == pytest.approx(processors * clock * half * 1e9, rel=0.01)
    if single:
        assert DEVICES[name].peak("fp32") == pytest.approx(
            processors * clock * single * 1e9, rel=0.01
        )


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", "rtx4090d"),
        ("4090D", "rtx4090d"),
        ("3060", "rtx3060"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA H100 PCIe", None),
        ("Quadro T400", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(called, name):
    assert find_card(called) is (name and DEVICES[name])


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


def test_a_cpu_is_measured():
    device = find_device("cpu")
    assert device.kind == "cpu"
    assert 0 < device.peak("fp32") < 1e15
    assert device.usable < device.memory


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
            if stage != "dpo":  # pairs are not packed: how long a step takes is for the data to say
                assert plan.hours == pytest.approx(int(number) / {"h": 1, "min": 60}[unit], rel=0.2)
    assert max(hours.values()) < 5


# A run against its plan


def run_with_plan(monkeypatch, tmp_path, files, tokenizer_dir):
    options = {"max_steps": 6, "block_size": 32, "logging_steps": 2}
    run_script(
        monkeypatch, "pretrain", *short_run(tmp_path / "out", **options), "--train_files", files.pretrain,
        "--model_config", files.model, "--tokenizer", tokenizer_dir,
    )  # fmt: skip
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

    monkeypatch.setattr(measuring, "this_device", broken)
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
    ]
    environment = os.environ | {"WANDB_MODE": "offline"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*words, "--json"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"]
