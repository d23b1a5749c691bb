"""Muon beside AdamW: the step of each, their shared schedule, their state."""

import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.integrations import HfDeepSpeedConfig

from minimind.training import optimizers
from minimind.training.arguments import PretrainConfig
from minimind.training.optimizers import (
    POLAR_EXPRESS,
    MuonWithAdamW,
    build_optimizer,
    check_optimizer,
    orthogonalized,
)

ARGS = SimpleNamespace(
    use_muon=True,
    deepspeed=None,
    learning_rate=1e-2,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_epsilon=1e-8,
)


def step(model, optimizer, times=1):
    ids = torch.arange(3, 35)[None]
    for _ in range(times):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(ids, labels=ids).loss.item()


def test_another_optimizer_is_left_to_the_library(model):
    assert build_optimizer(model, SimpleNamespace(use_muon=False)) is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "has stage 0"),
        ({"zero_optimization": {"stage": 3}}, "has stage 3"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "Remove the block"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "Remove zero_optimization.offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 1}}, None),
        ({"zero_optimization": {"stage": 2}}, None),
    ],
)
def test_muon_under_deepspeed_needs_stage_1_or_2_without_offloading(block, message):
    args = SimpleNamespace(
        use_muon=True, deepspeed="ds.json", hf_deepspeed_config=HfDeepSpeedConfig(block)
    )
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_optimizer(args)


def test_matrices_of_the_layers_go_to_muon_and_every_parameter_to_one_group(model):
    muon, adamw = build_optimizer(model, ARGS).param_groups
    inside, rest = ({id(p) for p in group["params"]} for group in (muon, adamw))
    for name, parameter in model.named_parameters():
        assert (id(parameter) in inside) == ("_proj" in name), name
        assert (id(parameter) in inside) != (id(parameter) in rest), name


# Muon


SHAPES = ((64, 96), (96, 64), (64, 64), (64, 96), (3, 64, 96), (2, 96, 64))


def muon(shapes=SHAPES, **options):
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(*shape, generator=draw)) for shape in shapes]
    options = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8} | options
    return matrices, MuonWithAdamW(matrices, [torch.nn.Parameter(torch.zeros(2))], **options)


