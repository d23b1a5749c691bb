"""`optim: muon` in a recipe: Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024) orthogonalises the momentum of each matrix; it is defined for matrices
that map features to features, so embeddings, head and norms stay with AdamW. An expert's weights
are matrices too, E of them stacked. The update is scaled to AdamW's size (Liu et al., 2025,
arXiv 2502.16982, equation 4), so that it takes AdamW's learning rates; what stays with AdamW beside
it learns best at a higher one (`OTHERS_RATE`).

Half of the matrices move at one step, the others at the next, each twice as far: the momentum
changes little in a step, and to orthogonalise it takes nearly all of the time.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from minimind.common.launch import bf16_is_fast
from minimind.costs.memory import MUON_BATCH

# Polar Express (Amsel et al., 2025, arXiv 2505.16932, algorithm 1): each step's odd polynomial
# ax + bx^3 + cx^5 is the one that brings all singular values nearest to 1, if those before the
# first step are in [0.01, 1]. All but the last are of x / 1.01, against rounding.
POLAR_EXPRESS = (
    (7.9102606, -22.0788217, 15.8691137),
    (3.6073447, -2.6466686, 0.5110397),
    (2.6712665, -1.9853154, 0.4535225),
)

# What AdamW trains beside Muon learns at this multiple of the learning rate, for each row of an
# embedding gets few gradients. 8 is better still on new text, worse on repeated text and for what
# comes after pretraining (docs/benchmarks.md).
OTHERS_RATE = 4


def orthogonalized(matrices: Sequence[Tensor]) -> Tensor:
    """The nearest matrix with orthonormal rows, nearly, of each in `matrices`: stacks of shape
    (N, A, B) with A <= B. The result has one after the other, in shape (sum of N, A, B).

    Its singular values are within 0.28 of 1, if they were at least 0.01 of the fourth root of the
    sum of their fourth powers; rounding in bf16 makes a few larger, up to 1.5. The products and the
    result are in bf16 where the device is fast in it, else in fp32.
    """
    dtype = torch.bfloat16 if bf16_is_fast(matrices[0].device.type) else torch.float32
    x = torch.cat([each.to(dtype) for each in matrices])

    # The root of the Gram matrix's norm is nearer to the largest singular value than x's norm is
    gram = x @ x.mT
    bound = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True, dtype=torch.float32)
    scale = (1.01**2 * bound).clamp(min=1e-14).rsqrt()
    gram = (gram * scale.square()).to(dtype)

    # The first two steps are products of Gram matrices (A, A), which cost less than those with x
    # (Gram Newton-Schulz, Zhang et al., 2026, https://tridao.me/blog/2026/gram-newton-schulz). The
    # last one needs a Gram matrix from x itself: rounding in bf16 has spoiled the other.
    first, second, third = POLAR_EXPRESS
    factor = _factor(gram, first)
    gram = factor @ (factor @ gram)
    x = (_factor(gram, second) @ factor * scale).to(dtype) @ x
    return _factor(x @ x.mT, third) @ x


def _factor(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """The matrix a + b gram + c gram^2, by which ax + bx^3 + cx^5 is a product with x."""
    a, b, c = coefficients
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def column_scales(matrices: Tensor) -> Tensor:
    """The factors (N, 1, B) that make the columns of each of `matrices` (N, A, B) equally long, the
    root of their mean square; in fp32.

    Of an orthogonal update with A < B the rows have equal lengths, the columns have not. They are
    the neurons of an MLP, be it the rows of gate and up or the columns of down, and would move by
    unequal lengths. NorMuon (Li et al., 2025, arXiv 2510.05491) divides rows by a running mean of
    their squares; without it there is no state, and the loss is lower (docs/benchmarks.md).
    """
    # `vector_norm` takes four times as long along the columns on a CPU
    squares = matrices.square().sum(-2, keepdim=True, dtype=torch.float32)
    return (squares.mean(-1, keepdim=True) / squares.clamp(min=1e-24)).sqrt()


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the parameters of groups with "use_muon", every second of them at each step, fused
    AdamW for the others.

    Args:
        matrices: parameters of shape (A, B) or (E, A, B), for Muon with `momentum` (Nesterov's).
        others: parameters for AdamW, at `OTHERS_RATE` times `lr` and without weight decay.
        lr, weight_decay: of Muon.
        betas, eps: of AdamW.
        momentum: of Muon.

    A step waits for nothing: as in torch's fused optimizers, the attribute `found_inf` may hold a
    tensor that is 1 where a step has to be skipped.
    """

    def __init__(
        self, matrices: Iterable, others: Iterable, lr, weight_decay, betas, eps, momentum=0.95
    ):
        self.matrices = list(matrices)
        groups = [
            {"params": self.matrices, "use_muon": True, "weight_decay": weight_decay, "turn": 0},
            {"params": list(others), "use_muon": False, "weight_decay": 0.0},
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": True}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and not group["use_muon"]:
                self._step_adamw(group, params)
            elif params:
                turn = group.get("turn", 0)  # there is none in earlier versions' checkpoints
                group["turn"] = 1 - turn
                if params[0].ndim == 1:
                    self._step_partition(group, params[0], self.matrices[turn::2])
                else:
                    self._step_muon(group, params, set(group["params"][turn::2]))

    def _step_muon(self, group: dict, params: list[Tensor], moving: set[Tensor]) -> None:
        found_inf, momentum = getattr(self, "found_inf", None), group["momentum"]
        for batch in batches(params):
            grads, buffers = [p.grad for p in batch], self._states(batch, "momentum_buffer")
            lr = group["lr"]

            # Where the step is skipped, the momentum moves towards itself, and the rate is 0
            if found_inf is not None:
                pairs = zip(buffers, grads, strict=True)
                grads = [torch.where(found_inf > 0, buffer, grad) for buffer, grad in pairs]
                lr = lr * (1 - found_inf)
            torch._foreach_lerp_(buffers, grads, 1 - momentum)

            states = zip(batch, grads, buffers, strict=True)
            own = [(p, grad.lerp(buffer, momentum)) for p, grad, buffer in states if p in moving]
            for p, move in self._moves(own, -2 * lr):
                p.mul_(1 - 2 * lr * group["weight_decay"]).add_(move)

    def _step_partition(self, group: dict, partition: Tensor, moving: list[Tensor]) -> None:
        """As `_step_muon`, for what ZeRO 1 and 2 give an optimizer instead of matrices: this
        process's part (P,) of all matrices of the group, one after the other.

        The momentum is kept for this part alone. The updates of all processes are put together, and
        each process orthogonalises the matrices that lie in its part, wholly or partly.
        """
        state = self.state[partition]
        if "exp_avg" in state:  # of shards for another number of processes (training/elastic.py)
            state["momentum_buffer"] = state.pop("exp_avg")
            del state["exp_avg_sq"]
        lr, (buffer,) = group["lr"], self._states([partition], "momentum_buffer")
        buffer.lerp_(partition.grad, 1 - group["momentum"])
        own = partition.grad.lerp(buffer, group["momentum"])
        world = dist.get_world_size() if dist.is_initialized() else 1
        whole = own.new_empty(world * len(own)) if world > 1 else own
        if world > 1:
            dist.all_gather(list(whole.chunk(world)), own)

        # ZeRO makes the parameters views of one tensor, so their addresses tell their places
        begin = min(p.data_ptr() for p in self.matrices)
        places = {p: (p.data_ptr() - begin) // p.element_size() for p in self.matrices}
        low = dist.get_rank() * len(own) if world > 1 else 0
        high = low + len(own)
        if max(first + p.numel() for p, first in places.items()) > len(whole):
            raise RuntimeError("ZeRO's partitions are not laid out as those of stage 1 and 2")
        present = [p for p in moving if places[p] < high and places[p] + p.numel() > low]

        for batch in batches(present):
            own = [(p, whole[places[p] : places[p] + p.numel()].view(p.shape)) for p in batch]
            for p, move in self._moves(own, -2 * lr):
                start, end = max(low, places[p]), min(high, places[p] + p.numel())
                part = partition[start - low : end - low]
                part.mul_(1 - 2 * lr * group["weight_decay"])
                part.add_(move.reshape(-1)[start - places[p] : end - places[p]])

    def _moves(self, updates: list[tuple[Tensor, Tensor]], rate) -> list[tuple[Tensor, Tensor]]:
        """Some parameters of one batch, each with its update, as the parameters with what is added
        to them: `rate` times the update orthogonalised, with equal columns, at the size of
        AdamW's."""
        if not updates:
            return []
        wide = [_wide(update) for _, update in updates]
        moves = orthogonalized(wide)
        scales = column_scales(moves) * (0.2 * wide[0].shape[-1] ** 0.5 * rate)
        moves = moves * scales.to(moves.dtype)
        pieces = zip(updates, moves.split([len(each) for each in wide]), strict=True)
        return [
            (p, (piece if p.shape[-2] <= p.shape[-1] else piece.mT).view(p.shape))
            for (p, _), piece in pieces
        ]

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
            lr=OTHERS_RATE * group["lr"],
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
    """Parameters whose matrices have one shape, turned or not, of at most `MUON_BATCH` elements."""
    by_shape = defaultdict(list)
    for p in params:
        by_shape[tuple(sorted(p.shape[-2:]))].append(p)
    parts = []
    for same in by_shape.values():
        count = max(1, MUON_BATCH // max(p.numel() for p in same))
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
    if getattr(args, "use_muon", False) and args.deepspeed:
        _check_muon_under_deepspeed(args.hf_deepspeed_config)
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


def _check_muon_under_deepspeed(config: HfDeepSpeedConfig) -> None:
    if "optimizer" in config.config:
        raise ValueError(
            "the DeepSpeed configuration has an 'optimizer' block, which would replace --optim"
            " muon. Remove the block."
        )
    stage, offloads = config.get_value("zero_optimization.stage", 0), config.is_offload()
    if refusal := muon_refusal(stage, offloads):
        raise ValueError(refusal)


def muon_refusal(zero_stage: int, offloads: bool) -> str:
    """Why Muon cannot train under such a ZeRO, which does not give it its matrices, or not on the
    device; "" where it can."""
    if zero_stage not in (1, 2):
        return (
            f"--optim muon under DeepSpeed is for ZeRO stage 1 or 2, and the configuration has"
            f" stage {zero_stage}. Set zero_optimization.stage to 2, or give --optim"
            " adamw_torch_fused."
        )
    if offloads:
        return (
            "--optim muon computes on the device, and the DeepSpeed configuration offloads the"
            " optimizer. Remove zero_optimization.offload_optimizer, or give --optim"
            " adamw_torch_fused."
        )
    return ""


def build_optimizer(model: nn.Module, args) -> torch.optim.Optimizer | None:
    """Muon with AdamW if the arguments name it, else None: then the Trainer builds its own."""
    if not args.use_muon:
        return None
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inside else others).append(parameter)
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW(
        matrices, others, args.learning_rate, args.weight_decay, betas, args.adam_epsilon
    )
