"""Predicted and real peak memory of training steps, over sizes, stages, precisions, optimizers and
batches.

    python benchmarks/plan_memory.py [--steps 3] [--json]

Each row is a real run of a stage's script on the embedded corpus, in a process of its own, twice:
with every tensor in a mapping of its own, so that the process's resident memory is that of its
tensors, and with glibc's allocator as it is. On a GPU it is the allocator's account, twice.
"""

import argparse
import json
import os
import sys
from contextlib import redirect_stdout

import datasets
import torch
from rich.console import Console
from rich.table import Table

from minimind.common.errors import reports_user_errors
from minimind.costs.this_machine import this_device
from minimind.planning.computing import make_plan
from minimind.planning.measuring import measure
from minimind.planning.planned_runs import read_recipes

CHECKPOINTING = "--activation_checkpointing true"
ADAMW = "--optim adamw_torch_fused"
TINY = "configs/pretrain/26m.yaml --model_config configs/model/tiny.json --block_size 256"
CASES = (
    f"{TINY} --per_device_train_batch_size 8 {ADAMW}",
    f"{TINY} --per_device_train_batch_size 32",
    f"{TINY} --per_device_train_batch_size 32 {CHECKPOINTING} {ADAMW}",
    f"configs/pretrain/26m.yaml --per_device_train_batch_size 1 {ADAMW}",
    f"configs/pretrain/26m.yaml --per_device_train_batch_size 4 {ADAMW}",
    "configs/pretrain/26m.yaml --per_device_train_batch_size 4 --bf16 false",
    f"configs/pretrain/26m.yaml --per_device_train_batch_size 8 {CHECKPOINTING} {ADAMW}",
    "configs/pretrain/26m.yaml --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    f" {ADAMW}",
    "configs/sft/26m.yaml --per_device_train_batch_size 2",
    "configs/sft/26m.yaml --per_device_train_batch_size 2 --loss_normalization conversation",
    "configs/lora/26m.yaml --per_device_train_batch_size 2",
    "configs/dpo/26m.yaml --per_device_train_batch_size 8",
    f"configs/pretrain/64m.yaml --per_device_train_batch_size 2 --bf16 false {ADAMW}",
    f"configs/pretrain/145m-moe.yaml --per_device_train_batch_size 1 {ADAMW}",
)


def shorter(case: str) -> str:
    """A case as it is shown."""
    for long, short in {
        "configs/pretrain/26m.yaml --model_config configs/model/tiny.json": "tiny",
        "configs/": "",
        "optim adamw_torch_fused": "adamw",
    }.items():
        case = case.replace(long, short)
    return case.replace(".yaml", "").replace("per_device_train_", "").replace("--", "")


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    device, results = this_device(), []
    for case in CASES:
        path, *words = case.split()
        with redirect_stdout(sys.stderr):
            (recipe,) = read_recipes([path], words)
            planned = make_plan(recipe, device).memory["peak"]
        found = {}
        for name, threshold in {"tensors": "65536", "process": None}.items():
            os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
            if threshold and not torch.cuda.is_available():
                os.environ["MALLOC_MMAP_THRESHOLD_"] = threshold
            found[name] = measure(recipe, options.steps)["peak_memory"]
        results.append({"case": case, "planned": round(planned), **found})
        ratios = ", ".join(f"{name} {value / planned - 1:+.1%}" for name, value in found.items())
        print(f"{case}: {ratios}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"device": device.name, "rows": results}))
        return
    table = Table(title=f"peak memory of a step on {device.name}, MiB", box=None)
    for column in ("recipe", "planned", "tensors", "", "process", ""):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for row in results:
        cells = [f"{row['planned'] / 2**20:,.0f}"]
        for name in ("tensors", "process"):
            cells += [f"{row[name] / 2**20:,.0f}", f"{row[name] / row['planned'] - 1:+.0%}"]
        table.add_row(shorter(row["case"]), *cells)
    Console(highlight=False, width=150).print(table)


if __name__ == "__main__":
    main()
