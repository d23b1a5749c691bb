"""What one GPU does: MFU, compilation, SFT and DPO beside TRL, optimizers, attention kernels, ways
to the loss, memory beside the plan, and the tests that need a GPU.

    bash benchmarks/gpu.sh                             # one call of at most 8 minutes
    bash benchmarks/gpu.sh --device cpu --quick        # every part at a tiny size, without a GPU
    bash benchmarks/gpu.sh --parts tests kernels       # some parts

The parts run in the order of their value, each in a process of its own that is ended after its
seconds. The table so far is printed after each part, so that a call that is cut off still tells.
A part that fails is a line with its reason, and the others go on. The exit code is 0 if all parts
passed and every bar was met.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from side_by_side import DEVICE, device_name

ROOT = Path(__file__).parents[1]
QUICK = "--quick" in sys.argv
BATCH, LENGTH = (2, 64) if QUICK else (64, 512)


class Line(NamedTuple):
    """A line of the table; `reached` is what is compared with the `bar`."""

    name: str
    value: str
    bar: float | None = None
    reached: float = 0.0

    @property
    def verdict(self) -> str:
        """Whether the bar is met; a quick call has none."""
        if self.bar is None or QUICK:
            return ""
        return f"bar {self.bar:g}: {'met' if self.reached >= self.bar else 'MISSED'}"


class Part(NamedTuple):
    """`words` follow `python`; {} is a directory of its own. `read` turns what it printed and that
    directory into lines. `limit`: its seconds at most."""

    words: str
    read: Callable[[str, Path], list[Line]]
    limit: float


def pretraining(size: str, bar: float | None = None, options: str = "", limit: float = 60) -> Part:
    """pretrain.py as a user starts it, all rows of a step in one micro-batch."""
    name = f"pretrain.py {size} {options}".strip()

    def read(output: str, directory: Path) -> list[Line]:
        # The first steps compile kernels and fill caches
        logs = re.findall(r"([\d,]+) tokens/s +MFU +([\d.]+)%", output)[2:]
        speed = median(int(speed.replace(",", "")) for speed, _ in logs)
        mfu = median(float(share) / 100 for _, share in logs)
        plan = re.search(r"plan: over .*?: (.*)", output)
        lines = [Line(name, f"MFU {mfu:.1%}, {speed:,.0f} tokens/s", bar, mfu)]
        return [*lines, Line(f"{name}, beside its plan", plan[1] if plan else "not compared")]

    words = f"pretrain.py --config configs/pretrain/{size}.yaml --gradient_accumulation_steps 1"
    words += f" --per_device_train_batch_size {BATCH} --block_size {LENGTH} --eval_ratio 0"
    words += " --max_steps 8 --logging_steps 1" if QUICK else " --max_steps 100"
    words += " --model_config configs/model/tiny.json" if QUICK else ""
    words += " --eval_strategy no --save_strategy no --sample_steps -1 --report_to none"
    return Part(f"{words} --dataloader_drop_last true --output_dir {{}}/run {options}", read, limit)


def read_throughput(output: str, directory: Path) -> list[Line]:
    """The JSON of throughput.py."""
    bars = {"sft": {"TRL": 3.0}, "dpo": {"TRL": 5.0, "TRL, precomputed": 3.0}}
    lines, results = [], json.loads((directory / "result.json").read_text(encoding="utf-8"))
    for key, found in results.items():
        for name, row in found["rows"].items() if isinstance(found, dict) else ():
            ratio, memory = row["ours_is_faster_by"], (row["memory"] or 0) / 2**30
            value = f"{row['useful']:,.0f} useful tokens/s, {memory:.1f} GiB, ours is x {ratio:.2f}"
            lines.append(Line(f"{key}, {name}", value, bars[key.split()[0]].get(name), ratio))
    return lines


def read_printed(output: str, directory: Path) -> list[Line]:
    """The lines "name: value" of step_parts.py and optimizer_step.py."""
    found = re.findall(r"^((?:step|attention|head and loss), .*?): (.*)", output, re.MULTILINE)
    return [Line(*pair) for pair in found]


def read_tests(output: str, directory: Path) -> list[Line]:
    """The last line of pytest."""
    return [Line("tests/test_gpu.py", output.strip().splitlines()[-1].strip("= "))]


COMPILE = "--torch_compile true" + " --torch_compile_backend aot_eager" * QUICK
THROUGHPUT = "-m minimind.cli world {} && PYTHON benchmarks/throughput.py --data {}"
THROUGHPUT += " --chats sft.jsonl --pairs dpo.jsonl --json {}/result.json"
THROUGHPUT += " --quick" if QUICK else " --precisions bf16 --batch_size 32 --rounds 10"
KERNELS = f"benchmarks/step_parts.py --batch_size {BATCH} --length {LENGTH}"
KERNELS += " --rounds 2 --size tiny" if QUICK else ""
OPTIMIZERS = f"benchmarks/optimizer_step.py --batch_size {BATCH} --length {LENGTH}"
OPTIMIZERS += " --quick" if QUICK else " --sizes 26m 104m"
PARTS = {
    "104m": pretraining("104m", 0.5),
    "26m": pretraining("26m", 0.4),
    "104m compiled": pretraining("104m", 0.5, COMPILE, 120),
    "26m compiled": pretraining("26m", 0.4, COMPILE, 100),
    "26m with AdamW": pretraining("26m", 0.4, "--optim adamw_torch_fused"),
    "sft": Part(f"{THROUGHPUT} --stages sft", read_throughput, 80),
    "dpo": Part(f"{THROUGHPUT} --stages dpo", read_throughput, 90),
    "optimizers": Part(OPTIMIZERS, read_printed, 45),
    "tests": Part("-m pytest -q tests/test_gpu.py", read_tests, 100),
    "kernels": Part(KERNELS, read_printed, 90),
    "64m": pretraining("64m"),
    "198m-moe": pretraining("198m-moe"),
}


def run(name: str, part: Part, left: float) -> tuple[list[list[str]], bool]:
    """The cells of a part's lines, and whether it passed."""
    began, limit = time.perf_counter(), max(1, min(left, part.limit * (5 if QUICK else 1)))
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as file:
        command = f"PYTHON {part.words}".replace("PYTHON", sys.executable).replace("{}", directory)
        options = {"shell": True, "cwd": ROOT, "start_new_session": True}
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            failure = f"exit code {code}" if (code := child.wait(limit)) else ""
        except subprocess.TimeoutExpired:
            failure = f"ended after {limit:.0f} s"
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        file.seek(0)
        output, lines = file.read(), []
        try:
            lines = part.read(output, Path(directory))
        except Exception as error:
            failure = failure or f"not understood: {error!r}"
    failure = failure or ("" if lines else "it printed no line of the table")
    cells = [[line.name, line.value, line.verdict] for line in lines]
    if failure:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        cells.append([name, f"{failure}; {last}"[:150], "FAILED"])
    cells[-1].append(f"{time.perf_counter() - began:.0f} s")
    return cells, not failure


def show(title: str, rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print(f"\n{title}")
    for name, value, *rest in rows:
        cells = [name.ljust(widths[0]), value.ljust(widths[1]), *rest]
        print("  ".join(cells).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no bars")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--budget", type=float, default=1800 if QUICK else 460, help="seconds")
    args = parser.parse_args()
    if args.device == "cuda" and DEVICE != "cuda":
        sys.exit("error: there is no CUDA device; --device cpu --quick tries every part without")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0" if args.device == "cuda" else ""
    os.environ["MINIMIND_LANG"] = "en"  # the lines of pretrain.py are read
    began, rows, passed = time.perf_counter(), [], True
    for name in args.parts:
        new, good = run(name, PARTS[name], args.budget - (time.perf_counter() - began))
        rows, passed = rows + new, passed and good
        show(f"{device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", rows)
    print(f"{time.perf_counter() - began:.0f} s in all")
    sys.exit(not passed or any(row[2].endswith("MISSED") for row in rows))


if __name__ == "__main__":
    main()
