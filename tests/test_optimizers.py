"""Muon beside AdamW: the parts, their shared schedule, their state."""

import copy
from types import SimpleNamespace

import pytest
import torch

from minimind.errors import UserError
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


def test_a_step_is_that_of_torchs_own_muon_and_adamw(model):
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


def test_one_schedule_drives_both_parts(model):
    optimizer = build_optimizer(model, ARGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    step(model, optimizer)
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [5e-3, 5e-3]


def test_a_saved_state_goes_on_as_if_nothing_had_happened(model):
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
