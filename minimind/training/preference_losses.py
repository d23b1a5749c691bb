"""The losses of train_dpo.py and train_kto.py: which options each of them reads, and those that
TRL's DPOTrainer lacks. docs/preference.md has the formula of each, and when to take it."""

from torch import Tensor
from torch.nn.functional import logsigmoid

# Those of DPOTrainer
LOSSES = ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "apo_zero", "apo_down", "discopop"]
LOSSES += ["exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "sft"]
# Those that compare with no reference model
REFERENCE_FREE = ["simpo", "orpo", "sft"]
PAIRED = [name for name in LOSSES if name != "sft"]
SORTING = ["aot", "aot_unpaired"]
# Those in which an f-divergence's unknown constant cancels (Wang et al., 2024, arXiv 2309.16240)
DIFFERENCES = ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "discopop", "exo_pair"]
# Options, and the losses of which at least one must be there to read it
READERS = {
    "discopop_tau": ["discopop"],
    "f_divergence_type": DIFFERENCES,
    "label_smoothing": ["robust", "exo_pair", *SORTING],
    "ld_alpha": PAIRED,
    "simpo_gamma": ["simpo"],
}
# Options, and the losses that go with them
COMPANIONS = {
    "f_divergence_type": [*DIFFERENCES, "sft"],
    "use_weighting": [name for name in PAIRED if name not in SORTING],
}
# Options, and the value of another that they need
NEEDS = {
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence"),
    "ref_model_mixup_alpha": ("sync_ref_model", True),
    "ref_model_sync_steps": ("sync_ref_model", True),
    "ref_model_on_cpu": ("precompute_ref_log_probs", False),
    "sync_ref_model": ("precompute_ref_log_probs", False),
}


def needs_reference(losses: list[str]) -> bool:
    """Whether any of the losses compares with a reference model."""
    return not set(losses) <= set(REFERENCE_FREE)


def is_given(args, name: str) -> bool:
    """Whether an option of `args` has another value than its default."""
    return getattr(args, name) != type(args).__dataclass_fields__[name].default


def check_needs(args) -> None:
    """Raise ValueError for an option that has no meaning without the value of another."""
    for name, (other, value) in NEEDS.items():
        if hasattr(args, name) and is_given(args, name) and getattr(args, other) != value:
            raise ValueError(f"--{name} needs --{other} {str(value).lower()}")


def check_losses(args) -> None:
    """Raise ValueError for options of a `DPOStageConfig` that do not fit its losses, or each
    other, which TRL ignores or refuses only after the run has begun to write."""
    losses = args.loss_type
    shown = f"--loss_type {' '.join(losses)}"

    # Options of single losses
    for name, readers in READERS.items():
        if is_given(args, name) and not set(losses) & set(readers):
            raise ValueError(
                f"{shown} does not read --{name}, which is for {', '.join(readers)}: leave it out"
            )
    for name, companions in COMPANIONS.items():
        if is_given(args, name) and (others := [each for each in losses if each not in companions]):
            raise ValueError(
                f"--{name} has no meaning for the loss {others[0]}, only for"
                f" {', '.join(companions)}"
            )
    if "exo_pair" in losses and not args.label_smoothing:
        raise ValueError("--loss_type exo_pair needs --label_smoothing above 0, such as 0.001")
    if set(losses) & set(SORTING) and args.per_device_train_batch_size == 1:
        raise ValueError(
            f"{shown} compares the pairs of a batch: raise --per_device_train_batch_size above 1"
        )
    if args.loss_weights is not None and not any(args.loss_weights):
        raise ValueError("--loss_weights are all 0, which would train nothing")

    # The reference
    if not needs_reference(losses):
        for name in ("precompute_ref_log_probs", "ref_model_on_cpu", "sync_ref_model"):
            if is_given(args, name):
                raise ValueError(f"{shown} compares with no reference model: leave out --{name}")
    check_needs(args)
    if args.ref_model_on_cpu and args.sync_ref_model:
        raise ValueError(
            "--sync_ref_model mixes weights of both models, so they must be on one device: leave"
            " out --ref_model_on_cpu"
        )


def check_kto(args) -> None:
    """The same for a `KTOStageConfig`."""
    if args.loss_type == "kto":
        if args.per_device_train_batch_size < 2:
            raise ValueError(
                "--loss_type kto estimates the KL divergence from the other replies of a batch:"
                " raise --per_device_train_batch_size above 1"
            )
        if args.train_sampling_strategy != "sequential":
            raise ValueError(
                "--loss_type kto needs --train_sampling_strategy sequential: each reply has its"
                " neighbour's prompt; the rows are shuffled once before training"
            )
    if not args.desirable_weight and not args.undesirable_weight:
        raise ValueError(
            "--desirable_weight and --undesirable_weight are both 0, which trains nothing"
        )
    check_needs(args)


# The losses that TRL lacks, from mean log-probabilities of the tokens of chosen and rejected
# replies, (pairs,) each, to the loss of each pair, (pairs,)


def simpo_loss(chosen: Tensor, rejected: Tensor, args) -> Tensor:
    """SimPO (Meng et al., 2024, arXiv 2405.14734, equation 6): a margin of `simpo_gamma` between
    mean log-probabilities that are scaled by `beta`."""
    return -logsigmoid(args.beta * (chosen - rejected) - args.simpo_gamma)


def orpo_loss(chosen: Tensor, rejected: Tensor, args) -> Tensor:
    """ORPO (Hong et al., 2024, arXiv 2403.07691, equations 3 to 7): the cross-entropy of the chosen
    reply, and `beta` (the paper's lambda) times the logistic loss of the log odds ratio."""

    def log_odds(mean: Tensor) -> Tensor:  # log(p / (1 - p)), p = exp(mean)
        return mean - (-mean.expm1()).log()

    return -chosen - args.beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


OWN_LOSSES = {"simpo": simpo_loss, "orpo": orpo_loss}
