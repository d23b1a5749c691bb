"""A step of DPO on the same pairs: our trainer, and TRL's with its defaults, without activation
checkpointing, and with precomputed references.

    python benchmarks/dpo_step.py pairs.jsonl                 # 26m, 8 pairs a step
    python benchmarks/dpo_step.py pairs.jsonl --model configs/model/tiny.json --bf16 false

Each trains the same weights, moved a little from the reference, on the same batches in turn;
forward and backward, the optimizer is out of the measure. The references that are computed before
training are out of it too. Peak memory is that of a run of two steps in a process of its own, above
what the libraries take. The losses are those of the first batch.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from side_by_side import DEVICE, device_name, side_by_side
from trl import DPOConfig, DPOTrainer

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.launch import bf16_is_fast
from minimind.data.chats import load_preferences
from minimind.tokenizer import load_tokenizer
from minimind.training.data_arguments import DataArguments
from minimind.training.preference_trainer import PreferenceTrainer


class LibraryTrainer(DPOTrainer):
    """TRL's, except: it takes token ids."""

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset


PLAIN = {"gradient_checkpointing": None}
PRECOMPUTED = {"precompute_ref_log_probs": True}
TRAINERS = {
    "ours": (PreferenceTrainer, PLAIN | PRECOMPUTED),
    "TRL, default": (LibraryTrainer, {}),
    "TRL, no checkpointing": (LibraryTrainer, PLAIN),
    "TRL, precomputed": (LibraryTrainer, PRECOMPUTED),
    "TRL, both": (LibraryTrainer, PLAIN | PRECOMPUTED),
}


def read_pairs(files: list[str], length: int, count: int) -> Dataset:
    """Token ids of at most `count` pairs of the files, shuffled."""
    data_args = DataArguments(train_files=files, eval_ratio=0.0, on_bad_rows="skip")
    rows = load_preferences(data_args, load_tokenizer(), length).train.shuffle(seed=0)
    return Dataset.from_list(list(rows.select(range(min(count, len(rows))))))


def make_trainer(name: str, rows: Dataset, args) -> DPOTrainer:
    """A trainer of TRAINERS whose model is not its reference any more."""
    kind, options = TRAINERS[name]
    tokenizer = load_tokenizer()
    fields = json.loads(Path(args.model).read_text(encoding="utf-8"))
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model, reference = (MiniMindForCausalLM(MiniMindConfig(**special | fields)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_length=args.length,
        per_device_train_batch_size=args.pairs,
        max_steps=2,
        bf16=args.bf16,
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE != "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = kind(
        model=model,
        ref_model=None if arguments.precompute_ref_log_probs else reference,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.002 * torch.randn_like(parameter)
    return trainer


def stepper(trainer: DPOTrainer):
    """One step without the optimizer at each call; returns its loss."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model.train()
    batches = iter(trainer.get_train_dataloader())

    def step() -> float:
        loss = trainer.training_step(trainer.model_wrapped, next(batches), None)
        trainer.model.zero_grad()
        return float(loss)

    return step


def peak_memory(name: str, args) -> float:
    """MiB that a run of two steps takes above the libraries, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return float(subprocess.check_output(command, stderr=subprocess.DEVNULL).split()[-1])


def own_peak(name: str, rows: Dataset, args) -> float:
    """MiB that this process takes in two steps above what it has now."""
    if DEVICE == "cuda":
        make_trainer(name, rows, args).train()
        return torch.cuda.max_memory_allocated() / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make_trainer(name, rows, args).train()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="preference pairs in any format")
    parser.add_argument("--model", default="configs/model/26m.json", help="JSON of MiniMindConfig")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence at most")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=5, help="steps measured of each")
    bf16 = {"type": lambda word: word == "true", "default": bf16_is_fast()}
    parser.add_argument("--bf16", **bf16, help="true or false")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", choices=TRAINERS, help="print the peak memory of one alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    rows = read_pairs(args.files, args.length, args.pairs * (args.rounds + 2))
    if args.only:
        print(own_peak(args.only, rows.select(range(args.pairs * 2)), args))
        return
    steps = {name: stepper(make_trainer(name, rows, args)) for name in TRAINERS}
    losses = {name: step() for name, step in steps.items()}
    result = {
        name: {
            "pairs_per_second": round(args.pairs / median, 3),
            "ours_is_faster_by": round(ratio, 2),
            "peak_mib": round(peak_memory(name, args)),
            "loss": losses[name],
        }
        for name, (median, ratio) in side_by_side(steps, args.rounds - 1).items()
    }
    if args.json:
        print(json.dumps({"device": device_name(), "bf16": args.bf16, **result}))
        return
    print(f"{device_name()}, {'bf16' if args.bf16 else 'fp32'}, {args.pairs} pairs a step")
    print(f"{'':<24}{'pairs/s':>9}{'ours : this':>13}{'peak MiB':>10}{'loss':>12}")
    for name, values in result.items():
        speed, ratio, peak, loss = values.values()
        print(f"{name:<24}{speed:>9.2f}{ratio:>13.2f}{peak:>10,}{loss:>12.6f}")


if __name__ == "__main__":
    main()
