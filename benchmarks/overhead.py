"""What telling, guarding and resuming cost: the steps of pretrain.py against those of a bare
`transformers.Trainer`.

    python benchmarks/overhead.py --steps 60 --batch_size 2

Both train the same model on the same rows in one process and take turns, a step each, so that
whatever else the machine does meets both alike. Ours has everything on: progress lines, tensorboard
(if installed), the report, early stopping. A step's time goes from the beginning of one to the
beginning of the next, logging included (every 10 steps). Evaluations and samples are requested by
the recipe and left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import side_by_side
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
import pretrain
from minimind.data.documents import load_blocks
from minimind.data.packing import BlockCollator
from minimind.tokenizer import load_tokenizer
from minimind.training.arguments import PretrainConfig
from minimind.training.command_line import parse
from minimind.training.data_arguments import DataArguments
from minimind.training.model_arguments import PretrainModelArguments
from minimind.training.run import ADDITIONAL
from minimind.training.starting_point import new_model

WARM_UP = 5


class Turns(TrainerCallback):
    """Passes the baton at the beginning of each step and notes how long the last one took,
    callbacks included."""

    def __init__(
        self, mine: threading.Semaphore, other: threading.Semaphore, both: threading.Barrier
    ):
        self.mine, self.other, self.both = mine, other, both
        self.seconds, self.began = [], None

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.began is None:
            self.both.wait()
        else:
            self.seconds.append(now - self.began)
            self.other.release()
        self.mine.acquire()
        self.began = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.other.release(args.max_steps)


def bare(words: list[str], turns: Turns) -> None:
    """The library's Trainer on the same rows, with the same arguments, and nobody to tell."""
    data_args, model_args, args = parse(
        DataArguments, PretrainModelArguments, PretrainConfig, argv=words
    )
    tokenizer = load_tokenizer(None)
    blocks = load_blocks(data_args.or_embedded("pretrain"), tokenizer, **args.packing)
    args.include_num_input_tokens_seen, args.eval_strategy, args.eval_on_start = "no", "no", False
    args.metric_for_best_model = None
    trainer = Trainer(
        model=new_model(model_args.model_config, tokenizer),
        args=args,
        train_dataset=blocks.train,
        data_collator=BlockCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(turns)
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of each, 5 more to warm up")
    parser.add_argument("--batch_size", type=int, default=2, help="rows of 512 tokens in a step")
    parser.add_argument(
        "--model_config", default="configs/model/tiny.json", help="size of the model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()

    steps = given.steps + WARM_UP
    baton = [threading.Semaphore(0), threading.Semaphore(1)]
    both = threading.Barrier(2)
    turns = {"bare": Turns(baton[0], baton[1], both), "ours": Turns(baton[1], baton[0], both)}
    common = [
        "--max_steps",
        steps,
        "--per_device_train_batch_size",
        given.batch_size,
        "--logging_steps",
        10,
    ]
    common += ["--model_config", given.model_config, "--save_strategy", "no"]
    ADDITIONAL.append(lambda trainer: turns["ours"])
    with tempfile.TemporaryDirectory() as directory:
        words = {
            name: [
                str(word)
                for word in (*common, "--output_dir", f"{directory}/{name}", "--report_to", tracker)
            ]
            for name, tracker in (
                ("bare", "none"),
                ("ours", "tensorboard" if find_spec("tensorboard") else "none"),
            )
        }
        words["ours"] += ["--eval_strategy", "steps", "--eval_steps", str(10 * steps)]
        words["ours"] += ["--early_stopping_patience", "3", "--max_eval_rows", "50"]
        words["bare"] += ["--max_eval_rows", "50"]
        sys.argv = ["pretrain.py", *words["ours"]]
        other = threading.Thread(target=bare, args=(words["bare"], turns["bare"]), daemon=True)
        other.start()
        pretrain.main()
        other.join()

    times = {name: turn.seconds[WARM_UP:] for name, turn in turns.items()}
    pairs = list(zip(times["ours"], times["bare"], strict=False))
    result = {
        "device": side_by_side.device_name(),
        "torch": torch.__version__,
        "steps": len(pairs),
        "tokens_per_step": 512 * given.batch_size,
        "bare_ms": round(1e3 * statistics.median(times["bare"]), 2),
        "ours_ms": round(1e3 * statistics.median(times["ours"]), 2),
        "median_ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "ratio_of_totals": round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 4),
    }
    if given.json:
        print(json.dumps(result))
        return
    print(
        f"\n{result['device']}, torch {result['torch']}, {result['tokens_per_step']:,} tokens a"
        " step"
    )
    print(f"bare transformers.Trainer  {result['bare_ms']:9.2f} ms a step")
    print(f"pretrain.py                {result['ours_ms']:9.2f} ms a step")
    print(
        f"overhead of {result['steps']} pairs of steps: median {result['median_ratio'] - 1:+.2%},"
        f" in all {result['ratio_of_totals'] - 1:+.2%}"
    )


if __name__ == "__main__":
    main()
