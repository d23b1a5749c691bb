"""Measures of a model: held-out loss, bits per byte, exact answers to questions, rewards."""

# ruff: noqa: F401 (the public names of this room)

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
from minimind.evaluation.rewards import (
    RewardModel,
    pair_metrics,
    read_rewards,
    reward_metrics,
    wilson_interval,
)
from minimind.evaluation.scored_files import score_files
