"""What needs a CUDA device: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py`. Skipped
elsewhere."""

import pytest
import torch
from pipeline import (
    PAIR_LENGTHS,
    chat_rows,
    document_rows,
    pair_rows,
    run_script,
    short_run,
    write_model,
)
from small_run import small_trainer
from test_costs import configuration, real_model
from test_model import build, gradients, random_ids
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available

from minimind import MiniMindForCausalLM
from minimind.common.files import json_lines
from minimind.costs.memory import memory
from minimind.costs.parameters import empty_model
from minimind.costs.step import Step
from minimind.model import kernels_minimind, modeling_minimind
from minimind.stage_directory import weights_hash
from minimind.training import run as training_run

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
VARIANTS = {"dense": {}, "no qk_norm": {"qk_norm": False}, "MoE": {"num_experts": 4}}


def packed_batch():
    documents = [random_ids(1, n, seed=n) for n in (60, 100)]
    positions = torch.cat([torch.arange(60), torch.arange(100)])[None]
    ids = torch.cat(documents, dim=1)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, -100),
    }


def run(device, attention, dtype, variant):
    model = build(attn_implementation=attention, **VARIANTS[variant]).train().to(device, dtype)
    output = model(
        **{key: value.to(device) for key, value in packed_batch().items()}, use_cache=False
    )
    output.loss.backward()
    return output.logits.float().cpu(), {
        name: grad.float().cpu() for name, grad in gradients(model).items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_logits_and_gradients_on_the_gpu_are_those_on_the_cpu(attention, variant):
    logits, actual = run("cuda", attention, torch.float, variant)
    expected_logits, expected = run("cpu", "eager", torch.float, variant)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
@pytest.mark.parametrize("variant", VARIANTS)
def test_flash_attention_keeps_packed_documents_apart(variant):
    logits, _ = run("cuda", "flash_attention_2", torch.bfloat16, variant)
    expected, _ = run("cuda", "eager", torch.bfloat16, variant)
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
def test_experts_on_the_gpu_give_the_same_by_every_implementation(dtype):
    ids, found = random_ids(2, 50).cuda(), []
    for implementation in ("fastest", "eager", "grouped_mm"):
        model = build(num_experts=4).to("cuda", dtype)
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            found.append(model(ids).logits.float())
    for logits in found[1:]:
        torch.testing.assert_close(
            logits, found[0], atol=1e-4 if dtype == torch.float else 0.1, rtol=1e-2
        )


def test_generation_compiles_on_a_static_cache():
    model, prompt = build(seed=1).cuda(), random_ids(2, 7).cuda()
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 12}
    assert model.generate(prompt, **options, cache_implementation="static").equal(
        model.generate(prompt, **options)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["dense", "shared experts"])
