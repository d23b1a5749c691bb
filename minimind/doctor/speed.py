"""Checks of the time that a run takes, by a measured pass."""

import statistics
import time

import torch
from torch.utils.data import DataLoader

from minimind.costs.units import duration
from minimind.doctor.budget import plan_of
from minimind.doctor.registry import Case, check, sample
from minimind.stage_directory import auto_class

SLOW_PASS = 10.0  # seconds, after which no second pass is measured
BATCHES = 8  # that the data loader is timed with
SLOW_STEP = 60.0  # seconds: the first lines of the log would come after ten minutes
LONG_RUN = 72.0  # hours
FAR_FROM_PLAN = 3.0  # times


@check("args", "model", "train", "collator", quick=False)
def dataloader_speed(case: Case) -> tuple:
    workers = case.args.dataloader_num_workers
    batch, loading = time_batches(case)
    step = seconds_of_step(case, batch)
    found = f"a batch in {shown_seconds(loading)} ({workers} workers)"
    if loading <= step * max(workers, 1):
        return "ok", f"{found}, faster than it is trained on"
    fix = (
        f"Raise dataloader_num_workers (now {workers}); for pretraining, 'minimind prepare'"
        " beforehand."
    )
    return "warning", found, f"at most the {shown_seconds(step)} that training on it takes", fix


@check("recipe", "model", "train", "collator", quick=False)
def run_time(case: Case) -> tuple:
    plan = plan_of(case)
    if not plan.fits:
        return "ok", "not measured: the step does not fit into memory"
    passes = plan.flops["model"] / plan.flops["forward"] / 3
    seconds = seconds_of_step(case) * case.args.gradient_accumulation_steps * passes
    steps = plan.steps
    if plan.time_budget:
        steps = max(1, int(plan.time_budget / seconds))
    return judge_time(steps, seconds, plan.seconds_per_step, plan.device.name)


def judge_time(steps: int, seconds: float, planned: float, device: str) -> tuple:
    """A finding on a run of `steps` of `seconds` each as measured; `planned` is estimated from the
    device's peak."""
    hours = steps * seconds / 3600
    found = (
        f"about {duration(hours)} on {device}: {steps:,} steps of {duration(seconds / 3600)}"
        f" measured ({duration(planned / 3600)} planned)"
    )
    if seconds > FAR_FROM_PLAN * max(planned, 1.0):
        fix = (
            "Look for another process, swapping, too few threads (OMP_NUM_THREADS) or a precision"
            " that is emulated."
        )
        return "warning", found, f"not {seconds / planned:.2g} times the plan", fix
    if seconds > SLOW_STEP or hours > LONG_RUN:
        expected = f"steps within {SLOW_STEP:.0f} s, runs within {LONG_RUN:.0f} h"
        fix = (
            "Take a smaller model, less data or another device: minimind plan RECIPE --device NAME"
            " compares them."
        )
        return "warning", found, expected, fix
    return "ok", found


def time_batches(case: Case) -> tuple[dict, float]:
    """A batch of the run's data loader, and the median of the seconds that one takes."""
    size = min(case.args.per_device_train_batch_size, len(case.train))
    options = {"shuffle": True, "collate_fn": case.collator, "drop_last": True}
    workers = case.args.dataloader_num_workers
    loader = DataLoader(case.train, size, num_workers=workers, **options)
    batches, seconds, began = [], [], time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            seconds.append(time.perf_counter() - began)
            batches.append(batch)
            if len(batches) > BATCHES:
                break
            began = time.perf_counter()
    return batches[-1], statistics.median(seconds[1:] or seconds)


def seconds_of_step(case: Case, batch: dict | None = None) -> float:
    """Seconds of a forward and backward pass over one micro-batch, measured once."""
    if case.step_seconds is None:
        if batch is None:
            size = min(case.args.per_device_train_batch_size, len(case.train))
            batch = case.collator([case.train[i] for i in sample(len(case.train), size)])
        config = case.model.config
        model = auto_class(config).from_config(config) if case.stand_in else case.model
        case.step_seconds = measure_pass(model, batch, case.args)
    return case.step_seconds


def measure_pass(model: torch.nn.Module, batch: dict, args) -> float:
    """Seconds of one forward and backward pass; on a CPU estimated from two of its rows."""
    rows, device = len(batch["input_ids"]), args.device
    used = min(rows, 2) if device.type == "cpu" else rows
    names = [name for name in ("input_ids", "position_ids", "attention_mask") if name in batch]
    inputs = {name: batch[name][:used].to(device) for name in names}
    before, training = next(model.parameters()).device, model.training
    model.to(device).train()
    half = torch.float16 if args.fp16 else torch.bfloat16
    times: list[float] = []
    # The first pass warms up, unless it takes too long
    while len(times) < 2 and sum(times) < SLOW_PASS:
        began = time.perf_counter()
        with torch.autocast(device.type, half, enabled=bool(args.bf16 or args.fp16)):
            logits = model(**inputs, use_cache=False).logits
        logits.float().logsumexp(-1).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    model.zero_grad()
    model.to(before).train(training)
    return times[-1] * rows / used


def shown_seconds(seconds: float) -> str:
    """Seconds for a reader: 12 ms, 1.3 s, 518 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
