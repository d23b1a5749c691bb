"""Measures of a model: held-out loss, bits per byte, exact answers, rewards, win rates."""

# ruff: noqa: F401 (the public names of this room)

from minimind.evaluation.answers import answer, read_questions, score
from minimind.evaluation.comparison import (
    compare_models,
    compare_replies,
    comparison_report,
    describe_replies,
    held_out_losses,
    win_rate,
)
from minimind.evaluation.comparison_page import comparison_page
from minimind.evaluation.files import evaluate
from minimind.evaluation.judges import Asked, make_judge
from minimind.evaluation.losses import (
    TIMES,
    bits_per_byte,
    bits_per_nat,
    held_out_metrics,
    language_model_metrics,
    token_loss_distribution,
    token_losses,
)
from minimind.evaluation.replies import Sampling, encode_fitting, sample_replies
from minimind.evaluation.rewards import (
    RewardModel,
    pair_metrics,
    read_rewards,
    reward_metrics,
)
from minimind.evaluation.scored_files import score_files
from minimind.evaluation.statistics import Measure, estimate, wilson_interval
