"""A short guarded run of several processes, one of which meets a loss that is not finite; started
by test_guards.py.

    torchrun --nproc_per_node 2 tests/guarded_run.py OUTPUT STEPS [DEEPSPEED.json]

STEPS: comma-separated numbers of the steps that are bad, on the last process alone. Each process
writes what it saw to OUTPUT/seen-RANK.json.
"""

import json
import os
import sys
from functools import wraps
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import UserError
from minimind.common.launch import prepare_launch
from minimind.data.packing import BlockCollator
from minimind.tokenizer import load_tokenizer
from minimind.training.arguments import PretrainConfig
from minimind.training.guards import GuardCallback
from minimind.training.trainers import BlockTrainer


class Witness(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.weights, self.rates = trainer, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(
            float(sum(p.double().abs().sum() for p in self.trainer.model.parameters()))
        )
        self.rates.append(self.trainer.lr_scheduler.get_last_lr()[0])


def main():
    output, steps, *deepspeed = sys.argv[1:]
    bad = {int(step) for step in steps.split(",") if step}
    prepare_launch(uses_deepspeed=bool(deepspeed))
    rank = int(os.environ["RANK"])
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    options = {"deepspeed": deepspeed[0]} if deepspeed else {}
    args = PretrainConfig(
        output_dir=output,
        max_steps=6,
        per_device_train_batch_size=2,
        report_to="none",
        bf16=False,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        gradient_accumulation_steps=2,
        max_nonfinite_steps=2,
        save_strategy="no",
        **options,
    )
    ids = torch.randint(5, len(tokenizer), (64, 16), generator=torch.Generator().manual_seed(1))
    trainer = BlockTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy"),
        data_collator=BlockCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
        processing_class=tokenizer,
    )
    trainer.guard = GuardCallback(trainer)
    trainer.add_callback(trainer.guard)
    witness = Witness(trainer)
    trainer.add_callback(witness)
    forward, calls = MiniMindForCausalLM.forward, 0

    @wraps(forward)
    def spoilt(*positional, **named):
        nonlocal calls
        step, part = divmod(calls, 2)
        calls += 1
        output = forward(*positional, **named)
        if rank == 1 and step + 1 in bad and part == 0:
            # Its gradient is 0, as that of a mean over no token.
            output.loss = output.loss * 0 + float("nan")
        return output

    MiniMindForCausalLM.forward = spoilt
    stopped = None
    try:
        trainer.train()
    except UserError as error:
        stopped = str(error)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = {
        "weights": witness.weights,
        "rates": witness.rates,
        "stopped": stopped,
        "losses": list(map(repr, losses)),
    }
    (Path(output) / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
