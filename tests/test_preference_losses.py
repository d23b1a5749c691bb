"""Each loss against the formula of its paper, from log-probabilities of plain forward passes; and
the references, which all give the same."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from one_step import loss_of, move
from peft import LoraConfig
from pipeline import pair_rows, run_script, short_run
from torch.nn.functional import log_softmax
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from minimind import MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.training.arguments import DPOStageConfig
from minimind.training.preference_losses import LOSSES, OWN_LOSSES
from minimind.training.preference_trainer import PreferenceTrainer
from minimind.training.starting_point import reference_model

# TRL 1.16 asks for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Two pairs, whose four replies have different lengths
PAIRS = [([5, 6, 7, 8], [9, 10, 11, 12, 13], [14, 15]), ([20, 21], [22, 23, 24], [25] * 7)]
NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")
ROWS = [
    dict(zip(NAMES, pair, strict=True))
    | {"chosen_mask": [1] * len(pair[1]), "rejected_mask": [1] * len(pair[2])}
    for pair in PAIRS
]
REFERENCES = {
    "precomputed": {},
    "memory": {"precompute_ref_log_probs": False},
    "cpu": {"precompute_ref_log_probs": False, "ref_model_on_cpu": True},
}


@pytest.fixture
def make(tokenizer, tmp_path):
    """Make a trainer of ROWS; its model is not its reference any more, unless `same`."""

    def make(model, peft=None, same=False, **options):
        with warnings.catch_warnings():  # TRL's loss "sft" warns of nothing we use
            warnings.simplefilter("ignore", FutureWarning)
            args = DPOStageConfig(
                **{"output_dir": str(tmp_path / "run"), "bf16": False, "report_to": "none"}
                | {"disable_tqdm": True, "per_device_train_batch_size": 2, **options}
            )
        trainer = PreferenceTrainer(
            model=copy.deepcopy(model),
            ref_model=reference_model(model, args, SimpleNamespace(use_peft=peft is not None)),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            peft_config=peft,
        )
        if not same:
            move(trainer.model, seed=1, scale=0.05)
        return trainer

    return make


@torch.no_grad()
def reply_log_probs(model, prompt, reply):
    """The log-probability of each token of a reply, by a forward pass of it alone."""
    logits = model(torch.tensor([prompt + reply])).logits[0].double()
    predictions = log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return [predictions[place, token].item() for place, token in enumerate(reply)]


def pairs_of(policy, reference, alpha=1.0):
    """What the formulas read of each pair: sums of log-probabilities w, u (policy), v, m
    (reference), lengths n, k; tokens that the longer reply has more count `alpha` times."""
    found = []
    for prompt, *replies in PAIRS:
        shared = min(map(len, replies))

        def total(model, reply, prompt=prompt, shared=shared):
            values = reply_log_probs(model, prompt, reply)
            return sum(values[:shared]) + alpha * sum(values[shared:])

        w, u, v, m = (total(model, reply) for model in (policy, reference) for reply in replies)
        n, k = map(len, replies)
        found.append(SimpleNamespace(w=w, u=u, v=v, m=m, n=n, k=k, h=w - v, g=u - m))
    return found


def sigma(x):
    return 1 / (1 + math.exp(-x))


def nll(x):
    return -math.log(sigma(x))


def mean_of(formula):
    """The mean over pairs of a formula of one."""
    return lambda pairs, *values: sum(formula(p, *values) for p in pairs) / len(pairs)


B = 0.7  # beta, IPO's tau, ORPO's lambda
E = 0.1  # label smoothing
T = 0.05  # DiscoPOP's tau
G = 0.3  # SimPO's margin


def exo(p):
    q = sigma(B * (p.h - p.g))
    return q * math.log(q / (1 - E)) + (1 - q) * math.log((1 - q) / E)


def discopop(p):
    rho = B * (p.h - p.g)
    mixed = sigma(rho / T)
    return (1 - mixed) * math.log(1 + math.exp(-rho)) + mixed * math.exp(-rho)


def orpo(p):
    x, y = math.exp(p.w / p.n), math.exp(p.u / p.k)
    return -p.w / p.n + B * nll(math.log(x / (1 - x)) - math.log(y / (1 - y)))


def smoothed(x):
    return (1 - E) * nll(B * x) + E * nll(-B * x)


def sorted_mean(firsts, seconds):
    pairs = list(zip(sorted(firsts), sorted(seconds), strict=True))
    return sum(smoothed(first - second) for first, second in pairs) / len(pairs)


FORMULAS = {
    # Rafailov et al., 2023, equation 7
    "sigmoid": mean_of(lambda p: nll(B * (p.h - p.g))),
    # Lambert et al., 2024 (Tulu 3), equation 6
    "sigmoid_norm": mean_of(lambda p: nll(B * (p.h / p.n - p.g / p.k))),
    # Azar et al., 2023, equation 17, with means over tokens
    "ipo": mean_of(lambda p: (p.h / p.n - p.g / p.k - 1 / (2 * B)) ** 2),
    # Zhao et al., 2023 (SLiC-HF), on DPO's rewards (Liu et al., 2023)
    "hinge": mean_of(lambda p: max(0, 1 - B * (p.h - p.g))),
    # Chowdhury et al., 2024 (rDPO)
    "robust": mean_of(
        lambda p: ((1 - E) * nll(B * (p.h - p.g)) - E * nll(B * (p.g - p.h))) / (1 - 2 * E)
    ),
    # D'Oosterlinck et al., 2024, equations 7 and 8; + 1
    "apo_zero": mean_of(lambda p: 1 - sigma(B * p.h) + sigma(B * p.g)),
    "apo_down": mean_of(lambda p: 1 + sigma(B * p.h) - sigma(B * (p.h - p.g))),
    # Lu et al., 2024, equation 5
    "discopop": mean_of(discopop),
    # Ji et al., 2024, equation 16
    "exo_pair": mean_of(exo),
    # Chen et al., 2024 (NCA), for two replies
    "nca_pair": mean_of(lambda p: nll(B * p.h) + nll(-B * p.h) / 2 + nll(-B * p.g) / 2),
    # Jung et al., 2024, without its reward shift
    "bco_pair": mean_of(lambda p: nll(B * p.h) + nll(-B * p.g)),
    # Wu et al., 2024, equation 4.7, with certain preferences; eta = 1 / beta
    "sppo_hard": mean_of(lambda p: (p.h - 1 / (2 * B)) ** 2 + (p.g + 1 / (2 * B)) ** 2),
    # Melnyk et al., 2024: order statistics of the batch
    "aot": lambda pairs: sorted_mean([p.w - p.u for p in pairs], [p.v - p.m for p in pairs]),
    "aot_unpaired": lambda pairs: sorted_mean([p.h for p in pairs], [p.g for p in pairs]),
    # The cross-entropy of chosen replies, a mean over tokens
    "sft": lambda pairs: -sum(p.w for p in pairs) / sum(p.n for p in pairs),
    # Meng et al., 2024, equation 6
    "simpo": mean_of(lambda p: nll(B * p.w / p.n - B * p.u / p.k - G)),
    # Hong et al., 2024, equations 3 to 7
    "orpo": mean_of(orpo),
}
OPTIONS = {name: {"label_smoothing": E} for name in ("robust", "exo_pair", "aot", "aot_unpaired")}
OPTIONS |= {"discopop": {"discopop_tau": T}, "simpo": {"simpo_gamma": G}}


def test_every_loss_has_a_formula_here():
    assert set(FORMULAS) == {*LOSSES, *OWN_LOSSES}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_the_formula_of_its_paper(model, make, name):
    trainer = make(model, loss_type=[name], beta=B, **OPTIONS.get(name, {}))
    expected = FORMULAS[name](pairs_of(trainer.model, model))
    assert loss_of(trainer).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reference", REFERENCES)
def test_replies_of_different_lengths_count_as_ld_dpo_weighs_them(model, make, reference):
    """Liu et al., 2024 (LD-DPO): tokens beyond the shorter reply's length count alpha times."""
    trainer = make(model, beta=B, ld_alpha=0.4, **REFERENCES[reference])
    expected = FORMULAS["sigmoid"](pairs_of(trainer.model, model, alpha=0.4))
    assert loss_of(trainer).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_mixture_is_the_weighted_sum_of_its_losses(model, make, reference):
    names, weights = ["sigmoid_norm", "sft", "orpo"], [0.8, 0.2, 0.5]
    options = {"loss_type": names, "loss_weights": weights, "beta": B}
    trainer = make(model, **options, **REFERENCES[reference])
    pairs = pairs_of(trainer.model, model)
    expected = sum(
        weight * FORMULAS[name](pairs) for name, weight in zip(names, weights, strict=True)
    )
    assert loss_of(trainer).item() == pytest.approx(expected, rel=1e-4)


