"""Measures of a model: held-out loss, bits per byte, and exact answers to questions."""

import math

from transformers import Trainer

from minimind.data.documents import Blocks


def evaluate(trainer: Trainer) -> dict[str, float]:
    """The trainer's held-out metrics without their prefix; empty where no rows are held out."""
    if trainer.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if isinstance(value, int | float)}


def bits_per_byte(trainer: Trainer, blocks: Blocks) -> dict[str, float]:
    """Held-out loss, perplexity per token and bits per byte, which compares models across tokenizers.

    Bits per byte = summed loss / (ln 2 x bytes of the predicted tokens); every block has the same number of targets,
    so the mean loss gives the sum exactly.
    """
    metrics = evaluate(trainer)
    if not metrics:
        return {}
    counts = blocks.facts["eval"]
    targets = counts["blocks"] * (trainer.args.block_size - 1)
    bits = metrics["loss"] * targets / math.log(2)
    return {
        "loss": metrics["loss"],
        "perplexity": math.exp(min(metrics["loss"], 100)),
        "bits_per_byte": bits / counts["target_bytes"],
    }
