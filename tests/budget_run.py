"""A short run of two processes under a time budget, whose clocks differ; started by
test_time_budget.py.

    torchrun --nproc_per_node 2 tests/budget_run.py OUTPUT [DEEPSPEED.json]

Each process writes the learning rates of its steps to OUTPUT/rates-RANK.json.
"""

import json
import os
import sys
from pathlib import Path

from small_run import small_trainer, under_budget

from minimind import MiniMindConfig
from minimind.common.launch import prepare_launch
from minimind.tokenizer import load_tokenizer


def main():
    output, *deepspeed = sys.argv[1:]
    prepare_launch(uses_deepspeed=bool(deepspeed))
    rank, tokenizer = int(os.environ["RANK"]), load_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = MiniMindConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
        **heads,
    )
    options = {"deepspeed": deepspeed[0]} if deepspeed else {}
    options |= {"max_steps": -1, "time_budget": 12.0, "lr_scheduler_type": "linear"}
    trainer = small_trainer(config, tokenizer, output, **options)
    # The first process was started earlier, the second is faster.
    under_budget(trainer, tick=[1.0, 0.5][rank], began=[2.0, 0.0][rank])
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    seen = {"rates": rates, "steps": trainer.state.global_step}
    (Path(output) / f"rates-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
