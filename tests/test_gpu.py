"""What needs a CUDA device: `CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py`. Skipped
elsewhere."""

import pytest
import torch
from test_costs import configuration, real_model
from test_model import build, gradients, random_ids
from transformers.utils import is_flash_attn_2_available

from minimind.costs.memory import memory
from minimind.costs.parameters import empty_model
from minimind.costs.step import Step

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
