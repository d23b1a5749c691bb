"""`optim: muon` in a recipe: Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix; it is defined for matrices
that map features to features, so embeddings, head and norms stay with AdamW. An expert's weights
are matrices too, E of them stacked. The update is scaled to AdamW's size (Liu et al., 2025,
arXiv 2502.16982, equation 4), so one learning rate serves both.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import Trainer, TrainingArguments

from minimind.common.errors import UserError
from minimind.common.launch import bf16_is_fast

BATCH = 2**23  # elements of matrices that are orthogonalised together, since each needs 20 bytes

# Polar Express (Amsel et al., 2025, arXiv 2505.16932, algorithm 1): each step's odd polynomial
# ax + bx^3 + cx^5 is the one that brings all singular values nearest to 1, if those before the
# first step are in [0.003, 1]. All but the last are of x / 1.01, against rounding.
POLAR_EXPRESS = (
    (8.1377239, -22.7137086, 16.3254376),
    (3.9652238, -2.8364010, 0.5224674),
    (3.4886747, -2.5621673, 0.5016249),
    (2.5115272, -1.8524484, 0.4388326),
)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows of each of `matrices` (N, A, B), A <= B.

    Computed in bf16 where the device has it, else in fp32; the result is in that precision. Its
    singular values are within 0.22 of 1, if they were at least 0.003 of the matrix's norm.
    """
    dtype = torch.bfloat16 if bf16_is_fast(matrices.device.type) else torch.float32
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (matrices / (1.01 * norm).clamp(min=1e-7)).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    return x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the parameters of groups with "use_muon", fused AdamW for the others.

    Args:
        matrices: parameters of shape (A, B) or (E, A, B), for Muon with `momentum` (Nesterov's).
        others: parameters for AdamW, without weight decay.
        lr, weight_decay: of both, and of Muon.
        betas, eps: of AdamW.
        momentum: of Muon.

    A step waits for nothing: as in torch's fused optimizers, the attribute `found_inf` may hold a
    tensor that is 1 where a step has to be skipped.
    """

    def __init__(
        self, matrices: Iterable, others: Iterable, lr, weight_decay, betas, eps, momentum=0.95
    ):
        groups = [
            {"params": list(matrices), "use_muon": True, "weight_decay": weight_decay},
            {"params": list(others), "use_muon": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._step_muon if group["use_muon"] else self._step_adamw)(group, params)

    def _step_muon(self, group: dict, params: list[Tensor]) -> None:
        for batch in batches(params):
            self._step_batch(group, batch)

    def _step_batch(self, group: dict, params: list[Tensor]) -> None:
        """One step of Muon on matrices that are orthogonalised together."""
        grads, buffers = [p.grad for p in params], self._states(params, "momentum_buffer")
        found_inf, lr = getattr(self, "found_inf", None), group["lr"]

        # Where the step is skipped, the momentum moves towards itself, and the rate is 0
        if found_inf is not None:
            pairs = zip(buffers, grads, strict=True)
            grads = [torch.where(found_inf > 0, buffer, grad) for buffer, grad in pairs]
            lr = lr * (1 - found_inf)
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        wide = [_wide(u) for u in torch._foreach_lerp(grads, buffers, group["momentum"])]

        moves = orthogonalized(torch.cat(wide)) * (-0.2 * wide[0].shape[-1] ** 0.5 * lr)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for p, move in zip(params, moves.split([len(each) for each in wide]), strict=True):
            p.add_((move if p.shape[-2] <= p.shape[-1] else move.mT).view_as(p))

    def _step_adamw(self, group: dict, params: list[Tensor]) -> None:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        adamw(
            params,
            [p.grad for p in params],
            self._states(params, "exp_avg"),
            self._states(params, "exp_avg_sq"),
            [],
            [self.state[p]["step"] for p in params],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _states(self, params: list[Tensor], name: str) -> list[Tensor]:
        """One state of each parameter; at first it is zero."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of `state_dict`, or that of an earlier version, which had two parts."""
        if "parts" in state_dict:
            state_dict = self._joined(*state_dict["parts"])
        super().load_state_dict(state_dict)

    def _joined(self, muon: dict, adamw: dict) -> dict:
        groups, first = self.state_dict()["param_groups"], len(self.param_groups[0]["params"])
        for group, part in zip(groups, (muon, adamw), strict=True):
            rates = {"lr", "initial_lr", "weight_decay"}
            group.update((k, v) for k, v in part["param_groups"][0].items() if k in rates)
        shifted = {first + index: state for index, state in adamw["state"].items()}
        return {"state": muon["state"] | shifted, "param_groups": groups}


def batches(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters whose matrices have one shape, turned or not, with at most `BATCH` elements."""
    by_shape = defaultdict(list)
    for p in params:
        by_shape[tuple(sorted(p.shape[-2:]))].append(p)
    parts = []
    for same in by_shape.values():
        count = max(1, BATCH // max(p.numel() for p in same))
        parts += [same[first : first + count] for first in range(0, len(same), count)]
    return parts


def _wide(update: Tensor) -> Tensor:
    """A matrix (A, B) or a stack of them (E, A, B) as (N, smaller, larger)."""
    stack = update.view(-1, *update.shape[-2:])
    return stack if stack.shape[1] <= stack.shape[2] else stack.mT


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
            matrices.
    """
    if not args.use_muon:
        return None
    if args.deepspeed:
        raise UserError(
            "--optim muon cannot run under --deepspeed, which cuts matrices into flat shards. Drop"
            " one."
        )
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inside else others).append(parameter)
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW(
        matrices, others, args.learning_rate, args.weight_decay, betas, args.adam_epsilon
    )
