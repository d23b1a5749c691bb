"""Held-out bits per byte against seconds: pretrain.py, minimind's trainer/train_pretrain.py and the
library's classic recipe, with the same model shape, tokenizer, text and cores.

    # 5 M parameters, 240 s each, three seeds, about an hour
    python benchmarks/time_to_quality.py --minimind PATH --train_files text.jsonl --seeds 3
    # 30 M parameters
    python benchmarks/time_to_quality.py --minimind PATH --train_files text.jsonl --size 26m
    # 1 M parameters and a few seconds each, under 3 minutes
    python benchmarks/time_to_quality.py --minimind PATH --train_files text.jsonl --quick

Every run is a process of its own with empty caches. Its seconds begin before python starts and end
when it has saved its model, so they contain imports, the preparation of the data and compilation;
weights are kept at some moments (timed_script.py) and evaluated after the run. Ours gets the budget
as --time_budget. Peers get as many steps as a short probe says fit into it, so that their learning
rate has decayed at its end; minimind takes its steps from the size of its file, so it gets the
first rows of the same text.

Bits per byte are those of the same tokens of the same held-out documents for all, up to LENGTH
tokens each. Every model reads the start of a document as in its training: after minimind's BOS, or
after the EOS of the document before.

For each peer the table says how long a run of ours took that was planned for a shorter budget and
ended at or below the peer's last bits per byte. --output_dir receives result.json and result.png.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.charts import COLOURS, canvas, draw_line, plain, to_png
from minimind.common.errors import reports_user_errors
from minimind.common.launch import bf16_is_fast
from minimind.data.files import read_documents
from minimind.data.held_out import HoldOut
from minimind.evaluation.losses import row_metrics
from minimind.tokenizer import load_tokenizer
from minimind.tokenizer.encoding import DocumentEncoder

ROOT = Path(__file__).parents[1]
# hidden size and layers; the rest is what minimind derives from them, which has no option there
SIZES = {"1m": (128, 2), "5m": (256, 4), "26m": (512, 8)}
LENGTH = 256  # tokens of a held-out document at most; the peers train on longer rows
PROBE = 8  # steps
OURS = {
    "optim": "muon",
    "learning_rate": 1e-2,
    "block_size": 128,
    "per_device_train_batch_size": 8,
}
# The other options of ours leave out what the peers have not: evaluation, checkpoints, samples
QUIET = ["--eval_ratio", 0, "--save_strategy", "no", "--report_to", "none", "--sample_steps", -1]


class Run(NamedTuple):
    """What a command needs to know: its directory, the text, its steps (micro-batches) and seed."""

    directory: Path
    text: Path
    steps: int
    seed: int
    seconds: float | None  # the budget; None: a probe
    args: argparse.Namespace

    @property
    def shape(self) -> Path:
        """The model's JSON."""
        return self.args.output_dir / "shape.json"


class System(NamedTuple):
    """A row of the table. `command`: Run -> the script and its arguments."""

    name: str
    command: Callable[[Run], list]
    reads_bos: bool = False


def ours(run: Run) -> list:
    """pretrain.py as a user types it."""
    options = [word for name, value in OURS.items() for word in (f"--{name}", value)]
    command = [ROOT / "pretrain.py", "--train_files", run.text, "--model_config", run.shape]
    command += ["--tokenizer", run.args.tokenizer, "--output_dir", run.directory / "model"]
    length = ["--time_budget", f"{run.seconds}s"] if run.seconds else ["--max_steps", run.steps]
    return [*command, *options, *QUIET, "--seed", run.seed, *length]


def minimind(run: Run, batch_size: int, accumulation: int, learning_rate: float) -> list:
    """minimind's own script; its defaults are named so that the result shows them."""
    rows = run.directory / "rows.jsonl"
    with run.text.open(encoding="utf-8") as lines, rows.open("w", encoding="utf-8") as file:
        file.writelines(line for _, line in zip(range(run.steps * batch_size), lines, strict=False))
    # It looks for ../model, and writes to ../checkpoints
    (run.directory / "trainer").mkdir()
    (run.directory / "model").symlink_to(run.args.minimind / "model")
    hidden_size, layers = SIZES[run.args.size]
    command = [run.args.minimind / "trainer" / "train_pretrain.py", "--data_path", rows]
    command += ["--save_dir", run.directory / "out", "--device", "cpu", "--epochs", 1]
    command += ["--hidden_size", hidden_size, "--num_hidden_layers", layers]
    command += ["--batch_size", batch_size, "--accumulation_steps", accumulation]
    return [*command, "--learning_rate", learning_rate]


def classic(run: Run, learning_rate: float, num_proc: int) -> list:
    """classic_recipe.py"""
    command = [ROOT / "benchmarks" / "classic_recipe.py", "--train_file", run.text]
    command += ["--tokenizer", run.args.tokenizer, "--model", run.shape, "--seed", run.seed]
    command += ["--output_dir", run.directory / "model", "--max_steps", run.steps]
    return [*command, "--learning_rate", learning_rate, "--num_proc", num_proc]


