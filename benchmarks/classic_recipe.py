"""The classic recipe of the library's examples, to compare with: Qwen3ForCausalLM of a shape from
random weights, `datasets.map` to tokenise, `group_texts`, Trainer with AdamW and a cosine.

    python benchmarks/classic_recipe.py --train_file train.jsonl --tokenizer DIR \
        --model shape.json --max_steps 500 [--learning_rate 2e-3]

The same steps as transformers' examples/pytorch/language-modeling/run_clm.py, except that each
document ends with EOS.
"""

import argparse
from itertools import chain

import torch
from datasets import load_dataset
from transformers import (
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from minimind.common.launch import bf16_is_fast


def group_texts(examples: dict[str, list[list]], block_size: int) -> dict[str, list[list]]:
    """Join the lists of each column, and cut them every `block_size` tokens; the rest of each batch
    of documents is lost. The labels are the ids: the model shifts them."""
    columns = {name: list(chain.from_iterable(lists)) for name, lists in examples.items()}
    total = len(columns["input_ids"]) // block_size * block_size
    blocks = {
        name: [values[start : start + block_size] for start in range(0, total, block_size)]
        for name, values in columns.items()
    }
    return blocks | {"labels": [list(block) for block in blocks["input_ids"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True, help="jsonl with the column text")
    parser.add_argument("--tokenizer", required=True, help="its directory")
    parser.add_argument("--model", required=True, help="JSON with the fields of Qwen3Config")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a step")
    parser.add_argument("--block_size", type=int, default=512, help="tokens of a row")
    parser.add_argument("--num_proc", type=int, default=1, help="processes that prepare the data")
    parser.add_argument("--bf16", choices=("true", "false"), help="default: where it is fast")
    parser.add_argument("--save_steps", type=int, default=0, help="0: no checkpoints")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    set_seed(args.seed)

    # The data
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    dataset = load_dataset("json", data_files=args.train_file, split="train")

    def tokenize(examples: dict[str, list]) -> dict[str, list]:
        return tokenizer([text + tokenizer.eos_token for text in examples["text"]])

    options = {"batched": True, "num_proc": args.num_proc if args.num_proc > 1 else None}
    dataset = dataset.map(tokenize, remove_columns=dataset.column_names, **options)
    dataset = dataset.map(group_texts, fn_kwargs={"block_size": args.block_size}, **options)

    # The model and its training
    model = Qwen3ForCausalLM(Qwen3Config.from_json_file(args.model))
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=args.bf16 == "true" if args.bf16 else bf16_is_fast(),
        use_cpu=not torch.cuda.is_available(),
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        report_to="none",
        seed=args.seed,
    )
    trainer = Trainer(model, arguments, default_data_collator, dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
