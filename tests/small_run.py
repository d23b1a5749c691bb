"""A small trainer, and ways to spoil its run; the fixture `make_trainer` is in conftest.py."""

from functools import wraps
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from minimind import MiniMindForCausalLM
from minimind.data.packing import BlockCollator
from minimind.training.arguments import PretrainConfig
from minimind.training.checkpointing_trainer import DueCheckpointCallback
from minimind.training.guards import GuardCallback
from minimind.training.memory_growth import MemoryCallback
from minimind.training.optimizers import build_optimizer
from minimind.training.trainers import BlockTrainer

STEPS = 6


class Witness(TrainerCallback):
    """Weights, optimizer state and learning rate after each step."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.moments, self.rates = trainer, [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self._note()

    def on_step_end(self, args, state, control, **kwargs):
        self._note()

    def _note(self):
        trainer = self.trainer
        self.weights.append([p.detach().clone() for p in trainer.model.parameters()])
        inner = trainer.optimizer.optimizer
        parts = getattr(inner, "parts", [inner])
        self.moments.append(
            [
                v.clone()
                for part in parts
                for s in part.state.values()
                for v in s.values()
                if torch.is_tensor(v)
            ]
        )
        self.rates.append(trainer.lr_scheduler.get_last_lr()[0])


def small_trainer(config, tokenizer, output_dir, guarded=True, **options):
    """A trainer of six steps on rows of 16 tokens, with a witness of them."""
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1}
    defaults |= {"learning_rate": 1e-2, "warmup_steps": 0, "save_strategy": "no"}
    defaults |= {"report_to": "none", "bf16": False, "use_cpu": True}
    options = defaults | options
    args = PretrainConfig(output_dir=str(output_dir), block_size=16, **options)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config)
    ids = torch.randint(5, config.vocab_size, (64, 16), generator=torch.Generator().manual_seed(1))
    trainer = BlockTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy"),
        data_collator=BlockCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
        processing_class=tokenizer,
        optimizers=(build_optimizer(model, args), None),
    )
    Path(args.output_dir).mkdir(exist_ok=True)
    if guarded:
        trainer.guard = GuardCallback(trainer) if args.max_nonfinite_steps else None
        for callback in (DueCheckpointCallback(trainer), trainer.guard, MemoryCallback()):
            if callback:
                trainer.add_callback(callback)
    trainer.witness = Witness(trainer)
    trainer.add_callback(trainer.witness)
    return trainer


class Ticks(TrainerCallback):
    """A clock for a time budget: it stands still but for the seconds of steps, evaluations and
    checkpoints."""

    def __init__(self, tick=1.0, began=0.0, evaluation=0.0, saving=0.0):
        self.tick, self.now = tick, began
        self.evaluation, self.saving = evaluation, saving

    def __call__(self):
        return self.now

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += self.tick

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += self.evaluation

    def on_save(self, args, state, control, **kwargs):
        self.now += self.saving


def under_budget(trainer, **seconds):
    """Make the time budget of a trainer its first callback, by a clock of its own; returns that."""
    clock = trainer.time_budget.clock = Ticks(**seconds)
    trainer.callback_handler.callbacks[:0] = [clock, trainer.time_budget]
    return clock


def spoil(monkeypatch, steps, kind="loss", micro_batch=0):
    """Make the loss or the gradients of some steps not finite, as a fault in model or data
    would."""
    forward = MiniMindForCausalLM.forward
    calls = {"count": 0}

    @wraps(forward)
    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            step, number = divmod(calls["count"], spoilt.micro_batches)
            calls["count"] += 1
            if step + 1 in steps and number == micro_batch:
                if kind == "gradient":
                    output.loss.register_hook(lambda gradient: gradient * float("inf"))
                elif kind == "empty":  # the mean over no token: its gradient is 0
                    output.loss = output.loss * 0 + float("nan")
                else:  # a value alone, its gradient stays finite
                    output.loss = output.loss + (float("nan") if kind == "loss" else float("inf"))
        return output

    spoilt.micro_batches = 1
    monkeypatch.setattr(MiniMindForCausalLM, "forward", spoilt)
    return spoilt


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


def names(directory):
    return {path.name for path in directory.glob("checkpoint-*")}
