"""What a step computes and holds, and what devices can do: each figure against an independent
account of the same thing."""

import contextlib
import types
from itertools import accumulate

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from trl.trainer.utils import add_fused_lm_head

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.costs.devices import DEVICES, find_card
from minimind.costs.flops import flops
from minimind.costs.memory import evaluation_memory, memory, model_states, saved_per_token
from minimind.costs.parameters import empty_model, parameter_counts
from minimind.costs.prices import parse_price
from minimind.costs.step import Step
from minimind.costs.this_machine import find_device
from minimind.data.preference_batches import PreferenceCollator
from minimind.training.optimizers import build_optimizer
from minimind.training.preference_trainer import add_packed_forward

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


def test_flops_of_a_pair_that_shares_its_prompt_are_those_that_torch_counts():
    config = configuration()
    model, numbers = real_model(config), torch.Generator().manual_seed(0)
    add_packed_forward(model)
    row = {
        f"{name}_{kind}": torch.randint(3, 400, (length,), generator=numbers).tolist()
        for name, length in (("prompt", 64), ("chosen", 64), ("rejected", 64))
        for kind in ("ids", "mask")
    }
    row |= {name: [1] * len(values) for name, values in row.items() if name.endswith("_mask")}
    batch = PreferenceCollator(0, packed=True)([row])
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with FlopCounterMode(display=False) as counter:
        model(**batch, labels=labels, fused_lm_head=True).log_probs.sum().backward()
    step = Step(1, 192, pairs=True, shared_prompts=True, predicting=128 / 192)
    assert flops(empty_model(config), step)["hardware"] == counter.get_total_flops()


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
        ("dense", Step(1, 8, optimizer="muon")),
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
        use_muon=step.optimizer == "muon", deepspeed=None, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, learning_rate=1e-3, weight_decay=0.0,
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
        use_muon=True, deepspeed=None, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8,
        learning_rate=1e-3, weight_decay=0.0,
    )  # fmt: skip
    optimizer = build_optimizer(model, settings)
    model(input_ids=torch.ones(1, 8).long(), labels=torch.ones(1, 8).long()).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    expected = sum(t.numel() * 4 for t in moments)
    assert model_states(empty_model(config), Step(1, 8, optimizer="muon"))["optimizer"] == expected


# Devices and prices


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


def test_a_cpu_is_measured():
    device = find_device("cpu")
    assert device.kind == "cpu"
    assert 0 < device.peak("fp32") < 1e15
    assert device.usable < device.memory


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
