"""The trainer of reward models against TRL's own, in fp32."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from one_step import step_of
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer

from minimind import MiniMindForCausalLM
from minimind.model.modeling_minimind import load_balancing_loss
from minimind.stage_directory import with_score_head
from minimind.training.reward_trainer import RewardModelTrainer

# TRL 1.16 asks for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def pair_rows(count=6):
    """Random pairs; the first has no prompt, of the next two one reply begins with the other."""
    numbers, rows = random.Random(0), []
    for index in range(count):
        prompt, chosen, rejected = (
            [numbers.randrange(3, 300) for _ in range(numbers.randrange(2, most))]
            for most in (60, 30, 30)
        )
        prompt = prompt if index else []
        chosen = rejected + chosen if index == 1 else chosen
        rejected = chosen + rejected if index == 2 else rejected
        row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        rows.append(row | {f"{n}_mask": [1] * len(row[f"{n}_ids"]) for n in ("chosen", "rejected")})
    return rows


def sequences(row):
    return [row["prompt_ids"] + row[f"{name}_ids"] for name in ("chosen", "rejected")]


@pytest.fixture
def reward_model(model):
    torch.manual_seed(0)
    model = with_score_head(model)
    model.score.weight.data *= 20  # so that rewards are of some size
    return model


@pytest.fixture
def make(tokenizer, tmp_path):
    """Make our trainer, or TRL's on the two sequences of each pair."""

    def make(kind, model, rows, peft=None, **options):
        if kind is RewardTrainer:
            names = ("chosen_ids", "rejected_ids")
            rows = [dict(zip(names, sequences(row), strict=True)) for row in rows]
        args = RewardConfig(
            **{"output_dir": str(tmp_path / kind.__name__), "bf16": False, "use_cpu": True}
            | {"gradient_checkpointing": None, "disable_tqdm": True, "report_to": "none"}
            | {"dataloader_pin_memory": False, **options}
        )
        torch.manual_seed(1)
        return kind(
            model=copy.deepcopy(model),
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft,
        )

    return make


@pytest.mark.parametrize("variant", ["plain", "centred", "LoRA"])
def test_loss_gradients_and_metrics_are_those_of_trl(reward_model, make, variant):
    options = {"center_rewards_coefficient": 0.1} if variant == "centred" else {}
    steps = []
    for kind in (RewardModelTrainer, RewardTrainer):
        peft = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
        peft = peft if variant == "LoRA" else None
        steps.append(step_of(make(kind, reward_model, pair_rows(), peft, **options)))
    (loss, gradients, metrics), (expected, their_gradients, their_metrics) = steps
    assert loss == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == their_gradients.keys()
    assert any("score" in name for name in gradients)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=0, msg=name)
    assert metrics == pytest.approx(their_metrics, abs=1e-4)


@torch.no_grad()
def rewards_alone(model, rows):
    """The rewards (pairs, 2) of the sequences, each computed alone."""
    return torch.stack(
        [torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences(r)]) for r in rows]
    )


def test_the_loss_is_minus_the_log_of_the_sigmoid_of_the_margin(reward_model, make):
    rows = pair_rows()
    chosen, rejected = rewards_alone(reward_model.eval(), rows).T
    loss, *_ = step_of(make(RewardModelTrainer, reward_model, rows))
    assert loss == pytest.approx(-logsigmoid(chosen - rejected).mean().item(), abs=1e-5)


def test_experts_add_their_load_balancing_loss_in_training_alone(config, make):
    config.num_experts, config.moe_intermediate_size, config.router_aux_loss_coef = 4, 32, 0.5
    torch.manual_seed(0)
    reward_model, rows = with_score_head(MiniMindForCausalLM(config)), pair_rows()
    trainer = make(RewardModelTrainer, reward_model, rows)
    loss, _, metrics = step_of(trainer)
    chosen, rejected = rewards_alone(reward_model.eval(), rows).T
    ranking = -logsigmoid(chosen - rejected).mean().item()

    batch = trainer.data_collator(rows)
    with torch.no_grad():
        ids, parts = batch["packed_ids"], batch["packed_parts"]
        logits = []
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda *call: logits.append(call[2][0]))
            for layer in trainer.model.model.layers
        ]
        trainer.compute_loss(trainer.model, batch)
        for hook in hooks:
            hook.remove()
    auxiliary = load_balancing_loss(tuple(logits), 2, len(ids), parts >= 0, seq_aux=False).item()
    assert metrics["aux_loss"] == pytest.approx(auxiliary, abs=1e-5)
    assert loss == pytest.approx(ranking + 0.5 * auxiliary, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ranking, abs=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_held_out_metrics_are_those_of_all_pairs_however_they_are_batched(reward_model, make, size):
    rows = pair_rows(7)
    trainer = make(RewardModelTrainer, reward_model, rows, per_device_eval_batch_size=size)
    expected = rewards_alone(reward_model.eval(), rows)
    np.testing.assert_allclose(trainer.pair_rewards(trainer.eval_dataset), expected, atol=1e-5)
    metrics = trainer.evaluate()
    margins = expected[:, 0] - expected[:, 1]
    assert metrics["eval_loss"] == pytest.approx(-logsigmoid(margins).mean().item(), abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert metrics["eval_margin"] == pytest.approx(margins.mean().item(), abs=1e-5)
    logged = trainer.state.log_history[-1]
    assert {name: logged[name] for name in metrics if name in logged} == {
        name: value for name, value in metrics.items() if name in logged
    }
