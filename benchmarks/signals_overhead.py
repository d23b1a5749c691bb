"""What agreeing on signals costs a step: the all-reduced flag of minimind/training/signals.py.

    python benchmarks/signals_overhead.py [--processes 2] [--steps 2000] [--json]

Starts the processes itself and times `InterruptCallback.on_step_end` alone, one call per step, over
gloo (NCCL where there is a GPU for each process). For scale: a step of the tiny model of 4,096
tokens takes about half a second on one CPU core.
"""

import argparse
import json
import os
import socket
import statistics
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from minimind.training.signals import InterruptCallback


def measure(rank: int, processes: int, steps: int, port: int, results) -> None:
    """Seconds of each call in one process; rank 0 puts them into `results`."""
    gpu = torch.cuda.device_count() >= processes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if gpu else "gloo")
    callback = InterruptCallback(trainer=None)
    args = SimpleNamespace(device=torch.device("cuda" if gpu else "cpu"))
    state, control = (
        SimpleNamespace(global_step=0, max_steps=steps),
        SimpleNamespace(should_save=False),
    )
    callback.on_train_begin(args, state, control)
    seconds = []
    for _ in range(steps + 100):
        began = time.perf_counter()
        callback.on_step_end(args, state, control)
        seconds.append(time.perf_counter() - began)
    callback.on_train_end(args, state, control)
    if rank == 0:
        results.put(seconds[100:])
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(
        measure, (options.processes, options.steps, port, results), options.processes, join=True
    )
    micros = [second * 1e6 for second in results.get()]
    found = {
        "processes": options.processes,
        "steps": options.steps,
        "median_us": round(statistics.median(micros), 1),
        "mean_us": round(statistics.fmean(micros), 1),
        "p99_us": round(statistics.quantiles(micros, n=100)[-1], 1),
    }
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{options.processes} processes, {options.steps:,} steps: {found['median_us']} us a"
            f" step (median), {found['mean_us']} us (mean), {found['p99_us']} us (99th percentile)"
        )


if __name__ == "__main__":
    main()
