"""The picture of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def plot_loss(log_history: list[dict], path: Path, title: str) -> None:
    """Draw training and held-out loss over the steps, and the learning rate beneath, to a PNG file."""
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 5), height_ratios=(4, 1), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            top.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    rates = [(entry["step"], entry["learning_rate"]) for entry in log_history if "learning_rate" in entry]
    if rates:
        bottom.plot(*zip(*rates, strict=True), color="tab:gray")
    top.set(title=title, ylabel="loss (nats per token)")
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    if top.lines:
        top.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