PEERS = [
    System(
        "minimind as it stands",
        partial(minimind, batch_size=32, accumulation=8, learning_rate=5e-4),
        reads_bos=True,
    ),
    System(
        "minimind at its best",
        partial(minimind, batch_size=32, accumulation=1, learning_rate=2e-3),
        reads_bos=True,
    ),
    System("classic recipe", partial(classic, learning_rate=5e-4, num_proc=1)),
    System("classic recipe at its best", partial(classic, learning_rate=2e-3, num_proc=2)),
]
OUR_SYSTEM = System("ours", ours)


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minimind", type=Path, required=True, help="a clone of minimind")
    parser.add_argument("--train_files", nargs="+", required=True, help="documents")
    parser.add_argument("--tokenizer", type=Path, help="default: minimind's")
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--budget", type=float, default=240, help="seconds of each peer")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4, 1], help="budgets of ours / it"
    )
    parser.add_argument("--peers", nargs="*", default=[each.name for each in PEERS])
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, on shuffled text")
    parser.add_argument("--held_out", type=int, default=200, help="documents to evaluate on")
    parser.add_argument("--documents", type=int, help="to train on at most; default: all")
    parser.add_argument("--points", type=int, default=10, help="of a curve")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/time_to_quality"))
    parser.add_argument("--quick", action="store_true", help="1 M parameters, a few seconds each")
    args = parser.parse_args()
    if args.quick:
        args.size, args.budget, args.shares = "1m", 20, [0.6]
        args.peers = ["minimind at its best", "classic recipe at its best"]
        args.held_out, args.points, args.documents = 50, 3, 5000
    args.minimind = args.minimind.resolve()
    args.tokenizer = (args.tokenizer or args.minimind / "model").resolve()
    args.output_dir = args.output_dir.resolve()

    # The text, the model's shape and the held-out rows after either start token
    tokenizer = load_tokenizer(args.tokenizer)
    texts = prepare_texts(args)
    config = shape(args.size, len(tokenizer))
    (args.output_dir / "shape.json").write_text(json.dumps(config), encoding="utf-8")
    model = MiniMindForCausalLM(MiniMindConfig(**config))
    held_out = json.loads((args.output_dir / "held_out.json").read_text(encoding="utf-8"))
    starts = {False: tokenizer.eos_token_id, True: tokenizer.bos_token_id}
    rows = {bos: held_out_rows(held_out, tokenizer, start) for bos, start in starts.items()}

    # How fast each one is, then all of them once per seed
    peers = [each for each in PEERS if each.name in args.peers]
    plan = [(each, args.budget) for each in peers]
    plan += [(OUR_SYSTEM, share * args.budget) for share in args.shares]
    pace = {each: probe(each, texts[0], args) for each in peers}
    result = {
        "machine": machine_name(args.threads),
        "parameters": model.num_parameters(),
        "size": args.size,
        "held_out_tokens": sum(len(row["labels"]) - 1 for row in rows[False]),
        "runs": [],
    }
    for seed, text in enumerate(texts):
        for system, budget in plan:
            outside, step = pace.get(system, (0, budget))  # the clock ends ours
            steps = max(2, int((budget - outside) / step))
            run = start(system, text, steps, seed, budget, args)
            run["curve"] = [
                (
                    round(point["seconds"], 2),
                    bits_per_byte(model, point["file"], tokenizer, rows[system.reads_bos]),
                )
                for point in run.pop("weights")
            ]
            shutil.rmtree(run.pop("directory"))
            run["seconds"], run["bits_per_byte"] = run["curve"][-1]
            result["runs"].append(run)
            print(
                f"{system.name}: {run['bits_per_byte']:.4f} in {run['seconds']:.1f} s", flush=True
            )
            save(result, args.output_dir)
    report(result)


# What all of them share


def shape(size: str, vocab_size: int) -> dict:
    """The model's fields, which minimind's MiniMindConfig derives from two of them."""
    hidden_size, layers = SIZES[size]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 64 * math.ceil(hidden_size * math.pi / 64),
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden_size // 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }


def prepare_texts(args: argparse.Namespace) -> list[Path]:
    """Write held_out.json, and for each seed the other documents in an order of its own."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    hold_out, train = HoldOut(0.05, args.held_out), []
    for text in read_documents(args.train_files):
        train += hold_out.offer(text, text)
    held_out = args.output_dir / "held_out.json"
    held_out.write_text(json.dumps(hold_out.chosen(), ensure_ascii=False), encoding="utf-8")
    files = []
    for seed in range(args.seeds):
        random.Random(seed).shuffle(train)
        files.append(args.output_dir / f"train-{seed}.jsonl")
        lines = (
            json.dumps({"text": text}, ensure_ascii=False) + "\n"
            for text in train[: args.documents]
        )
        files[-1].write_text("".join(lines), encoding="utf-8")
    return files


def held_out_rows(
    texts: Sequence[str], tokenizer, start_token_id: int, length: int = LENGTH
) -> list[dict]:
    """Documents -> one row each of a start token, their ids and EOS, `length` at most; the start
    is not predicted."""
    encoder, rows = DocumentEncoder(tokenizer, fast=False), []
    for text in texts:
        ids = np.append([start_token_id], encoder([text])).astype(np.int32)[:length]
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def bits_per_byte(model, weights: str, tokenizer, rows: list[dict]) -> float:
    """Of saved weights on rows, in fp32; raises RuntimeError if their shapes are not the
    model's."""
    model.load_state_dict(torch.load(weights))
    return row_metrics(model.eval(), tokenizer, rows, batch_size=16)["bits_per_byte"]


