"""How pretraining grows: tokens per second against the length of rows, batch, model and processes,
memory against the vocabulary, time and memory of preparing the data against the corpus.

    python benchmarks/scaling.py text.jsonl [more.jsonl ...] [--output_dir runs/scaling]
    python benchmarks/scaling.py text.jsonl --quick                     # under 3 minutes
    python benchmarks/scaling.py text.jsonl --axes length processes

Every run is pretrain.py in a process of its own. Those of one axis take turns, a step each
(turns.py). An axis varies one thing, and the rest is the base: the size `--size`, 8 rows of 512
tokens. `peak` is the share of the fastest matrix product measured in between, `other` the share of
a step outside forward, backward and optimizer, `memory` the peak of the tensors in a step. Of
several processes, each has its share of the cores and of the step's rows; tokens are those of all.

--output_dir receives scaling.json, and scaling.png if matplotlib is there.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from side_by_side import DEVICE, device_name
from turns import Program, start_all, take_turns
from twins import read_size

from minimind import MiniMindForCausalLM
from minimind.common.charts import COLOURS, canvas, draw_line, plain, to_png
from minimind.common.errors import decoration, reports_user_errors
from minimind.common.launch import bf16_is_fast
from minimind.costs.flops import flops
from minimind.costs.step import Step
from minimind.costs.this_machine import matmul_peak
from minimind.data.documents import load_blocks
from minimind.data.files import read_documents
from minimind.tokenizer import load_tokenizer
from minimind.training.data_arguments import DataArguments

ROOT = Path(__file__).parents[1]
ROWS, LENGTH = 8, 512  # of the base
# axis -> its values, those with --quick, and what a table calls them
AXES = {
    "length": ((128, 256, 512, 1024, 2048), (128, 512), "tokens of a row"),
    "batch": ((1, 2, 4, 8, 16, 32), (1, 8), "rows of a step"),
    "model": (("tiny", "26m", "64m", "104m"), ("tiny", "26m"), "size"),
    "processes": ((1, 2), (1, 2), "processes"),
    "vocabulary": ((6_400, 25_600, 102_400), (6_400, 25_600), "entries of the vocabulary"),
    "corpus": ((1, 4, 16), (1, 4), "copies of the corpus"),
}


def command(
    axis: str, value, args: argparse.Namespace, directory: Path
) -> tuple[list, dict[str, int | str]]:
    """pretrain.py for a value of an axis, and the run's shape: size, rows and length."""
    shape = {"size": args.size, "rows": ROWS, "length": LENGTH, "vocab_size": 0, "processes": 1}
    name = {"batch": "rows", "model": "size", "vocabulary": "vocab_size"}.get(axis, axis)
    shape[name] = value
    if axis == "length":  # the same tokens
        shape["rows"] = max(1, ROWS * LENGTH // value)
    elif axis == "model":
        shape["rows"] = ROWS // 2
    config = json.loads((ROOT / f"configs/model/{shape['size']}.json").read_text())
    if shape["vocab_size"]:
        config["vocab_size"] = shape["vocab_size"]
    path = directory / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    words = [ROOT / "pretrain.py", "--train_files", *args.files, "--model_config", path]
    words += ["--block_size", shape["length"], "--output_dir", directory / "run"]
    words += ["--per_device_train_batch_size", max(1, shape["rows"] // shape["processes"])]
    words += ["--eval_ratio", 0, "--sample_steps", -1, "--save_strategy", "no"]
    return [*words, "--report_to", "none", "--max_steps", 1000], shape


def run_axis(axis: str, values: tuple, args: argparse.Namespace, directory: Path) -> list[dict]:
    """Measure pretrain.py at each value; a row of the table for each."""
    precision = "bf16" if bf16_is_fast() else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes, peaks = [], []

    def programs_of_axis() -> Iterator[Program]:
        for value in values:
            where = directory / f"{axis}-{value}"
            where.mkdir()
            words, shape = command(axis, value, args, where)
            shapes.append(shape)
            environment = {"MINIMIND_CACHE": str(directory / "cache")}
            if axis == "processes":
                environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // value))
            processes = value if axis == "processes" else 0
            yield Program(f"{axis} {value}", words, where, processes, environment)

    programs = start_all(programs_of_axis())
    take_turns(programs, args.rounds, lambda: peaks.append(matmul_peak(DEVICE, dtype)))

    rows = []
    for value, program, shape in zip(values, programs, shapes, strict=True):
        config = read_size(shape["size"])
        config.vocab_size = shape["vocab_size"] or config.vocab_size
        model = MiniMindForCausalLM(config)
        step = Step(1, shape["length"], precision=precision, device=DEVICE)
        speed = program.speed("tokens") * shape["processes"]
        needed = flops(model, step)["model"] / step.tokens
        other = [
            1
            - sum(report[part] for part in ("forward", "backward", "optimizer")) / report["seconds"]
            for report in program.reports
        ]
        rows.append(
            {
                "value": value,
                "parameters": model.num_parameters(),
                "rows": shape["rows"],
                "length": shape["length"],
                "tokens_per_second": speed,
                "min": min(program.speeds("tokens")) * shape["processes"],
                "max": max(program.speeds("tokens")) * shape["processes"],
                "peak": speed * needed / max(peaks),
                "other": sorted(other)[len(other) // 2],
                "memory": program.memory,
            }
        )
    return rows


def run_corpus(values: tuple, args: argparse.Namespace, directory: Path) -> list[dict]:
    """Prepare the corpus so many times over, each in a process of its own."""
    rows = []
    for value in values:
        path = directory / "corpus.jsonl"
        with path.open("w", encoding="utf-8") as out:
            for copy in range(value):
                for text in read_documents(args.files):
                    out.write(json.dumps({"text": f"{copy} {text}"}, ensure_ascii=False) + "\n")
        words = [sys.executable, __file__, str(path), "--once"]
        found = subprocess.run(words, check=True, capture_output=True, text=True)
        rows.append({"value": value, **json.loads(found.stdout.splitlines()[-1])})
    return rows


def prepare_once(files: list[str]) -> None:
    """Print size, tokens, seconds and peak memory of preparing the files."""
    tokenizer = load_tokenizer()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MINIMIND_CACHE"] = cache
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        began = time.perf_counter()
        facts = load_blocks(
            DataArguments(train_files=files, eval_ratio=0.0), tokenizer, LENGTH
        ).facts
        seconds = time.perf_counter() - began
    found = {"bytes": sum(Path(file).stat().st_size for file in files)}
    found |= {"tokens": facts["train"]["tokens"], "seconds": seconds, "memory_before": before}
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


def show(axis: str, rows: list[dict]) -> None:
    """Print the table of an axis."""
    table = Table(title=f"{axis}", box=None)
    is_corpus = axis == "corpus"
    columns = ["MB", "tokens", "seconds", "MB/s", "peak MiB", "MiB before"]
    if not is_corpus:
        columns = ["parameters", "rows", "tokens/s", "min", "max", "peak", "other", "memory MiB"]
    for column in (AXES[axis][2], *columns):
        table.add_column(column, justify="right")
    for row in rows:
        if is_corpus:
            size = row["bytes"] / 1e6
            cells = [f"{size:,.1f}", f"{row['tokens']:,}", f"{row['seconds']:.1f}"]
            cells += [f"{size / row['seconds']:.1f}", f"{row['memory'] / 2**20:,.0f}"]
            cells += [f"{row['memory_before'] / 2**20:,.0f}"]
        else:
            cells = [f"{row['parameters']:,}", f"{row['rows']} x {row['length']}"]
            cells += [f"{row[name]:,.0f}" for name in ("tokens_per_second", "min", "max")]
            cells += [f"{row[name]:.1%}" for name in ("peak", "other")]
            cells += [f"{row['memory'] / 2**20:,.0f}" if row["memory"] else ""]
        table.add_row(str(row["value"]), *cells)
    Console(highlight=False, width=130).print(table)


def draw(results: dict[str, list[dict]]) -> bytes:
    """One panel for each axis, as PNG: speed, or memory against vocabulary and corpus."""
    with canvas(9, 2.2 * -(-len(results) // 2)) as figure:
        grid = figure.subplots(-(-len(results) // 2), 2, squeeze=False).flatten()
        for axes, (axis, rows) in zip(grid, results.items(), strict=False):
            what = "memory" if axis in ("vocabulary", "corpus") else "tokens_per_second"
            points = [(place, row[what] or 0) for place, row in enumerate(rows)]
            if what == "memory":
                points = [(x, y / 2**20) for x, y in points]
            draw_line(plain(axes), points, color=COLOURS[0], marker="o")
            axes.set_xticks(range(len(rows)), [str(row["value"]) for row in rows])
            axes.set_ylim(bottom=0)
            unit = "MiB" if what == "memory" else "tokens/s"
            axes.set_title(f"{unit} against {AXES[axis][2]}", fontsize=9)
        for axes in grid[len(results) :]:
            axes.set_visible(False)
        figure.tight_layout()
        return to_png(figure)


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="files of documents")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--size", help="of configs/model; default: 26m, with --quick tiny")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="two values of each axis")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        prepare_once(args.files)
        return
    args.files = [str(Path(file).resolve()) for file in args.files]
    args.size = args.size or ("tiny" if args.quick else "26m")
    args.rounds = args.rounds or (2 if args.quick else 5)
    print(f"{device_name()}, {args.size}, {ROWS} x {LENGTH} tokens, {args.rounds} rounds")

    results = {}
    for axis in args.axes:
        with tempfile.TemporaryDirectory() as name:
            values = AXES[axis][1 if args.quick else 0]
            if axis == "corpus":
                results[axis] = run_corpus(values, args, Path(name))
            else:
                results[axis] = run_axis(axis, values, args, Path(name))
        show(axis, results[axis])
        args.output_dir.mkdir(parents=True, exist_ok=True)
        found = {"device": device_name(), "size": args.size, "axes": results}
        path = args.output_dir / "scaling.json"
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    with decoration("scaling.png"):
        (args.output_dir / "scaling.png").write_bytes(draw(results))


if __name__ == "__main__":
    main()
