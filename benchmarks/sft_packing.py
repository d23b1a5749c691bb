"""Packed fine-tuning beside the bare model on full rows, and the padding that packing leaves.

    # 26m, 8 x 512; under 3 minutes on a quiet machine
    python benchmarks/sft_packing.py chats.jsonl [more.jsonl ...]
    # padding alone
    python benchmarks/sft_packing.py chats.jsonl --conversations 1000000 --rounds 0

Both compute forward and backward on the same number of tokens, in turn, `--rounds` steps each after
one to warm up. The bare model takes unpacked text, as in pretraining, without documents to keep
apart, labels to leave out or a trainer around it. benchmarks/throughput.py compares with TRL's
trainer.
"""

import argparse
import statistics
import warnings

import torch
from side_by_side import DEVICE, device_name, seconds
from trl import SFTConfig, pack_dataset
from twins import read_size

from minimind import MiniMindForCausalLM
from minimind.common.errors import reports_user_errors
from minimind.common.launch import bf16_is_fast
from minimind.data.chats import load_conversations
from minimind.tokenizer import load_tokenizer
from minimind.training.data_arguments import DataArguments
from minimind.training.trainers import ChatSFTTrainer


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="conversations in any format")
    parser.add_argument("--size", default="26m", help="of configs/model")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--rounds", type=int, default=6, help="steps measured of each")
    parser.add_argument(
        "--conversations", type=int, default=4000, help="at most this many are read"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)

    # The rows, packed by TRL and by our trainer
    tokenizer = load_tokenizer()
    data_args = DataArguments(train_files=args.files, eval_ratio=0.0, on_bad_rows="skip")
    rows = load_conversations(data_args, tokenizer, args.length).train.shuffle(seed=0)
    rows = rows.select(range(min(args.conversations, len(rows))))
    trainer = ChatSFTTrainer(
        model=MiniMindForCausalLM(read_size(args.size)),
        args=SFTConfig(
            output_dir="runs/benchmark",
            max_length=args.length,
            packing=True,
            per_device_train_batch_size=args.batch,
            gradient_checkpointing=False,
            bf16=bf16_is_fast(),
            use_cpu=DEVICE == "cpu",
            dataloader_pin_memory=DEVICE != "cpu",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    ids = rows.select_columns(["input_ids"])
    for name, packed in (
        ("ours", trainer.train_dataset),
        ("TRL's bfd", pack_dataset(ids, args.length, "bfd")),
    ):
        print(f"padding left by {name}: {waste(packed, args.length):.2%} of {args.length} tokens")
    if not args.rounds:
        return

    # Speed, in turn
    steps = {"packed": packed_step(trainer), "bare": bare_step(trainer, rows, args)}
    speeds = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            spent = seconds(step)
            if round_:
                speeds[name].append(args.batch * args.length / spent)
    print(f"{device_name()}: {args.size}, {args.batch} rows of {args.length} tokens")
    for name, values in speeds.items():
        low, high = min(values), max(values)
        print(f"{name:<8}{statistics.median(values):>9,.0f} tokens/s  ({low:,.0f} to {high:,.0f})")
    ratio = statistics.median(a / b for a, b in zip(speeds["packed"], speeds["bare"], strict=True))
    print(f"packed : bare {ratio:.2f}")


def packed_step(trainer: ChatSFTTrainer):
    """Forward and backward of the trainer on the next batch."""
    trainer.model.train()
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    batches = iter(trainer.get_train_dataloader())

    def step() -> None:
        inputs, num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(trainer.model_wrapped, inputs[0], num_items)
        trainer.model.zero_grad()

    return step


def bare_step(trainer: ChatSFTTrainer, rows, args):
    """Forward and backward of the model alone, on full rows."""
    some = rows.select(range(min(500, len(rows))))["input_ids"]
    stream = torch.tensor([token for row in some for token in row])
    needed = args.batch * args.length
    input_ids = stream.repeat(-(-needed // len(stream)))[:needed].view(args.batch, args.length)
    input_ids = input_ids.to(trainer.args.device)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=trainer.args.bf16):
            loss = trainer.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        trainer.model.zero_grad()

    return step


def waste(packs, length: int) -> float:
    """The share of the cells of all rows that holds padding."""
    return 1 - sum(map(sum, packs["seq_lengths"])) / (len(packs) * length)


if __name__ == "__main__":
    main()
