"""Fine-tuning on the same conversations: our packed trainer, TRL's at its defaults and at its
fastest, the bare model.

    # 26m, 8 x 512; under 3 minutes on a quiet machine
    python benchmarks/sft_packing.py chats.jsonl [more.jsonl ...]
    # a small model
    python benchmarks/sft_packing.py chats.jsonl --model configs/model/tiny.json
    # peak memory alone, or padding alone
    python benchmarks/sft_packing.py chats.jsonl --rounds 0
    python benchmarks/sft_packing.py chats.jsonl --conversations 1000000 --rounds 0 --peak none

All train the same model on the same token rows, in turn, `--rounds` steps each after one to warm
up; the optimizer is out of the measure. Useful tokens are those that are not padding, trained or
context. TRL's default pads and recomputes activations; "padded" and "packed" do not recompute.
"ours, as many tokens" has fewer packed rows: about as many useful tokens a step as TRL's default.
The bare model takes unpacked text of the same shape, as in pretraining, without documents to keep
apart, labels to leave out or a trainer around it. Losses of the packed trainers are compared on one
batch, so that the faster one is not wrong. The peak memory is that of three steps with AdamW, each
trainer in a process of its own; beside it what the process had before the first step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
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

OURS, TRL_PACKED, BARE = "ours, packed", "TRL, packed (bfd)", "bare model"
SPEED, RATIO = "_tokens_per_second", "ours_is_faster_by_"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="conversations in any format")
    parser.add_argument("--model", default="configs/model/26m.json", help="JSON of MiniMindConfig")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--rounds", type=int, default=6, help="steps measured of each")
    parser.add_argument(
        "--conversations", type=int, default=4000, help="at most this many are read"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--peak", help="print the peak memory of this trainer alone; none: of none")
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

    def trainer(kind: type[SFTTrainer], packing: bool, batch: int, **options) -> SFTTrainer:
        model = MiniMindForCausalLM(config)
        model.load_state_dict(weights)
        arguments = SFTConfig(
            output_dir="runs/benchmark",
            max_length=args.length,
            packing=packing,
            per_device_train_batch_size=batch,
            bf16=bf16_is_fast(),
            use_cpu=DEVICE == "cpu",
            dataloader_pin_memory=DEVICE != "cpu",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        return kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)

    # What TRL turns on, and None does not: activation checkpointing
    fast = {"gradient_checkpointing": None}
    mean = sum(map(len, rows["input_ids"])) / len(rows)
    as_many = max(1, round(args.batch * mean / args.length))
    builders = {
        OURS: lambda: trainer(ChatSFTTrainer, True, args.batch, **fast),
        "ours, as many tokens": lambda: trainer(ChatSFTTrainer, True, as_many, **fast),
        "TRL, default": lambda: trainer(SFTTrainer, False, args.batch),
        "TRL, padded": lambda: trainer(SFTTrainer, False, args.batch, **fast),
        TRL_PACKED: lambda: trainer(SFTTrainer, True, args.batch, **fast),
    }
    if args.peak in builders:
        print(json.dumps(peak(builders[args.peak]())))
        return
    peaks = {}
    if args.peak is None:
        for name in builders:
            command = [sys.executable, *sys.argv, "--peak", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[name] = json.loads(output.splitlines()[-1])
    trainers = {name: build() for name, build in builders.items()}
    padding = {
        name: waste(trainers[name].train_dataset, args.length) for name in (OURS, TRL_PACKED)
    }
    speeds, losses = {name: [] for name in [*trainers, BARE]}, []
    if args.rounds:
        steps = {name: stepper(each) for name, each in trainers.items()}
        steps[BARE] = bare(trainers[OURS], rows, args.batch, args.length)
        packs = [trainers[OURS].train_dataset[index] for index in range(args.batch)]
        losses = [first_loss(trainers[name], packs) for name in (OURS, TRL_PACKED)]
    for round_ in range(args.rounds + 1 if args.rounds else 0):
        for name, step in steps.items():
            began = time.perf_counter()
            counts = step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds = time.perf_counter() - began
                speeds[name].append([count / seconds for count in counts])
    report(args, speeds, padding, losses, peaks, sum(weight.numel() for weight in weights.values()))


def stepper(trainer: SFTTrainer, optimize: bool = False):
    """One training step of a trainer at each call, by default without the optimizer; returns the
    tokens that were trained, and those that were not padding."""
    trainer.model.train()
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    batches = iter(trainer.get_train_dataloader())

    def step() -> tuple[int, int]:
        inputs, num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        tokens = int((inputs[0]["input_ids"] != trainer.processing_class.pad_token_id).sum())
        trainer.training_step(trainer.model_wrapped, inputs[0], num_items)
        if optimize:
            trainer.optimizer.step()
        trainer.model.zero_grad()
        return int(num_items), tokens

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

    def step() -> tuple[int, int]:
        with (
            trainer.autocast_smart_context_manager(),
            torch.autocast(DEVICE, torch.bfloat16, enabled=trainer.args.bf16),
        ):
            loss = trainer.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        trainer.model.zero_grad()
        return input_ids.numel(), input_ids.numel()

    return step


def peak(trainer: SFTTrainer) -> dict[str, float]:
    """Peak memory of three steps with the optimizer, in MB: the process's, or the GPU's."""

    def megabytes() -> float:
        if DEVICE == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    before, step = megabytes(), stepper(trainer, optimize=True)
    for _ in range(3):
        step()
    return {"peak_mb": round(megabytes(), 1), "before_mb": round(before, 1)}


def first_loss(trainer: SFTTrainer, packs: list[dict]) -> float:
    batch = trainer._prepare_inputs(trainer.data_collator(packs))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model_wrapped, batch).item()


def waste(packs, length: int) -> float:
    """The share of the cells of all rows that holds padding."""
    return 1 - sum(map(sum, packs["seq_lengths"])) / (len(packs) * length)


def report(args, speeds, padding, losses, peaks, parameters: int) -> None:
    """Print medians, and the medians of our speed over the others' of the same rounds."""
    result = {}
    for name, rounds in speeds.items():
        result[name] = dict(peaks.get(name, {}))
        for index, kind in enumerate(("trained", "useful") if rounds else ()):
            pairs = zip(speeds[OURS], rounds, strict=True)
            ratio = statistics.median(ours[index] / other[index] for ours, other in pairs)
            values = [each[index] for each in rounds]
            result[name] |= {
                f"{kind}_tokens_per_second": round(statistics.median(values), 1),
                f"{kind}_range": [round(min(values), 1), round(max(values), 1)],
                f"ours_is_faster_by_{kind}": round(ratio, 3),
            }
        if name in padding:
            result[name]["padding"] = round(padding[name], 4)
    if args.json:
        shape = f"{args.batch} x {args.length}"
        print(json.dumps({"device": device_name(), "rows": shape, "losses": losses, **result}))
        return
    print(
        f"{device_name()}: {parameters:,} parameters, {args.batch} rows of {args.length} tokens,"
        f" {args.rounds} rounds"
    )
    heads = ("trained/s", "ours : this", "useful/s", "ours : this", "peak MB", "before", "padding")
    print(f"{'':<22}" + "".join(f"{head:>12}" for head in heads))
    names = [f"{p}{k}{s}" for k in ("trained", "useful") for p, s in (("", SPEED), (RATIO, ""))]
    for name, values in result.items():
        cells = [values.get(key, "") for key in (*names, "peak_mb", "before_mb", "padding")]
        print(f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells))
    if losses:
        print(f"loss of one packed batch: ours {losses[0]:.6f}, TRL's {losses[1]:.6f}")


if __name__ == "__main__":
    main()
