"""Measures of a model: held-out loss, bits per byte, exact answers to questions."""

from minimind.evaluation.answers import answer, read_questions, score
from minimind.evaluation.files import evaluate
from minimind.evaluation.losses import (
    TIMES,
    bits_per_byte,
    bits_per_nat,
    held_out_metrics,
    language_model_metrics,
    token_loss_distribution,
    token_losses,
)

__all__ = [
    "TIMES",
    "answer",
    "bits_per_byte",
    "bits_per_nat",
    "evaluate",
    "held_out_metrics",
    "language_model_metrics",
    "read_questions",
    "score",
    "token_loss_distribution",
    "token_losses",
]
