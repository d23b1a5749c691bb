"""`optim: muon` in a recipe: Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix; it is defined for matrices
that map features to features, so embeddings, head and norms stay with AdamW. torch's Muon scales
its update to AdamW's size ("match_rms_adamw", Liu et al., 2025), so one learning rate serves both.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments

from minimind.common.errors import UserError
from minimind.common.launch import bf16_is_fast


class Bf16AsFp32(TorchFunctionMode):
    """A context in which `tensor.bfloat16()` returns a copy in fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """Identical to torch's except: its Newton-Schulz iteration runs in fp32 on a device that only
    emulates bf16.

    The precision does not matter: the result of the iteration is only nearly orthogonal anyway.
    """

    def step(self, closure=None):
        """One step on all matrices, which are on one kind of device."""
        device = self.param_groups[0]["params"][0].device.type
        with nullcontext() if bf16_is_fast(device) else Bf16AsFp32():
            return super().step(closure)


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers in one, with shared parameter groups, so that one schedule drives both."""

    def __init__(self, matrices: Iterable, others: Iterable, lr, weight_decay, betas, eps):
        self.parts = [
            Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=betas, eps=eps, fused=True),
        ]
        groups = [{"params": group["params"]} for part in self.parts for group in part.param_groups]
        super().__init__(groups, {"lr": lr})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        """One step of each part."""
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict:
        """The states of the parts, in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of `state_dict`, and share the groups again."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def check_optimizer(args: TrainingArguments) -> None:
    """Build the library's optimizer for a single weight: the run's own is built after all data is
    read.

    Raises:
        ValueError: a package is missing, or the arguments do not fit.
    """
    if args.deepspeed:  # it builds its own
        return
    model = nn.Linear(1, 1)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not options.keys() & {"params", "model", "optimizer_dict"}:
            kind(model.parameters(), **options)
    except Exception as error:  # each optimizer raises its own
        arguments = f" with --optim_args {args.optim_args}" if args.optim_args else ""
        raise ValueError(
            f"--optim {args.optim.value}{arguments} cannot be built: {error}"
        ) from error


def build_optimizer(model: nn.Module, args) -> torch.optim.Optimizer | None:
    """Muon with AdamW if the arguments name it, else None: then the Trainer builds its own.

    Raises:
        UserError: Muon under DeepSpeed, whose ZeRO hands an optimizer flat shards instead of
            matrices, or for a mixture of experts, whose matrices are stacked.
    """
    if not args.use_muon:
        return None
    if args.deepspeed:
        raise UserError(
            "--optim muon cannot run under --deepspeed, which cuts matrices into flat shards. Drop"
            " one."
        )
    if model.config.num_experts:
        raise UserError(
            "--optim muon cannot train stacked experts: torch's Muon takes matrices. Use"
            " adamw_torch_fused."
        )
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inside else others).append(parameter)
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW(
        matrices, others, args.learning_rate, args.weight_decay, betas, args.adam_epsilon
    )