# Runs


def start(system: System, text: Path, steps: int, seed: int, seconds: float | None, args) -> dict:
    """Run one system; its weights are still to be evaluated."""
    directory = args.output_dir / "run"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    command = [*map(str, system.command(Run(directory, text, steps, seed, seconds, args)))]
    caches = ("MINIMIND_CACHE", "HF_DATASETS_CACHE", "TORCHINDUCTOR_CACHE_DIR")
    environment = os.environ | {name: str(directory / name) for name in caches}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    marks = [(seconds or 0) * (index + 1) / args.points for index in range(args.points)]
    driver = [sys.executable, ROOT / "benchmarks" / "timed_script.py", directory]
    place = directory / "trainer"
    with (directory / "log").open("w") as log:
        done = subprocess.run(
            [*driver, str(time.time()), ",".join(map(str, marks)), *command],
            cwd=place if place.exists() else ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise SystemExit(f"{system.name} failed:\n{(directory / 'log').read_text()[-4000:]}")
    times = json.loads((directory / "times.json").read_text())
    return {
        "system": system.name,
        "command": [word.replace(str(args.output_dir), "DIR") for word in command],
        "seed": seed,
        "budget": seconds,
        "updates": len(times["steps"]),
        "directory": str(directory),
        **times,
    }


def probe(system: System, text: Path, args: argparse.Namespace) -> tuple[float, float]:
    """The seconds of a run outside its steps, and of one step."""
    if isinstance(system.command, partial) and "accumulation" in system.command.keywords:
        system = system._replace(command=partial(system.command, accumulation=1))
    times = start(system, text, PROBE, 0, None, args)
    steps = times["steps"]
    each = statistics.median(after - before for before, after in pairwise(steps))
    return times["weights"][-1]["seconds"] - len(steps) * each, each


def machine_name(threads: int) -> str:
    """The processor, the threads and whether it has bf16."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    return f"{name}, {threads} threads, {'with' if bf16_is_fast('cpu') else 'without'} bf16"


# The result


def reached(result: dict, peer: str) -> list[dict]:
    """For each seed: the shortest run of ours that ended at or below what the peer ended at."""
    found = []
    for run in result["runs"]:
        if run["system"] != peer:
            continue
        mine = [
            each
            for each in result["runs"]
            if (each["system"], each["seed"]) == (OUR_SYSTEM.name, run["seed"])
            and each["bits_per_byte"] <= run["bits_per_byte"]
        ]
        seconds = min((each["seconds"] for each in mine), default=math.inf)
        found.append({"seconds": seconds, "ratio": seconds / run["seconds"]})
    return found


def report(result: dict) -> None:
    """Print the table: medians over the seeds, with the smallest and the largest."""
    print(f"{result['machine']}; {result['parameters']:,} parameters")
    print(f"{'':<28}{'updates':>9}{'seconds':>9}{'bits per byte':>24}{'ours':>8}{'ours / it':>22}")
    for name, budget in dict.fromkeys((run["system"], run["budget"]) for run in result["runs"]):
        runs = [
            each for each in result["runs"] if (each["system"], each["budget"]) == (name, budget)
        ]
        seconds, updates = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "updates")
        )
        quality = spread([run["bits_per_byte"] for run in runs], 4)
        line = f"{name:<28}{updates:>9,.0f}{seconds:>9.1f}{quality:>24}"
        if name != OUR_SYSTEM.name:
            times = reached(result, name)
            line += f"{statistics.median(each['seconds'] for each in times):>8.1f}"
            line += f"{spread([each['ratio'] for each in times], 2):>22}"
        print(line)


def spread(values: list[float], digits: int) -> str:
    """Median (min-max)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    text = f"{middle:.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def save(result: dict, directory: Path) -> None:
    """Write result.json and result.png: the curves of all runs, and where each one ended."""
    result["ours_reaches"] = {each.name: reached(result, each.name) for each in PEERS}
    (directory / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    names = list(dict.fromkeys(run["system"] for run in result["runs"]))
    with canvas(9, 5) as figure:
        axes = plain(figure.add_axes((0.08, 0.1, 0.88, 0.86)))
        for run in result["runs"]:
            colour = COLOURS[names.index(run["system"])]
            draw_line(axes, run["curve"], color=colour, linewidth=1, alpha=0.5)
            axes.scatter(run["seconds"], run["bits_per_byte"], color=colour, clip_on=False)
        for name, colour in zip(names, COLOURS, strict=False):
            axes.plot([], [], color=colour, label=name)
        axes.legend(title="bits per byte against seconds", frameon=False)
        (directory / "result.png").write_bytes(to_png(figure))


if __name__ == "__main__":
    main()