def test_the_load_balancing_loss_of_experts_is_added(config, make):
    config.num_experts, config.moe_intermediate_size, config.router_aux_loss_coef = 4, 32, 0.1
    trainer = make(MiniMindForCausalLM(config), loss_type=["simpo"], beta=B, simpo_gamma=G)
    loss = loss_of(trainer).item()
    expected = FORMULAS["simpo"](pairs_of(trainer.model, trainer.model))

    # Of the four sequences, each by itself
    ids = [torch.tensor([prompt + reply]) for prompt, *replies in PAIRS for reply in replies]
    with torch.no_grad():
        found = [trainer.model(each, output_router_logits=True).router_logits for each in ids]
    layers = tuple(map(torch.cat, zip(*found, strict=True)))
    balance = load_balancing_loss_func(layers, 4, config.num_experts_per_tok).item()
    assert loss == pytest.approx(expected + 0.1 * balance, rel=1e-4)


# References


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_first_loss_is_ln_2_and_references_are_all_alike(model, make, reference, adapter):
    peft = LoraConfig(target_modules=["q_proj", "down_proj"]) if adapter else None
    options = REFERENCES[reference]
    if adapter and reference == "cpu":
        with pytest.raises(UserError, match="--ref_model_on_cpu is about a second model"):
            make(model, peft, **options)
        return
    first = loss_of(make(model, peft, same=True, **options)).item()
    assert first == pytest.approx(math.log(2), abs=1e-6)

    trainer = make(model, peft, beta=B, **options)
    loss = loss_of(trainer)
    loss.backward()
    expected = FORMULAS["sigmoid"](pairs_of(trainer.model, model))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert abs(expected - math.log(2)) > 0.01
    # Only the model is trained
    for each in (trainer.ref_model, trainer.cpu_reference):
        assert each is None or all(p.grad is None for p in each.parameters())
    assert (trainer.ref_model is not None) == (reference == "memory" and not adapter)


