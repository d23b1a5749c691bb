"""Every check of the doctor finds the fault it is for, and lets a healthy run pass."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from minimind import MiniMindForCausalLM
from minimind.common.files import write_json
from minimind.data.packing import BlockCollator
from minimind.doctor import deepspeed, examine, precision, rates, speed
from minimind.doctor.examination import CHECKS
from minimind.doctor.rates import usual_learning_rates
from minimind.doctor.registry import Case
from minimind.training.arguments import DPOStageConfig, PretrainConfig, SFTStageConfig
from minimind.training.definition import flat
from minimind.training.trainers import ScheduledTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
DEEPSPEED = json.loads(Path("ds_config_zero2.json").read_text())


def arguments(tmp_path, kind=PretrainConfig, **options):
    options = {"report_to": "none", "bf16": False, "use_cpu": True, "learning_rate": 5e-4} | options
    return kind(output_dir=str(tmp_path / "run"), **options)


@pytest.fixture
def case(model, tokenizer, tmp_path):
    """A healthy pretraining: 64 rows of documents of 7 tokens and an end."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, len(tokenizer), (64, 32))
    ids[:, 7::8] = tokenizer.eos_token_id
    facts = {"train": {"files": ["a"], "documents": 256, "tokens": 2048}, "eval": {"files": []}}
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Case(
        "pretrain",
        args=arguments(tmp_path, block_size=32, learning_rate=1e-2),
        model=model,
        tokenizer=tokenizer,
        train=Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy"),
        facts=facts,
        collator=BlockCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
        deepspeed=json.loads(json.dumps(DEEPSPEED)),
    )


def ask(case, name):
    return next(each for each in CHECKS if each.name == name)(case)


def change(case, **options):
    """The case with other arguments."""
    return dataclasses.replace(case, args=dataclasses.replace(case.args, **options))


def test_a_healthy_run_passes_every_quick_check(case):
    findings = examine(case, quick=True)
    assert {finding.severity for finding in findings} == {"ok"}, findings
    assert len(findings) >= 20


def test_the_quick_checks_change_no_random_number_and_no_weight(case):
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    torch.manual_seed(7)
    examine(case, quick=True)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize(
    ("name", "change_json"),
    [
        ("deepspeed_optimizer", {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}),
        ("deepspeed_scheduler", {"scheduler": {"type": "WarmupLR", "params": {}}}),
        ("deepspeed_batch", {"train_micro_batch_size_per_gpu": 3}),
        ("deepspeed_batch", {"gradient_accumulation_steps": 16}),
        ("deepspeed_batch", {"train_batch_size": 4096}),
        ("deepspeed_precision", {"bf16": {"enabled": True}}),
        ("deepspeed_precision", {"fp16": {"enabled": True}}),
        ("deepspeed_clipping", {"gradient_clipping": 0.1}),
        ("deepspeed_auto", {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}),
    ],
)
def test_a_json_that_fights_the_recipe_is_found(case, name, change_json):
    assert ask(case, name).severity == "ok"
    case.deepspeed |= change_json
    finding = ask(case, name)
    assert finding.severity == "error"
    assert finding.expected
    assert finding.fix


def test_a_json_without_clipping_is_found_since_deepspeed_then_clips_nothing(case):
    del case.deepspeed["gradient_clipping"]
    assert ask(case, "deepspeed_clipping").severity == "error"
    assert ask(change(case, max_grad_norm=0.0), "deepspeed_clipping").severity == "ok"


def test_without_deepspeed_its_checks_are_skipped(case):
    case.deepspeed = None
    assert ask(case, "deepspeed_batch").severity == "skipped"


@pytest.mark.parametrize("key", ["bfloat16", "cpu_offload"])
def test_deprecated_keys_of_the_json_are_found(case, key):
    case.deepspeed |= (
        {"bfloat16": {"enabled": True}} if key == "bfloat16" else {"zero_optimization": {key: True}}
    )
    finding = ask(case, "deprecated_keys")
    assert finding.severity == "warning"
    assert key in finding.found