def test_the_planned_peak_is_within_15_percent_of_the_allocators(precision, checkpointing, variant):
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    config = configuration(variant, vocab_size=6400, moe_intermediate_size=704, **shape)
    model = real_model(config, checkpointing=checkpointing).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(3, 6400, (16, 512), device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            output = model(input_ids=ids, labels=ids, use_cache=False)
        logits = output.logits.float()  # as accelerate does, until the loss is taken out
        loss = output.loss
        del logits, output
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step = Step(16, 512, precision=precision, device="cuda", checkpointing=checkpointing)
    assert memory(empty_model(config), step)["peak"] == pytest.approx(
        torch.cuda.max_memory_allocated(), rel=0.15
    )


# Training


def weights_after(trainer):
    trainer.callback_handler.callbacks.remove(trainer.witness)
    trainer.train()
    return {name: p.detach().float().cpu() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trained_weights_are_those_on_the_cpu(config, tokenizer, tmp_path, optim, precision):
    def trained(device, precision):
        options = {"optim": optim, "learning_rate": 1e-3, "use_cpu": device == "cpu"}
        flags = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
        trainer = small_trainer(config, tokenizer, tmp_path / device, **options, **flags)
        assert trainer.model.device.type == device
        return weights_after(trainer)

    torch.manual_seed(0)
    before = dict(MiniMindForCausalLM(config).named_parameters())
    expected, actual = trained("cpu", "fp32"), trained(DEVICE, precision)
    for name, weight in expected.items():
        moved, difference = weight - before[name], actual[name] - weight
        # Muon's iteration is in bf16 where that is fast. AdamW's first steps are the gradients'
        # signs, of which rounding turns the smallest
        limit = 2e-3 if (precision, optim) == ("fp32", "adamw_torch_fused") else 0.25
        assert difference.norm() <= limit * moved.norm(), name


def test_no_step_waits_for_the_device(make_trainer):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                torch.cuda.set_sync_debug_mode("default")

    trainer = make_trainer(use_cpu=False, bf16=True, logging_steps=100)
    trainer.callback_handler.callbacks.remove(trainer.witness)
    trainer.add_callback(Watch())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_routes_made_for_a_cpu_are_not_taken(monkeypatch):
    def taken(*args, **kwargs):
        raise AssertionError("a route for CPUs")

    monkeypatch.setattr(modeling_minimind, "blocked_attention_forward", taken)
    monkeypatch.setattr(kernels_minimind, "eager_experts_forward", taken)
    run(DEVICE, "sdpa", torch.bfloat16, "MoE")
    assert kernels_minimind.PIECE[False] > kernels_minimind.PIECE[True]


# The scripts


class KilledError(Exception):
    """Stands for SIGKILL."""


@pytest.fixture
def stage(monkeypatch, tmp_path, tokenizer_dir, write_jsonl):
    """Run a stage's script; returns its directory and the losses and gradient norms of its log."""
    rows = {"pretrain": document_rows(), "finetune_sft": chat_rows(), "train_dpo": pair_rows()}
    files = {name: write_jsonl(f"{name}.jsonl", some) for name, some in rows.items()}
    model = ["--model_config", write_model(tmp_path / "model.json"), "--tokenizer", tokenizer_dir]

    def run_stage(name, output, device, parent=None, **options):
        lengths = {"pretrain": {"block_size": 32}, "finetune_sft": {"max_length": 64}}
        length = lengths.get(name, PAIR_LENGTHS)
        options = {"use_cpu": device == "cpu", "logging_steps": 1, "eval_ratio": 0} | options
        words = short_run(tmp_path / output, max_steps=4, sample_steps=-1, **length | options)
        words += ["--train_files", files[name]]
        words += ["--model_name_or_path", tmp_path / parent] if parent else model
        run_script(monkeypatch, name, *words)
        log = list(json_lines(tmp_path / output / "train_log.jsonl"))
        return tmp_path / output, [(e["loss"], e["grad_norm"]) for e in log if "grad_norm" in e]

    return run_stage


@pytest.mark.filterwarnings("ignore")
def test_each_stage_logs_the_losses_of_the_cpu(stage):
    for name, parent in (
        ("pretrain", None),
        ("finetune_sft", "pretrain"),
        ("train_dpo", "pretrain"),
    ):
        _, expected = stage(name, name, "cpu", parent)
        _, actual = stage(name, f"{name}-gpu", DEVICE, parent)
        assert len(actual) == 4
        torch.testing.assert_close(
            torch.tensor(actual), torch.tensor(expected), atol=1e-4, rtol=1e-3
        )


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_is_the_run_that_was_not_interrupted(stage, monkeypatch):
    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KilledError

    options = {"save_strategy": "steps", "save_steps": 2, "bf16": True}
    whole, log = stage("pretrain", "whole", DEVICE, **options)
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "ADDITIONAL", [lambda trainer: Killer()])
        with pytest.raises(KilledError):
            stage("pretrain", "resumed", DEVICE, **options)
    resumed, log_of_resumed = stage("pretrain", "resumed", DEVICE, **options)
    assert log_of_resumed == log
    assert weights_hash(resumed) == weights_hash(whole)
