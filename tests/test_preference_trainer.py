"""The trainer of preference pairs against TRL's own, in fp32."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from one_step import move, step_of
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from minimind import MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.data.preference_batches import (
    CHOSEN,
    PADDING,
    PARTS,
    REJECTED,
    ROW,
    SHARED,
    PreferenceCollator,
    balanced_rows,
    visible_tokens,
)
from minimind.training.preference_trainer import PreferenceTrainer

# TRL 1.16 asks for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class LibraryTrainer(DPOTrainer):
    """TRL's, except: it takes token ids."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def pair_rows(count=6, seed=0):
    """Random pairs; the first ones have no prompt, replies that begin alike, one within the
    other."""
    numbers, rows = random.Random(seed), []

    def tokens(length):
        return [numbers.randrange(3, 300) for _ in range(length)]

    for index in range(count):
        prompt, chosen = tokens(numbers.randrange(1, 60)), tokens(numbers.randrange(2, 30))
        rejected = tokens(numbers.randrange(2, 30))
        if index == 0:
            prompt = []
        if index == 1:
            rejected = chosen[:2] + rejected
        if index == 2:
            rejected = chosen + rejected
        row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        rows.append(row | {f"{n}_mask": [1] * len(row[f"{n}_ids"]) for n in ("chosen", "rejected")})
    return rows


@pytest.fixture
def make(tokenizer, tmp_path):
    """Make a trainer whose model is not its reference any more."""

    def make(kind, model, rows, peft=None, **options):
        with warnings.catch_warnings():  # TRL's loss "sft" and its likes warn of nothing we use
            warnings.simplefilter("ignore", FutureWarning)
            args = DPOConfig(
                **{"output_dir": str(tmp_path / kind.__name__), "max_length": 200, "bf16": False}
                | {"use_cpu": True, "dataloader_pin_memory": False, "report_to": "none"}
                | {"gradient_checkpointing": None, "disable_tqdm": True}
                | {"precompute_ref_log_probs": kind is PreferenceTrainer, **options}
            )
        precomputed = args.precompute_ref_log_probs or peft
        trainer = kind(
            model=copy.deepcopy(model),
            ref_model=None if precomputed else copy.deepcopy(model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:3]),
            processing_class=tokenizer,
            peft_config=peft,
        )
        move(trainer.model, seed=1, scale=0.02)
        return trainer

    return make


def assert_same_step(ours, theirs):
    (loss, gradients, metrics), (expected, their_gradients, their_metrics) = (
        step_of(trainer) for trainer in (ours, theirs)
    )
    assert loss == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=name)
    shared = {name: metrics[name] for name in their_metrics}
    assert shared == pytest.approx(their_metrics, abs=1e-3)


LOSSES = [
    {},
    {"loss_type": ["sft", "ipo", "sigmoid_norm"], "loss_weights": [1.0, 0.1, 0.5]},
    {"loss_type": ["apo_zero", "aot"], "loss_weights": [1.0, 1.0], "label_smoothing": 0.1},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    {"f_divergence_type": "js_divergence"},
]


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(map(str, options)))
def test_loss_gradients_and_metrics_are_those_of_trl(model, make, options):
    rows = pair_rows()
    ours, theirs = (
        make(kind, model, rows, **options) for kind in (PreferenceTrainer, LibraryTrainer)
    )
    assert ours.ref_model is None
    assert_same_step(ours, theirs)


def test_the_load_balancing_loss_is_that_of_trl(config, make):
    config.num_experts, config.moe_intermediate_size, config.router_aux_loss_coef = 4, 32, 0.1
    model = MiniMindForCausalLM(config)
    rows = pair_rows()
    ours, theirs = (make(kind, model, rows) for kind in (PreferenceTrainer, LibraryTrainer))
    assert_same_step(ours, theirs)
    assert ours._metrics["train"]["aux_loss"][0] > 0.5


def test_with_an_adapter_the_reference_is_the_model_without_it(model, make):
    rows, peft = pair_rows(), LoraConfig(target_modules=["q_proj", "down_proj"])
    assert_same_step(
        *(make(kind, model, rows, peft) for kind in (PreferenceTrainer, LibraryTrainer))
    )


@pytest.mark.parametrize("attention", ["eager"])
def test_without_tree_masks_prompts_are_repeated_with_the_same_result(model, make, attention):
    rows = pair_rows()
    theirs = make(LibraryTrainer, model, rows)
    model.set_attn_implementation(attention)
    ours = make(PreferenceTrainer, model, rows)
    assert not (
        ours.data_collator(list(ours.train_dataset))["packed_parts"] % PARTS == SHARED
    ).any()
    assert_same_step(ours, theirs)