def test_losses_without_a_reference_compute_none_and_reward_mean_log_probabilities(
    model, make, monkeypatch
):
    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", None)
    trainer = make(model, loss_type=["simpo", "sft"], beta=B)
    loss_of(trainer)
    pairs = pairs_of(trainer.model, model)
    chosen, rejected = [B * p.w / p.n for p in pairs], [B * p.u / p.k for p in pairs]
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    expected = {"chosen": sum(chosen) / 2, "rejected": sum(rejected) / 2}
    expected["margins"] = expected["chosen"] - expected["rejected"]
    expected["accuracies"] = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 2
    for name, value in expected.items():
        assert metrics[f"rewards/{name}"] == pytest.approx(value, rel=1e-4), name


# Refusals


REFUSED = [
    ({"label_smoothing": 0.1}, "--loss_type sigmoid does not read --label_smoothing"),
    ({"loss_type": ["sft"], "ld_alpha": 0.5}, "does not read --ld_alpha"),
    ({"simpo_gamma": 0.1}, "does not read --simpo_gamma"),
    ({"loss_type": ["exo_pair"]}, "exo_pair needs --label_smoothing above 0"),
    ({"loss_type": ["aot"], "per_device_train_batch_size": 1}, "compares the pairs of a batch"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 0.0]}, "--loss_weights are all 0"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "must have the same length"),
    ({"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"}, "--f_divergence_type, which"),
    (
        {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "forward_kl"},
        "no meaning for the loss apo_zero",
    ),
    ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, "no meaning for the loss sft"),
    ({"loss_type": ["simpo"], "precompute_ref_log_probs": False}, "compares with no reference"),
    ({"sync_ref_model": True}, "--sync_ref_model needs --precompute_ref_log_probs false"),
    ({"ref_model_on_cpu": True}, "--ref_model_on_cpu needs --precompute_ref_log_probs false"),
    ({"ref_model_mixup_alpha": 0.5}, "--ref_model_mixup_alpha needs --sync_ref_model true"),
    (
        {"sync_ref_model": True, **REFERENCES["cpu"]},
        "so they must be on one device: leave out --ref_model_on_cpu",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[text for _, text in REFUSED])
def test_options_that_do_not_fit_the_losses_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOStageConfig(output_dir=str(tmp_path), **{"per_device_train_batch_size": 2} | options)


@pytest.mark.parametrize("option", ["sync_ref_model", "ref_model_on_cpu"])
def test_with_an_adapter_an_option_about_a_second_model_stops_before_anything_is_written(
    model, tokenizer, tmp_path, monkeypatch, write_jsonl, capsys, option
):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = short_run(
        tmp_path / "out",
        max_prompt_length=64,
        max_completion_length=64,
        precompute_ref_log_probs=False,
        use_peft=True,
    )
    words += [f"--{option}", "true", "--model_name_or_path", tmp_path / "base"]
    with pytest.raises(SystemExit):
        run_script(
            monkeypatch, "train_dpo", *words, "--train_files", write_jsonl("p.jsonl", pair_rows())
        )
    assert f"--{option} is about a second model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
