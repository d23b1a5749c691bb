"""Run a stage over a grid of options and seeds, and compare the held-out results.

    python benchmarks/sweep.py configs/pretrain/26m.yaml --seeds 3 \\
        --set optim=muon,adamw_torch_fused --set learning_rate=1e-3,2e-3,5e-3
    python benchmarks/sweep.py configs/dpo/26m.yaml --set beta=0.1,0.2 --answers questions.jsonl

Each run is the stage's own script in a process of its own, with the recipe's options, those beside
it and those of the grid; all combinations are parsed before the first one runs. When a run ends,
its result is added to --output as a line. A second call runs what is missing there and what failed.
Delete the file after a change of data, parent or code, which it does not record.

The table has a line for each setting, the best first: mean over the seeds, lowest and highest.
"before" is the parent, or random weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import fmean

from minimind.common.errors import UserError, reports_user_errors
from minimind.common.files import append_json, hash_file, json_lines, read_json
from minimind.planning.planned_runs import PlannedRun, read_recipes

ROOT = Path(__file__).parents[1]
DEFAULTS = ["--eval_strategy=no", "--save_strategy=no", "--report_to=none", "--sample_steps=-1"]
QUICK = ["--max_steps=2", "--max_eval_rows=8", "--logging_steps=1"]
# The results that the table shows; by default the first of a stage decides the order
PAIRS = ["rewards/accuracies", "rewards/margins", "logps/chosen", "loss"]
SHOWN = {"pretrain": ["bits_per_byte"], "sft": ["loss"], "dpo": PAIRS}
SHOWN["reward"] = ["accuracy", "margin", "loss"]
ANSWERS = ["exact_match", "courteous"]


def grid(settings: list[str]) -> list[dict[str, str]]:
    """["a=1,2", "b=3"] -> [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]; raises UserError."""
    axes = []
    for setting in settings:
        name, _, values = setting.partition("=")
        if not name or not values:
            raise UserError(f"--set {setting}: expected NAME=VALUE,VALUE such as beta=0.1,0.2.")
        axes.append([(name, value) for value in values.split(",")])
    return [dict(point) for point in product(*axes)]


def run(planned: PlannedRun, answers: list[str], threads: int) -> dict:
    """Run the stage: its held-out metrics before and after, or the "error" that ended it.

    Raises:
        UserError: the script refuses the options, as it would with each other seed.
    """
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "MINIMIND_LANG": "en"}
    options = {"capture_output": True, "text": True, "env": environment}
    with tempfile.TemporaryDirectory(prefix="minimind-sweep-") as directory:
        output = Path(directory) / "run"
        command = [sys.executable, str(ROOT / planned.spec.script), *planned.words]
        done = subprocess.run([*command, "--output_dir", str(output)], **options)
        if not done.returncode and answers:
            command = [sys.executable, "-m", "minimind.cli", "evaluate", str(output), *answers]
            done = subprocess.run(command, **options)
        if done.returncode:
            error = done.stderr.strip().rpartition("error: ")[2][-2000:]
            if not (output / "train_log.jsonl").is_file():
                raise UserError(f"{planned.spec.script} {' '.join(planned.words)}: {error}")
            return {"error": error}
        record = read_json(output / "stage.json", "The script writes it last.")
    result = {"seconds": record["seconds"], **record["metrics"]}
    if answers:
        result["after"] |= {k: v for k, v in json.loads(done.stdout).items() if k in ANSWERS}
    return result


def spread(values: list[float]) -> str:
    """Mean, and of several values the lowest and the highest."""
    ends = f" ({min(values):.4f} - {max(values):.4f})" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{ends}" if values else "-"


def table(rows: list[dict], shown: list[str], by: str) -> list[list[str]]:
    """The rows of all runs -> the cells of each line."""
    settings, lines = defaultdict(list), []
    for row in rows:
        settings[" ".join(f"{name}={value}" for name, value in row["set"].items())].append(row)
    for setting, own in settings.items():
        good = [row for row in own if "error" not in row]
        found = {n: [row["after"][n] for row in good if n in row["after"]] for n in (by, *shown)}
        last = f"{fmean(row['seconds'] for row in good):.0f}" if good else own[0]["error"][:70]
        sign = 1 if by in ("loss", "bits_per_byte") else -1
        order = sign * fmean(found[by]) if found[by] else float("inf")
        cells = [spread(found[name]) for name in shown]
        lines.append((order, [setting, f"{len(good)}/{len(own)}", *cells, last]))
    before = next((row["before"] for row in rows if row.get("before")), {})
    cells = [f"{before[name]:.4f}" if name in before else "" for name in shown]
    head = ["setting", "runs", *shown, "seconds"]
    return [head, ["before", "", *cells, ""], *(cells for _, cells in sorted(lines))]


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are the script's.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--answers", nargs="+", default=[], help="files of questions to answer too")
    parser.add_argument("--by", help="the result by which the table is sorted")
    parser.add_argument("--output", type=Path, help="default: runs/sweep-STAGE.jsonl")
    parser.add_argument("--quick", action="store_true", help="2 steps each, to see that it works")
    args, words = parser.parse_known_args()

    # Every run, parsed as its script does
    runs = {}
    for point, seed in product(grid(args.set), range(args.seeds)):
        own = [f"--{name}={value}" for name, value in point.items()]
        own = [*DEFAULTS, f"--seed={seed}", *words, *own, *(QUICK if args.quick else ())]
        (planned,) = read_recipes([args.recipe], own)
        spec, key = planned.spec, [hash_file(args.recipe), args.answers, planned.words]
        runs[json.dumps(key)] = (point, planned)
    output = args.output or Path(f"runs/sweep-{spec.name}.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)

    # Those that are not in the file
    found = {row["run"]: row for row in json_lines(output) if row["run"] in runs}
    rows = [row for row in found.values() if "error" not in row]
    missing = [key for key in runs if "error" in found.get(key, {"error": "not run yet"})]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as executor:
        jobs = {executor.submit(run, runs[k][1], args.answers, threads): k for k in missing}
        try:
            for job in as_completed(jobs):
                rows.append({"set": runs[jobs[job]][0], "run": jobs[job], **job.result()})
                append_json(output, rows[-1])
                print(f"{len(rows)}/{len(runs)} {rows[-1]}", file=sys.stderr, flush=True)
        finally:
            executor.shutdown(cancel_futures=True)

    shown = [*SHOWN[spec.family], *(ANSWERS if args.answers else ())]
    lines = table(rows, shown, args.by or shown[0])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


if __name__ == "__main__":
    main()