def test_results_of_tools_inside_a_reply_are_context_alone(model, make):
    rows = pair_rows()
    for row in rows:
        row["chosen_mask"][len(row["chosen_mask"]) // 2] = 0
    rows[3]["rejected_mask"] = [0] * len(rows[3]["rejected_mask"])
    ours, theirs = (make(kind, model, rows) for kind in (PreferenceTrainer, LibraryTrainer))
    theirs.data_collator = PreferenceCollator(ours.data_collator.pad_token_id)
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_with_accumulation_and_evaluation_is_trls(model, make, size):
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    options |= {"logging_steps": 1, "num_train_epochs": 2, "eval_strategy": "epoch"}
    options |= {"learning_rate": 1e-3, "save_strategy": "no", "per_device_eval_batch_size": 2}
    logs = []
    for kind in (PreferenceTrainer, LibraryTrainer):
        trainer = make(kind, model, pair_rows(7), **options)
        trainer.train()
        logs.append(
            [
                {k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k}
                for entry in trainer.state.log_history
            ]
        )
    ours, theirs = ([e for e in log if "train_loss" not in e] for log in logs)
    assert len(ours) == len(theirs) >= 4
    for entry, expected in zip(ours, theirs, strict=True):
        # Their first step has the learning rate 0 only with a warm-up
        shared = {name: entry[name] for name in expected}
        assert shared == pytest.approx(expected, abs=2e-3)


# Rows


def test_a_shared_prompt_gives_the_logits_of_two_sequences(model):
    prompt, chosen, rejected = [5, 6, 7, 8], [9, 10, 11], [12, 13]
    ids = torch.tensor([prompt + chosen + rejected + [0]])
    parts = [SHARED] * 4 + [CHOSEN] * 3 + [REJECTED] * 2 + [PADDING]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 0]])
    mask = visible_tokens(torch.tensor([parts]))
    with torch.no_grad():
        tree = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
        two = [model(torch.tensor([prompt + reply])).logits[0] for reply in (chosen, rejected)]
    torch.testing.assert_close(tree[:7], two[0])
    torch.testing.assert_close(tree[7:9], two[1][4:])
    assert tree.isfinite().all()


def test_a_batch_has_each_prompt_once_and_hardly_any_padding():
    rows = pair_rows(40)
    batch = PreferenceCollator(0, packed=True)(rows)
    parts = batch["packed_parts"]
    for pair, row in enumerate(rows[3:], start=3):
        sizes = [int((parts == PARTS * pair + part).sum()) for part in range(PARTS)]
        assert sizes[0] >= len(row["prompt_ids"])
        assert sizes[0] + sizes[1] == len(row["prompt_ids"] + row["chosen_ids"])
        assert sizes[0] + sizes[2] == len(row["prompt_ids"] + row["rejected_ids"])
    assert parts.shape[1] <= ROW
    assert (parts == PADDING).float().mean() < 0.06
    assert parts.shape[1] % 64 == 0  # few shapes
    # Each place holds the token that TRL's batch has there, and predicts the next
    flat, targets = batch["packed_ids"].flatten(), batch["packed_targets"]
    assert flat[batch["packed_states"]].equal(batch["input_ids"][:, :-1].flatten()[targets])
    assert batch["completion_mask"][:, 1:].sum() == len(targets)


def test_rows_are_filled_evenly_and_never_beyond_their_capacity():
    sizes = [700, 690, 650, 10, 10]
    rows = balanced_rows(sizes, 1024)
    assert sorted(item for row in rows for item in row) == [0, 1, 2, 3, 4]
    assert max(sum(sizes[item] for item in row) for row in rows) <= 1024


# References


def count_references(monkeypatch):
    """Count the forward passes of references from now on."""
    calls = []
    compute = PreferenceTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        PreferenceTrainer,
        "compute_ref_log_probs",
        lambda self, *args: calls.append(1) or compute(self, *args),
    )
    return calls


def test_references_are_computed_once_for_the_same_rows_and_weights(model, make, monkeypatch):
    calls, rows = count_references(monkeypatch), pair_rows()
    first = make(PreferenceTrainer, model, rows)
    computed = len(calls)
    again = make(PreferenceTrainer, model, rows, beta=0.7, learning_rate=1e-2)
    assert len(calls) == computed > 0
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert again.train_dataset[name] == first.train_dataset[name]


@pytest.mark.parametrize("change", ["weights", "rows", "mask", "option", "damage"])
def test_references_of_anything_else_are_computed_again(model, make, monkeypatch, change, tmp_path):
    rows = pair_rows()
    before = make(PreferenceTrainer, model, rows)
    calls, options = count_references(monkeypatch), {}
    if change == "weights":
        model.lm_head.weight.data[7, 7] += 0.1
    elif change == "rows":
        rows[4]["rejected_ids"][-1] += 1
    elif change == "mask":
        rows[4]["rejected_mask"][-1] = 0
    elif change == "option":
        options["ld_alpha"] = 0.5
    else:
        for file in (tmp_path / "cache" / "references").glob("*/log_probabilities.npy"):
            damaged = np.load(file)
            damaged[0, 0] += 1
            np.save(file, damaged)
    after = make(PreferenceTrainer, model, rows, **options)
    assert calls
    same = after.train_dataset["ref_chosen_logps"] == before.train_dataset["ref_chosen_logps"]
    # Those of chosen replies are the same where only a rejected one has changed
    assert same == (change in ("damage", "rows", "mask"))


def test_references_that_are_not_complete_leave_nothing_behind(model, make, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        make(PreferenceTrainer, model, pair_rows())
    assert not list((tmp_path / "cache" / "references").glob("*/"))