def test_the_known_auto_keys_are_those_that_transformers_fills(case, monkeypatch, tmp_path):
    """Against the library itself: after its processing no known key is still "auto"."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config: dict = {}
    for key in deepspeed.FILLED:
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = "auto"
    config["zero_optimization"] |= {"stage": 3, "allgather_bucket_size": "auto"}
    filled = HfTrainerDeepSpeedConfig(config)
    filled.trainer_config_process(case.args)
    filled.trainer_config_finalize(case.args, case.model, 100)
    left = [key for key, value in flat(filled.config) if value == "auto"]
    assert left == ["zero_optimization.allgather_bucket_size"]


# Precision.


def test_fp16_without_a_moving_loss_scale_is_found(case):
    assert ask(case, "fp16_scaling").severity == "ok"
    args = dataclasses.replace(case.args)
    args.fp16, args.use_cpu = True, False
    args.__dict__["_n_gpu"] = 1
    fixed = dataclasses.replace(
        case, args=args, deepspeed=case.deepspeed | {"fp16": {"loss_scale": 1}}
    )
    assert "fixed loss_scale" in ask(fixed, "fp16_scaling").found
    assert ask(fixed, "fp16_scaling").severity == "error"


def test_fp16_weights_and_fp16_on_a_cpu_are_found(case):
    args = dataclasses.replace(case.args)
    args.fp16 = True
    assert "on a CPU" in ask(dataclasses.replace(case, args=args), "fp16_scaling").found
    half = dataclasses.replace(case, model=case.model.half())
    assert ask(half, "fp16_scaling").severity == "error"


def test_bf16_where_it_is_emulated_is_found(case, monkeypatch):
    case = change(case, bf16=True)
    for fast, severity in ((True, "ok"), (False, "warning")):
        monkeypatch.setattr(precision, "bf16_is_fast", lambda device, fast=fast: fast)
        assert ask(case, "bf16_hardware").severity == severity


# The loss.


def test_ranks_that_average_their_own_means_are_found(case):
    assert ask(case, "accumulation").severity == "ok"
    case = change(case, average_tokens_across_devices=False)
    assert ask(case, "accumulation").severity == "warning"
    case.world = 2
    finding = ask(case, "accumulation")
    assert finding.severity == "error"
    assert "average_tokens_across_devices" in finding.fix


# Tokens and embeddings.


def test_embeddings_without_a_token_are_found(case, config):
    assert ask(case, "vocabulary").severity == "ok"
    config.vocab_size *= 2
    finding = ask(dataclasses.replace(case, model=MiniMindForCausalLM(config)), "vocabulary")
    assert finding.severity == "warning"
    assert "vocab_size" in finding.fix


def test_documents_without_an_end_between_them_are_found(case, tokenizer):
    ids = np.full((64, 32), 9)
    case.train = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy")
    assert ask(case, "document_ends").severity == "error"


def test_few_long_documents_are_no_fault(case):
    ids = np.full((64, 32), 9)
    case.train = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy")
    case.facts["train"] |= {"documents": 2}
    assert ask(case, "document_ends").severity == "ok"


def test_untied_embeddings_are_found(case):
    case.model.lm_head.weight = torch.nn.Parameter(case.model.lm_head.weight.clone())
    assert ask(case, "tied_weights").severity == "error"


def lora_case(case, tmp_path, max_steps=-1, **options):
    options = {"r": 2, "target_modules": "all-linear"} | options
    adapter = get_peft_model(case.model, LoraConfig(task_type="CAUSAL_LM", **options))
    args = arguments(tmp_path, SFTStageConfig, learning_rate=2e-4, max_steps=max_steps)
    return dataclasses.replace(case, stage="sft", model=adapter, args=args)


def train_embeddings(case):
    with torch.no_grad():
        case.model.get_input_embeddings().weight.mul_(4)


def test_special_tokens_that_lora_leaves_untrained_are_found(case, tokenizer, tmp_path):
    train_embeddings(case)
    healthy = lora_case(case, tmp_path)
    assert ask(healthy, "untrained_tokens").severity == "ok"
    with torch.no_grad():  # as a token added later is
        torch.nn.init.normal_(
            case.model.get_input_embeddings().weight[tokenizer.eos_token_id], std=0.02
        )
    finding = ask(healthy, "untrained_tokens")
    assert finding.severity == "error"
    assert tokenizer.eos_token in finding.found


def test_new_tokens_that_all_begin_at_one_mean_are_found(case, tokenizer, tmp_path):
    train_embeddings(case)
    weight = case.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[[0, 1, tokenizer.eos_token_id]] = weight.mean(0)
    assert ask(lora_case(case, tmp_path), "untrained_tokens").severity == "error"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:.*tied.*")
def test_embeddings_trained_beside_the_adapter_are_no_fault(case, tmp_path):
    case = lora_case(case, tmp_path, modules_to_save=["embed_tokens"])
    assert ask(case, "untrained_tokens").severity == "ok"


def test_an_adapter_on_a_base_that_never_saw_the_chat_template_is_found(case, tmp_path):
    train_embeddings(case)
    write_json(tmp_path / "stage.json", {"stage": "pretrain"})
    case = dataclasses.replace(lora_case(case, tmp_path), parent=tmp_path)
    assert ask(case, "untrained_tokens").severity == "warning"


# The recipe.


@pytest.mark.parametrize(("rate", "severity"), [(5e-4, "ok"), (0.1, "warning"), (5e-8, "warning")])
def test_a_learning_rate_far_from_the_usual_is_found(case, rate, severity):
    assert ask(change(case, learning_rate=rate), "learning_rate").severity == severity


@pytest.mark.parametrize(
    ("stage", "parameters", "lora", "rates"),
    [
        ("pretrain", 125e6, False, [6e-4]),  # GPT-3, Brown et al. 2020, table 2.1
        ("pretrain", 13e9, False, [1e-4]),
        ("pretrain", 110e6, False, [3e-3]),  # SmolLM-135M
        ("sft", 8e9, False, [5e-6, 2e-5]),  # Tulu 3; Alpaca
        ("sft", 64e6, True, [2e-4]),
        ("dpo", 8e9, False, [5e-7]),  # Tulu 3
        ("dpo", 64e6, False, [5e-6]),
        ("reward", 6e9, False, [9e-6]),  # InstructGPT
        ("reward", 8e9, False, [3e-6]),  # Tulu 3
    ],
)
def test_published_learning_rates_are_usual(stage, parameters, lora, rates):
    low, high = usual_learning_rates(stage, int(parameters), lora)
    assert all(low <= rate <= high for rate in rates), (low, high)


def test_a_learning_rate_of_dpo_that_moves_nothing_is_found(case, tmp_path):
    args = arguments(tmp_path, DPOStageConfig, learning_rate=4e-8)
    finding = ask(dataclasses.replace(case, stage="dpo", args=args), "learning_rate")
    assert finding.severity == "warning"


@pytest.mark.parametrize(("warm", "severity"), [(0.05, "ok"), (100, "error"), (60, "warning")])
def test_a_warm_up_longer_than_the_training_is_found(case, warm, severity):
    assert ask(change(case, max_steps=100, warmup_steps=warm), "warmup").severity == severity


def test_checkpoints_that_never_come_are_found(case):
    case = change(case, max_steps=100, save_strategy="steps", save_steps=500)
    assert ask(case, "save_steps").severity == "warning"
    assert ask(change(case, save_steps=50), "save_steps").severity == "ok"


# What a run spends.


def test_the_sum_of_the_rates_is_that_of_the_schedule_written_out(tmp_path):
    """20 steps: 4 of warm-up (1/4, 2/4, 3/4, 4/4 of the peak), then a cosine from the peak down to
    a tenth of it."""
    args = arguments(tmp_path, learning_rate=2e-3, warmup_steps=0.2)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(16)]
    assert rates.summed_rate(args, 20) == pytest.approx(2e-3 * (2.5 + sum(cosine)))


@pytest.mark.parametrize("schedule", ["constant", "linear", "warmup_stable_decay"])
def test_the_sum_of_the_rates_is_that_of_the_schedule_stepped_through(tmp_path, schedule):
    args = arguments(tmp_path, lr_scheduler_type=schedule, warmup_steps=0.1, lr_decay_steps=0.5)
    given = args.lr_scheduler_kwargs
    total = rates.summed_rate(args, 40)
    assert args.lr_scheduler_kwargs == given
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    trainer = ScheduledTrainer(torch.nn.Linear(1, 1), args, optimizers=(optimizer, None))
    scheduler, stepped = trainer.create_scheduler(40, optimizer), []
    for _ in range(40):
        stepped.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert total == pytest.approx(sum(stepped))


def test_of_a_long_run_a_sample_of_the_rates_is_added_up(tmp_path):
    args = arguments(tmp_path, learning_rate=1e-3, warmup_steps=0, lr_scheduler_type="linear")
    assert rates.summed_rate(args, 10**6) == pytest.approx(1e-3 * 10**6 / 2, rel=2e-3)


def test_weights_that_all_move_in_step_move_a_matrix_by_what_is_said():
    """Against the norms of real matrices."""
    drawn = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    said = rates.movement(3e-3, 512, 0.02)
    assert said == pytest.approx(
        float(torch.full((512, 512), 3e-3).norm(2) / torch.linalg.matrix_norm(drawn, 2)), rel=0.05
    )
    a = torch.empty(8, 512)
    # As peft draws it
    torch.nn.init.kaiming_uniform_(a, a=5**0.5, generator=torch.Generator().manual_seed(0))
    moved = 2 * torch.linalg.matrix_norm(torch.full((512, 8), 3e-3) @ a, 2)
    said = rates.movement(3e-3, 512, 0.02, 8, 2.0)
    assert said == pytest.approx(float(moved / torch.linalg.matrix_norm(drawn, 2)), rel=0.1)


@pytest.mark.parametrize(
    ("stage", "kind", "steps", "rate", "severity"),
    # At the width of configs/model/tiny.json; measured: what the first of each two learnt, and what
    # the second
    [
        ("sft", SFTStageConfig, 170, 1e-3, "ok"),
        ("sft", SFTStageConfig, 170, 2e-5, "warning"),
        ("dpo", DPOStageConfig, 48, 3e-5, "ok"),
        ("dpo", DPOStageConfig, 48, 5e-6, "warning"),
    ],
)
def test_a_run_that_hardly_moves_its_weights_is_found(
    case, tmp_path, stage, kind, steps, rate, severity
):
    args = arguments(tmp_path, kind, max_steps=steps, learning_rate=rate)
    case.model.config.hidden_size = 256
    finding = ask(dataclasses.replace(case, stage=stage, args=args), "updates")
    assert finding.severity == severity, finding
    assert f"{steps} updates at rate {rate:g}" in finding.found


def test_an_adapter_moves_less_than_its_model_would(case, tmp_path):
    adapter = lora_case(case, tmp_path, max_steps=20)
    assert ask(adapter, "updates").severity == "warning"
    assert ask(change(adapter, max_steps=5000), "updates").severity == "ok"


@pytest.mark.parametrize(
    ("steps", "seconds", "planned", "severity"),
    [
        (1000, 2.0, 1.5, "ok"),
        (3, 518.2, 500.0, "warning"),  # nobody waits ten minutes for a step
        (100_000, 3.0, 3.0, "warning"),  # 83 hours
        (1000, 8.0, 2.0, "warning"),  # four times the plan
        (1000, 0.02, 0.001, "ok"),  # of milliseconds no plan is right
    ],
)
def test_a_run_that_takes_too_long_is_found(steps, seconds, planned, severity):
    found = speed.judge_time(steps, seconds, planned, "CPU")
    assert found[0] == severity
    assert ("emulated" in found[-1]) == (seconds == 8.0)


def test_too_many_passes_over_the_data_are_found(case):
    assert ask(change(case, num_train_epochs=4), "epochs").severity == "ok"
    assert ask(change(case, num_train_epochs=20), "epochs").severity == "warning"
    assert ask(change(case, max_steps=1000), "epochs").severity == "warning"


def test_a_held_out_file_that_is_trained_on_is_found(case):
    case.facts["eval"] = {"files": ["a"]}
    assert ask(case, "held_out_files").severity == "error"
    case.facts["eval"] = {"files": ["b"]}
    assert ask(case, "held_out_files").severity == "ok"


def test_a_disk_too_small_for_the_checkpoints_is_found(case, monkeypatch):
    case = change(case, save_strategy="steps")
    assert ask(case, "disk_space").severity == "ok"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1_000_000)
    )
    assert ask(case, "disk_space").severity == "error"


@pytest.mark.parametrize(("batch", "severity"), [(7, "ok"), (9, "warning")])
def test_a_data_loader_slower_than_the_step_is_found(case, batch, severity, monkeypatch):
    """By a clock that only they move: a pass over 2 rows takes 2 s, so the step of 8 rows 8 s; a
    batch 7 or 9 s."""
    now = 0
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now))

    def spend(seconds, result):
        nonlocal now
        now += seconds
        return result

    case.model.register_forward_hook(lambda *_: spend(2, None))
    collate = case.collator
    case = dataclasses.replace(case, collator=lambda rows: spend(batch, collate(rows)))
    assert ask(case, "dataloader_speed").severity == severity


def test_the_tracker_check_never_stops_a_run(case, monkeypatch):
    case.args.report_to = ["wandb"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    finding = ask(case, "tracker")
    assert (finding.severity, "offline" in finding.found) == ("ok", True)
