"""What stage.json records of a run beside its data and metrics."""

import dataclasses
import json
import math
import subprocess
from collections import Counter
from enum import Enum
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from minimind.common.language import say
from minimind.evaluation import Measure, estimate, token_loss_distribution, token_losses
from minimind.tokenizer_evaluation.texts import script
from minimind.training.checkpointing_trainer import CheckpointingTrainer

LANGUAGE_ROWS = 200  # of the training rows, whose languages are counted
IDS = ("input_ids", "prompt_ids", "chosen_ids", "completion_ids")  # columns of token ids


def changed_options(args: TrainingArguments) -> dict:
    """Options of a run that are not the library's defaults, as JSON, without tokens."""
    options, changed = args.to_dict(), {}
    fields = {
        field.name: field
        for field in (*dataclasses.fields(args), *dataclasses.fields(TrainingArguments))
    }
    for name, field in fields.items():
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        default = default.value if isinstance(default, Enum) else default
        elsewhere = name.endswith("_token") or name in ("output_dir", "run_name", "local_rank")
        if name in options and options[name] != default and not elsewhere:
            changed[name] = options[name]
    return json.loads(json.dumps(changed, default=str))


def git_commit() -> str | None:
    """The commit of the project's checkout, with "+" for uncommitted changes; None outside of
    git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", timeout=30
        )
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, or not one that works
        return None
    return run.stdout.strip() or None


def best_evaluation(trainer: CheckpointingTrainer) -> dict | None:
    """The best evaluation by --metric_for_best_model, which is reported too; its step is 0 where
    none beat the one before training."""
    state, args = trainer.state, trainer.args
    if state.best_metric is None or not math.isfinite(state.best_metric):
        return None
    metric, value = args.metric_for_best_model, float(state.best_metric)
    logged = metric if metric.startswith("eval_") else f"eval_{metric}"
    # The state's own best step is that of a checkpoint, which may not exist
    steps = (each["step"] for each in state.log_history if each.get(logged) == state.best_metric)
    step = next(steps, 0)
    if not step:
        say(f"no evaluation was better than the {metric} {value:.4f} before the first step")
    elif args.load_best_model_at_end and trainer.weights_step == step:
        say(f"the best model is that of step {step:,}: {metric} {value:.4f}")
    elif args.load_best_model_at_end:
        say(
            f"warning: the best evaluation is that of step {step:,}: {metric} {value:.4f}, but its"
            f" checkpoint is not there: the weights of step {trainer.weights_step:,} were saved"
        )
    return {"metric": metric, "value": value, "step": step}


def token_loss(trainer: Trainer) -> dict | None:
    """How the losses of single held-out tokens are distributed, and the 95 % interval of their mean
    if the held-out `rows` were drawn anew; None without held-out rows, and where ZeRO-3 divides the
    weights."""
    if not isinstance(trainer.eval_dataset, Dataset) or is_deepspeed_zero3_enabled():
        return None
    rows = [losses[~losses.isnan()].double() for losses in token_losses(trainer)]
    rows = [losses for losses in rows if len(losses)]
    if not rows:
        return None
    means = Measure(
        {str(index): losses.mean().item() for index, losses in enumerate(rows)},
        weights={str(index): float(len(losses)) for index, losses in enumerate(rows)},
    )
    return token_loss_distribution(torch.cat(rows).float()) | {
        "rows": len(rows),
        "held_out_rows": len(trainer.eval_dataset),
        "interval": [round(end, 6) for end in estimate(means)["interval"]],
    }


def hardware(args: TrainingArguments) -> dict:
    """The device of each process, and the number of processes."""
    names = {"cuda": torch.cuda.get_device_name, "mps": lambda: "Apple GPU (MPS)"}
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {"device": names.get(args.device.type, lambda: cpu)(), "processes": args.world_size}


def language_shares(rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The share of each language, by the writing of `LANGUAGE_ROWS` rows that are spread over all:
    "zh", "en" and "other"; empty where rows hold no token ids."""
    counts: Counter[str] = Counter()
    for index in range(0, len(rows), -(-len(rows) // LANGUAGE_ROWS)):
        row = rows[index]
        if ids := [row[name] for name in IDS if name in row]:
            text = " ".join(tokenizer.batch_decode(ids, skip_special_tokens=True))
            counts[script(text).language] += 1
    return {name: round(count / counts.total(), 3) for name, count in counts.most_common()}
