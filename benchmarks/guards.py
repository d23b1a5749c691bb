"""What the guards cost: time of a training step with and without them, in one run, every other
step.

    python benchmarks/guards.py [--model_config configs/model/tiny.json] [--steps 200] [--json]

The steps alternate, so that whatever else the machine does meets both kinds; the ratio is that of
the medians. "inside" is the time spent in the guards' own functions, those they wrap left out: on a
busy machine it is the steadier figure.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from minimind.data.packing import BlockCollator
from minimind.tokenizer import load_tokenizer
from minimind.training.arguments import PretrainConfig
from minimind.training.guards import GuardCallback
from minimind.training.starting_point import new_model
from minimind.training.trainers import BlockTrainer

WARM_UP = 10  # steps that are not counted


class EveryOther(TrainerCallback):
    """Takes the guards of a step off every other one, and times the steps. Stands first."""

    def __init__(self, trainer: BlockTrainer):
        self.trainer = trainer
        self.guard = trainer.guard
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.inside: list[float] = []
        for name in ("on_step_begin", "check_loss", "check_norm", "on_optimizer_step"):
            setattr(self.guard, name, self._timed(getattr(self.guard, name)))

    def _timed(self, function):
        def wrapped(*args, **kwargs):
            began = time.perf_counter()
            function(*args, **kwargs)
            self.inside.append(time.perf_counter() - began)

        return wrapped

    def on_step_begin(self, args, state, control, **kwargs):
        trainer, callbacks = self.trainer, self.trainer.callback_handler.callbacks
        self.on = state.global_step % 2 == 0
        trainer.guard = self.guard if self.on else None
        if self.on and self.guard not in callbacks:
            callbacks.insert(1, self.guard)
        if not self.on and self.guard in callbacks:
            callbacks.remove(self.guard)
            del trainer.optimizer.optimizer.found_inf
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds[self.on].append(time.perf_counter() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_config", default="configs/model/tiny.json")
    parser.add_argument("--steps", type=int, default=200, help="of both kinds together")
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable()
    tokenizer = load_tokenizer()
    ids = np.random.default_rng(0).integers(
        5, len(tokenizer), (options.steps * options.rows, options.block_size)
    )
    with tempfile.TemporaryDirectory() as directory:
        args = PretrainConfig(
            output_dir=directory,
            max_steps=options.steps,
            per_device_train_batch_size=options.rows,
            report_to="none",
        )
        torch.manual_seed(0)
        trainer = BlockTrainer(
            model=new_model(options.model_config, tokenizer, None),
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy"),
            data_collator=BlockCollator(tokenizer.pad_token_id, tokenizer.eos_token_id),
            processing_class=tokenizer,
        )
        trainer.guard = GuardCallback(trainer)
        trainer.add_callback(trainer.guard)
        trainer.log = lambda *args, **kwargs: None
        turns = EveryOther(trainer)
        trainer.callback_handler.callbacks.insert(0, turns)
        trainer.train()
    guarded, plain = (
        statistics.median(turns.seconds[kind][WARM_UP // 2 :]) for kind in (True, False)
    )
    inside = sum(turns.inside) / len(turns.seconds[True])
    result = {
        "model_config": options.model_config,
        "steps": options.steps,
        "plain_ms": round(plain * 1e3, 3),
        "guarded_ms": round(guarded * 1e3, 3),
        "ratio": round(guarded / plain, 4),
        "inside_ms": round(inside * 1e3, 4),
        "inside_share": round(inside / plain, 5),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{options.model_config}, {options.rows} x {options.block_size} tokens,"
        f" {options.steps // 2} steps each"
    )
    print(f"  plain    {plain * 1e3:8.2f} ms per step (median)")
    print(f"  guarded  {guarded * 1e3:8.2f} ms per step (median), {guarded / plain - 1:+.2%}")
    print(
        f"  inside   {inside * 1e3:8.3f} ms per step in the guards' own functions,"
        f" {inside / plain:.3%}"
    )


if __name__ == "__main__":
    main()