def moved(matrices, optimizer, steps=3):
    """The matrices after some steps with random gradients."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for matrix in matrices:
            matrix.grad = torch.randn(*matrix.shape, generator=draw)
        optimizer.step()
    return [matrix.detach().clone() for matrix in matrices]


def bf16(monkeypatch, fast):
    monkeypatch.setattr(optimizers, "bf16_is_fast", lambda device: fast)


@pytest.mark.parametrize("fast", [True, False])
def test_a_matrix_moves_at_every_second_step_twice_as_far_as_by_torchs_muon(monkeypatch, fast):
    """Both are orthogonal only within the tolerance of their iterations."""
    bf16(monkeypatch, fast)
    ours, optimizer = muon(SHAPES[:2], weight_decay=0.0)
    twins = muon(SHAPES[:2])[0]
    other = torch.optim.Muon(twins, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    draw = torch.Generator().manual_seed(1)
    for time in range(4):
        before = [[matrix.detach().clone() for matrix in each] for each in (ours, twins)]
        for one, twin in zip(ours, twins, strict=True):
            one.grad = torch.randn(*one.shape, generator=draw)
            twin.grad = one.grad.clone()
        optimizer.step()
        other.step()
        for index, (one, twin) in enumerate(zip(ours, twins, strict=True)):
            move, reference = one - before[0][index], twin - before[1][index]
            if (time + index) % 2:
                assert not move.any()
            else:
                assert torch.cosine_similarity(move.flatten(), reference.flatten(), dim=0) > 0.96
                assert 2 < move.norm() / reference.norm() < 2.6


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("shape", "dim"), [((96, 32), -1), ((32, 96), -2), ((2, 96, 32), -1)])
def test_the_neurons_of_an_mlp_move_equally_far_and_all_at_the_size_of_adamws(
    monkeypatch, fast, shape, dim
):
    """The twin is the orthogonal matrix of a singular value decomposition, with equal neurons."""
    bf16(monkeypatch, fast)
    (matrix,), optimizer = muon([shape], weight_decay=0.0)
    before = matrix.detach().clone()
    draw = torch.Generator().manual_seed(1)
    scales = torch.logspace(0, 0.5, 96)  # neurons with unequal gradients
    scales[5] = 0
    matrix.grad = torch.randn(*shape, generator=draw) * scales.unsqueeze(dim)
    optimizer.step()
    move = matrix.detach() - before

    left, _, right = torch.linalg.svd(-matrix.grad, full_matrices=False)
    twin = torch.nn.functional.normalize(left @ right, dim=dim)
    assert torch.cosine_similarity(move.flatten(), twin.flatten(), dim=0) > 0.96
    lengths = move.norm(dim=dim)
    assert not lengths[..., 5].any()
    lengths = lengths[..., torch.arange(96) != 5]
    assert lengths.std() < 0.01 * lengths.mean()
    assert 0.16 < move.square().mean().sqrt() / (2 * 0.1) < 0.24


def test_a_matrix_decays_when_it_moves_twice_as_far():
    matrices, optimizer = muon()
    moves = [2, 1, 2, 1, 2, 1]  # in three steps
    pairs = zip(moves, matrices, strict=True)
    expected = [0.98**count * matrix.detach() for count, matrix in pairs]
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    for _ in range(3):
        optimizer.step()
    for matrix, each in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.detach(), each)


@pytest.mark.parametrize("fast", [True, False])
def test_singular_values_become_1_within_the_tolerance_of_the_method(monkeypatch, fast):
    bf16(monkeypatch, fast)
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(144, 144, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(160, 144, generator=draw))[0]
    values = torch.logspace(0, -1.75, 144)
    values /= values.norm(p=4)
    assert 0.01 < values.min() < 0.011
    matrix = left * values @ right.T
    result = orthogonalized([torch.stack([matrix, 1e3 * matrix, 0 * matrix])]).float()
    assert not result[2].any()
    for each in result[:2]:
        found = torch.linalg.svdvals(each)
        assert 0.7 < found.min() < found.max() < (1.35 if fast else 1.3)
        assert (torch.cosine_similarity(each, left @ right.T, dim=1) > 0.97).all()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.03])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_a_matrix_of_low_rank_keeps_singular_values_of_1_at_most(monkeypatch, fast, rank, noise):
    """As the gradients of a small corpus are; nothing may be blown up from rounding."""
    bf16(monkeypatch, fast)
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(256, rank, generator=draw) @ torch.randn(rank, 704, generator=draw)
    matrix += noise * torch.randn(256, 704, generator=draw)
    found = torch.linalg.svdvals(orthogonalized([matrix[None]])[0].float())
    assert found.max() < 1.3


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
def test_singular_values_that_fall_by_a_power_stay_in_bf16_as_in_fp32(monkeypatch, power):
    """As those of real gradients do; it fails with the last Gram matrix from the one before."""
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(256, 256, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(704, 256, generator=draw))[0]
    matrix = left * torch.arange(1, 257).pow(-power) @ right.T
    found = []
    for fast in (True, False):
        bf16(monkeypatch, fast)
        found.append(orthogonalized([matrix[None]])[0].float())
    assert (found[0] - found[1]).norm() < 0.08 * found[1].norm()
    assert torch.linalg.matrix_norm(found[0], 2) < 1.4


def best_quintic(low, high):
    """The odd quintic nearest to 1 on [low, high], and its error: the exchange algorithm of Remez
    in double precision."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(50):
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, np.array([1, -1, 1, -1])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * root) / (10 * c))  # where its slope is 0
    return np.array([a, b, c]), error


