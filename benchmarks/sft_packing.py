"""Fine-tuning on the same conversations: our packed trainer, TRL's packed (bfd), TRL's padded
default, the bare model.

    # 26m, 4 x 1,024
    python benchmarks/sft_packing.py chats.jsonl [more.jsonl ...]
    # a small model
    python benchmarks/sft_packing.py chats.jsonl --model configs/model/tiny.json --length 512
    # padding alone
    python benchmarks/sft_packing.py chats.jsonl --length 512 --conversations 1000000 --rounds 0

All four train the same model on the same token rows, in turn, `--rounds` steps each after one to
warm up; the optimizer is out of the measure. Useful tokens are those that are not padding, trained
or context. The bare model takes unpacked text of the same shape, without documents to keep apart,
labels to leave out or a trainer around it: no packing can be faster. Losses of the packed trainers
are compared on one batch, so that the faster one is not wrong.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from side_by_side import DEVICE, device_name
from trl import SFTConfig, SFTTrainer

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.launch import bf16_is_fast
from minimind.data.chats import load_conversations
from minimind.tokenizer import load_tokenizer
from minimind.training.data_arguments import DataArguments
from minimind.training.trainers import ChatSFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="conversations in any format")
    parser.add_argument("--model", default="configs/model/26m.json", help="JSON of MiniMindConfig")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--rounds", type=int, default=6, help="steps measured of each")
    parser.add_argument(
        "--conversations", type=int, default=4000, help="at most this many are read"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)

    tokenizer = load_tokenizer()
    data_args = DataArguments(train_files=args.files, eval_ratio=0.0, on_bad_rows="skip")
    rows = load_conversations(data_args, tokenizer, args.length).train.shuffle(seed=0)
    rows = rows.select(range(min(args.conversations, len(rows))))
    fields = json.loads(Path(args.model).read_text(encoding="utf-8"))
    config = MiniMindConfig(
        **{"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | fields
    )
    weights = MiniMindForCausalLM(config).state_dict()

    def trainer(kind: type[SFTTrainer], packing: bool) -> SFTTrainer:
        model = MiniMindForCausalLM(config)
        model.load_state_dict(weights)
        arguments = SFTConfig(
            output_dir="runs/benchmark",
            max_length=args.length,
            packing=packing,
            per_device_train_batch_size=args.batch,
            # TRL's default: activation checkpointing; it would cost all the same
            gradient_checkpointing=None,
            bf16=bf16_is_fast(),
            use_cpu=DEVICE == "cpu",
            dataloader_pin_memory=DEVICE != "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        return kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)

    trainers = {
        "ours, packed": trainer(ChatSFTTrainer, True),
        "TRL, packed (bfd)": trainer(SFTTrainer, True),
        "TRL, padded": trainer(SFTTrainer, False),
    }
    padding = {
        "ours, packed": waste(trainers["ours, packed"].train_dataset, args.length),
        "TRL, packed (bfd)": waste(trainers["TRL, packed (bfd)"].train_dataset, args.length),
    }
    if not args.rounds:
        for name, share in padding.items():
            print(
                f"{name:<20}{len(rows):,} conversations in rows of {args.length:,}: {share:.2%}"
                " padding"
            )
        return
    steps = {name: stepper(each) for name, each in trainers.items()}
    steps["bare model"] = bare(trainers["ours, packed"], rows, args.batch, args.length)
    packs = [trainers["ours, packed"].train_dataset[index] for index in range(args.batch)]
    losses = [first_loss(trainers[name], packs) for name in ("ours, packed", "TRL, packed (bfd)")]

    speeds = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            tokens = step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_:
                speeds[name].append(tokens / (time.perf_counter() - began))
    report(args, speeds, padding, losses, sum(weight.numel() for weight in weights.values()))


def stepper(trainer: SFTTrainer):
    """One optimizer-less training step of a trainer at each call; returns the tokens that were not
    padding."""
    trainer.model.train()
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    batches = iter(trainer.get_train_dataloader())

    def step() -> int:
        inputs, num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        tokens = int((inputs[0]["input_ids"] != trainer.processing_class.pad_token_id).sum())
        trainer.training_step(trainer.model_wrapped, inputs[0], num_items)
        trainer.model.zero_grad()
        return tokens

    return step


def bare(trainer: SFTTrainer, rows, batch: int, length: int):
    """Forward and backward of the model alone, on full rows."""
    stream = torch.tensor(
        [token for row in rows.select(range(min(500, len(rows))))["input_ids"] for token in row]
    )
    input_ids = stream.repeat(-(-batch * length // len(stream)))[: batch * length].view(
        batch, length
    )
    input_ids = input_ids.to(trainer.args.device)

    def step() -> int:
        with (
            trainer.autocast_smart_context_manager(),
            torch.autocast(DEVICE, torch.bfloat16, enabled=trainer.args.bf16),
        ):
            loss = trainer.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        trainer.model.zero_grad()
        return input_ids.numel()

    return step


def first_loss(trainer: SFTTrainer, packs: list[dict]) -> float:
    batch = trainer._prepare_inputs(trainer.data_collator(packs))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model_wrapped, batch).item()


def waste(packs, length: int) -> float:
    """The share of the cells of all rows that holds padding."""
    return 1 - sum(map(sum, packs["seq_lengths"])) / (len(packs) * length)


def report(args, speeds: dict, padding: dict, losses: list[float], parameters: int) -> None:
    ours = speeds["ours, packed"]
    result = {
        name: {
            "useful_tokens_per_second": round(statistics.median(values), 1),
            "ours_is_faster_by": round(
                statistics.median(a / b for a, b in zip(ours, values, strict=True)), 3
            ),
        }
        for name, values in speeds.items()
    }
    for name, share in padding.items():
        result[name]["padding"] = round(share, 4)
    if args.json:
        print(
            json.dumps(
                {
                    "device": device_name(),
                    "rows": f"{args.batch} x {args.length}",
                    "losses": losses,
                    **result,
                }
            )
        )
        return
    print(
        f"{device_name()}: {parameters:,} parameters, {args.batch} x {args.length} tokens,"
        f" {args.rounds} rounds"
    )
    print(f"{'':<20}{'useful tokens/s':>17}{'ours : this':>14}{'padding':>10}")
    for name, values in result.items():
        wasted = f"{values['padding']:.2%}" if "padding" in values else ""
        print(
            f"{name:<20}{values['useful_tokens_per_second']:>17,.0f}{values['ours_is_faster_by']:>14.2f}{wasted:>10}"
        )
    print(f"loss of one packed batch: ours {losses[0]:.5f}, TRL's {losses[1]:.5f}")


if __name__ == "__main__":
    main()
