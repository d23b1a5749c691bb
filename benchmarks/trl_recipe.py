"""TRL's own SFTTrainer and DPOTrainer at their defaults, to compare with: the library's Qwen3 of a
shape, on the token rows that our loaders make.

    python benchmarks/trl_recipe.py sft --model_path DIR --train_files chats.jsonl \
        --output_dir runs/trl [any option of SFTConfig]
    python benchmarks/trl_recipe.py dpo --model_path DIR --train_files pairs.jsonl ...

DIR holds model and tokenizer. The rows are ours, so that all see the same tokens and the same
masks; TRL would need longer to prepare them.
"""

import sys
from dataclasses import dataclass, field

from transformers import AutoTokenizer, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser

from minimind.data.chat_arguments import PreferenceArguments
from minimind.data.chats import load_conversations, load_preferences
from minimind.training.data_arguments import DataArguments


@dataclass
class Arguments:
    """Model and data."""

    model_path: str = field(metadata={"help": "directory of a Qwen3 and its tokenizer"})
    train_files: list[str] = field(metadata={"help": "conversations or pairs"})


class PreparedDPOTrainer(DPOTrainer):
    """TRL's, which takes rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


def main() -> None:
    kind = sys.argv.pop(1)
    config, trainer_class, load = {
        "sft": (SFTConfig, SFTTrainer, load_conversations),
        "dpo": (DPOConfig, PreparedDPOTrainer, load_preferences),
    }[kind]
    given, args = TrlParser((Arguments, config)).parse_args_and_config()
    tokenizer = AutoTokenizer.from_pretrained(given.model_path)
    data_args = DataArguments(train_files=given.train_files, eval_ratio=0.0, on_bad_rows="skip")
    half = args.max_length // 2
    limits = args.max_length if kind == "sft" else PreferenceArguments(None, half, half)
    rows = load(data_args, tokenizer, limits).train
    trainer = trainer_class(
        model=Qwen3ForCausalLM.from_pretrained(given.model_path),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