def test_the_polynomials_are_those_of_polar_express():
    low, high = 0.01, 1.0
    for step, found in enumerate(POLAR_EXPRESS):
        # The paper's cushion: an interval that is not so wide; then the middle back to 1
        cushioned = max(low, 0.02407327424182761 * high)
        best, _ = best_quintic(cushioned, high)
        best *= 2 / sum(best @ [x, x**3, x**5] for x in (low, high))
        low = best @ [low, low**3, low**5]
        high = 2 - low
        safety = 1.01 if step < len(POLAR_EXPRESS) - 1 else 1.0
        np.testing.assert_allclose(found, best / safety ** np.array([1, 3, 5]), rtol=2e-6)
    assert low > 0.72


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("limit", [optimizers.MUON_BATCH, 1])
def test_a_batch_of_matrices_moves_as_each_alone(monkeypatch, fast, limit):
    bf16(monkeypatch, fast)
    together = moved(*muon())
    monkeypatch.setattr(optimizers, "MUON_BATCH", limit)
    alone = moved(*muon())
    calls = []
    whole = optimizers.orthogonalized
    monkeypatch.setattr(
        optimizers,
        "orthogonalized",
        lambda stacks: (
            calls.append(sum(map(len, stacks)))
            or torch.cat([whole([one[None]]) for stack in stacks for one in stack])
        ),
    )
    for one, other, third in zip(together, alone, moved(*muon()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one, third, rtol=1e-3, atol=1e-3)
    assert sum(calls) == 5 + 4 + 5
    assert len(calls) == (2 + 1 + 2 if limit > 1 else 3 + 3 + 3)


def test_stacked_experts_move_as_single_matrices(monkeypatch):
    bf16(monkeypatch, False)
    for shape in ((3, 24, 40), (3, 40, 24)):
        (stack,), optimizer = muon([shape])
        twins, others = zip(*(muon([shape[1:]]) for _ in range(3)), strict=True)
        twins = [twin for (twin,) in twins]
        for twin, one in zip(twins, stack.detach(), strict=True):
            twin.data.copy_(one)
        for _ in range(3):
            stack.grad = torch.randn(shape)
            for twin, other, gradient in zip(twins, others, stack.grad, strict=True):
                twin.grad = gradient.clone()
                other.step()
            optimizer.step()
        torch.testing.assert_close(stack.detach(), torch.stack([t.detach() for t in twins]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_partitions_of_zero_move_as_the_matrices(monkeypatch, world):
    """ZeRO 1 and 2 make the parameters views of one tensor, pad it, and give the optimizer of each
    process its part. Here each process is a thread."""
    bf16(monkeypatch, False)
    draws = [[torch.randn(*shape) for shape in SHAPES] for _ in range(3)]
    matrices, optimizer = muon()
    for gradients in draws:
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        optimizer.step()

    total = sum(matrix.numel() for matrix in matrices)
    size = -(-total // world) + 5  # with padding at the end
    barrier, own, rank = threading.Barrier(world), {}, threading.local()

    def all_gather(parts, mine):
        own[rank.value] = mine
        barrier.wait(timeout=60)
        for part, each in zip(parts, range(world), strict=True):
            part.copy_(own[each])
        barrier.wait(timeout=60)

    fake = SimpleNamespace(
        is_initialized=lambda: world > 1,
        get_world_size=lambda: world,
        get_rank=lambda: rank.value,
        all_gather=all_gather,
    )
    monkeypatch.setattr(optimizers, "dist", fake)

    def process(number):
        rank.value = number
        copies, optimizer = muon()
        flat = torch.cat([*(copy.detach().flatten() for copy in copies), torch.zeros(world * size)])
        flat = flat[: world * size].clone()
        at = 0
        for each in copies:
            each.data = flat[at : at + each.numel()].view(each.shape)
            at += each.numel()
        partition = flat[number * size : (number + 1) * size].clone()
        optimizer.param_groups[0]["params"] = [partition]
        for gradients in draws:
            whole = torch.cat([gradient.flatten() for gradient in gradients])
            whole = torch.nn.functional.pad(whole, (0, world * size - total))
            partition.grad = whole[number * size : (number + 1) * size].clone()
            optimizer.step()
        assert optimizer.state[partition]["momentum_buffer"].shape == (size,)
        return partition

    with ThreadPoolExecutor(world) as pool:
        parts = list(pool.map(process, range(world)))
    found = torch.cat(parts)[:total]
    expected = torch.cat([matrix.detach().flatten() for matrix in matrices])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_rest_moves_as_torchs_adamw_at_four_times_the_rate(model):
    twin = copy.deepcopy(model)
    step(model, build_optimizer(model, ARGS))
    others = [p for name, p in twin.named_parameters() if "_proj" not in name]
    ids = torch.arange(3, 35)[None]
    twin(ids, labels=ids).loss.backward()
    torch.optim.AdamW(
        others, lr=4e-2, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True
    ).step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert ("_proj" in name) or torch.equal(parameter, other), name


def test_a_step_with_found_inf_changes_nothing(model):
    optimizer = build_optimizer(model, ARGS)
    step(model, optimizer)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state[index][name]), name

    optimizer.zero_grad()
    optimizer.found_inf = torch.zeros(())
    twin, plain = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    other = build_optimizer(twin, ARGS)
    other.load_state_dict(plain)
    assert step(model, optimizer) == step(twin, other)


def test_an_optimizer_without_turns_continues(model):
    """Until 2026-11-28 all matrices moved at every step."""
    optimizer = build_optimizer(model, ARGS)
    step(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["turn"]
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, ARGS)
    resumed.load_state_dict(saved)
    assert step(twin, resumed, 3) == step(model, optimizer, 3)


def test_an_optimizer_of_an_earlier_version_continues(model):
    """Until the stage directory of 2026-11 it was torch's Muon and AdamW, one after the other."""
    optimizer = build_optimizer(model, ARGS)
    step(model, optimizer)
    muons, rest = (group["params"] for group in optimizer.param_groups)
    parts = []
    for cls, params in ((torch.optim.Muon, muons), (torch.optim.AdamW, rest)):
        part = cls(params, lr=5e-3)
        part.state.update((p, optimizer.state[p]) for p in params)
        parts.append(copy.deepcopy(part.state_dict()))
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, ARGS)
    resumed.load_state_dict({"parts": parts})
    assert {group["lr"] for group in resumed.param_groups} == {5e-3}
    optimizer.param_groups[0]["turn"] = 0  # the earlier version had none
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    for group in resumed.param_groups:
        group["weight_decay"] = optimizer.param_groups[0]["weight_decay"] * group["use_muon"]
    assert step(twin, resumed, 2) == step(model, optimizer, 2)


# The whole


def test_a_cpu_kept_from_its_bf16_instructions_is_one_without_them():
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    question = "from minimind.common.launch import bf16_is_fast; print(bf16_is_fast('cpu'))"
    answer = subprocess.run(
        [sys.executable, "-c", question], env=os.environ | limits, capture_output=True, text=True
    )
    assert answer.stdout.split()[-1:] == ["False"], answer.stderr


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_takes_bf16_where_it_is_fast(monkeypatch, fast, tmp_path):
    monkeypatch.setattr("minimind.training.arguments.bf16_is_fast", lambda device: fast)
    assert PretrainConfig(str(tmp_path), use_cpu=True, report_to=[]).bf16 == fast


def test_one_schedule_drives_both_groups(model):
    optimizer = build_optimizer(model, ARGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    step(model, optimizer)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3]


def test_a_restored_optimizer_continues_as_if_it_had_not_stopped(model):
    optimizer = build_optimizer(model, ARGS)
    step(model, optimizer, 3)
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, ARGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in resumed.param_groups:
        group["lr"] = 1e-3
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    assert step(twin, resumed, 2) == step(model, optimizer, 2)
