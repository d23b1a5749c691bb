"""Muon beside AdamW: the parts, their shared schedule, their state."""

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minimind.common.errors import UserError
from minimind.training import optimizers
from minimind.training.optimizers import build_optimizer

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


def test_muon_under_deepspeed_is_refused(model):
    with pytest.raises(UserError, match="--optim muon cannot run under --deepspeed"):
        build_optimizer(model, SimpleNamespace(use_muon=True, deepspeed="ds.json"))


def test_matrices_of_the_layers_go_to_muon_and_every_parameter_to_one_part(model):
    muon, adamw = build_optimizer(model, ARGS).parts
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in inside) == ("_proj" in name), name
        assert (id(parameter) in inside) != (id(parameter) in rest), name


def test_a_step_is_that_of_torchs_own_muon_and_adamw(model, monkeypatch):
    monkeypatch.setattr(optimizers, "bf16_is_fast", lambda device: True)
    twin = copy.deepcopy(model)
    step(model, build_optimizer(model, ARGS))
    named = dict(twin.named_parameters())
    inside = [p for name, p in named.items() if "_proj" in name]
    others = [p for name, p in named.items() if "_proj" not in name]
    ids = torch.arange(3, 35)[None]
    twin(ids, labels=ids).loss.backward()
    torch.optim.Muon(inside, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8).step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=name)


def moved(monkeypatch, muon, fast, **options):
    """Three steps of an optimizer on a device that computes in bf16, or does not: the matrices
    after them."""
    monkeypatch.setattr(optimizers, "bf16_is_fast", lambda device: fast)
    draw = torch.Generator().manual_seed(0)
    matrices = [
        torch.nn.Parameter(torch.randn(*shape, generator=draw))
        for shape in ((64, 96), (96, 64), (64, 64))
    ]
    optimizer = muon(matrices, lr=0.1, weight_decay=0.1, **options)
    for _ in range(3):
        for matrix in matrices:
            matrix.grad = torch.randn(*matrix.shape, generator=draw)
        optimizer.step()
    return torch.cat([matrix.detach().flatten() for matrix in matrices])


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_iterates_in_bf16_as_torchs_own_or_in_fp32_close_to_it(nesterov, monkeypatch):
    reference = moved(monkeypatch, torch.optim.Muon, True, nesterov=nesterov)
    assert torch.equal(moved(monkeypatch, optimizers.Muon, True, nesterov=nesterov), reference)
    fp32 = moved(monkeypatch, optimizers.Muon, False, nesterov=nesterov)
    assert 0 < (fp32 - reference).norm() / reference.norm() < 2e-3


def test_without_bf16_hardware_the_iteration_is_that_of_its_paper_in_fp32(monkeypatch):
    monkeypatch.setattr(optimizers, "bf16_is_fast", lambda device: False)
    gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    matrix = torch.nn.Parameter(torch.zeros(24, 40))
    matrix.grad = gradient.clone()
    optimizers.Muon([matrix], lr=1.0, weight_decay=0.0, nesterov=False, momentum=0.0).step()
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(-matrix.detach().double(), x, rtol=1e-4, atol=1e-5)


def test_a_cpu_kept_from_its_bf16_instructions_is_one_without_them():
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    question = (
        "from minimind.training.arguments import PretrainConfig as C; print(C(use_cpu=True,"
        " report_to=[]).bf16)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], env=os.environ | limits, capture_output=True, text=True
    )
    assert answer.stdout.split()[-1:] == ["False"], answer.stderr


def test_one_schedule_drives_both_parts(model):
    optimizer = build_optimizer(model, ARGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    step(model, optimizer)
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [5e-3, 5e-3]


def test_a_restored_optimizer_continues_as_if_it_had_not_stopped(model):
    optimizer = build_optimizer(model, ARGS)
    step(model, optimizer, 2)
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, ARGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in resumed.param_groups:
        group["lr"] = 1e-3
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    assert step(twin, resumed, 2) == step(model, optimizer, 2)
