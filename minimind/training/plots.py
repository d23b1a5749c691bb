"""The curves of a run: read from train_log.jsonl, drawn for report.html and loss.png."""

from collections.abc import Sequence
from html import escape
from math import isfinite
from pathlib import Path
from statistics import fmean

from minimind.common.charts import COLOURS, canvas, draw_line, line_chart, to_png
from minimind.common.files import json_lines, write_bytes
from minimind.common.streams import printable

POINTS = 300  # of a curve at most: about one for each second pixel
# Values of the step that logs them; all others of training are means over the steps since the last
# log.
MOMENTARY = ("learning_rate", "grad_norm", "memory_gib")
# Followed by the name of a data source, and of a file of minimal pairs
SOURCE, PAIRS = "eval_bits_per_byte/", ("eval_pairs_sum/", "eval_pairs_mean/")
# Title, unit, the keys that are drawn, and whether the axis begins at 0. The loss comes before
# them, see `loss_unit`.
CHARTS = (
    ("Bits per byte", "", ("bits_per_byte", "eval_bits_per_byte"), False),
    ("Minimal pairs", "share won, 0.5 by chance", ("eval_pairs_sum", "eval_pairs_mean"), False),
    ("Reward accuracy", "share of pairs", ("rewards/accuracies", "eval_rewards/accuracies"), True),
    ("Reward margin", "", ("rewards/margins", "eval_rewards/margins"), False),
    *(
        (title, unit, tuple(f"{part}{key}" for key in keys for part in ("", "eval_")), from_zero)
        for title, unit, keys, from_zero in (
            ("Rewards", "", ("rewards/chosen", "rewards/rejected"), False),
            ("Log-probability", "nats per reply", ("logps/chosen", "logps/rejected"), False),
            ("Log-odds of chosen over rejected", "nats", ("log_odds_chosen",), False),
            ("KL to the reference", "nats per token of the data", ("kl/token",), False),
            ("Entropy", "nats per token", ("entropy",), True),
            ("Length", "tokens per reply", ("lengths/chosen", "lengths/rejected"), True),
            (
                "Reward accuracy by which reply is longer",
                "share of pairs",
                ("rewards/accuracies_longer", "rewards/accuracies_shorter"),
                True,
            ),
        )
    ),
    ("Accuracy", "share of pairs", ("accuracy", "eval_accuracy"), True),
    ("Margin", "reward of chosen less that of rejected", ("margin", "eval_margin"), False),
    ("Learning rate", "", ("learning_rate",), True),
    ("Gradient norm", "", ("grad_norm",), True),
    ("Speed", "tokens/s", ("tokens_per_second",), True),
    ("MFU", "share of the peak", ("mfu",), True),
    ("Memory", "GiB", ("memory_gib",), True),
    ("Busiest expert", "share of visits", ("router_load/max",), True),
)


def read_log(file: Path) -> list[dict]:
    """The numbers in a train_log.jsonl, in the order of their steps. Where a run returned to a
    checkpoint, the later entries count."""
    entries: list[dict] = []
    for line in json_lines(file):
        entry = {key: value for key, value in line.items() if isinstance(value, int | float)}
        if "step" not in entry:
            continue
        if entries and entries[-1]["step"] > entry["step"]:
            entries = [earlier for earlier in entries if earlier["step"] < entry["step"]]
        entries.append(entry)
    return entries


def loss_unit(stage: str) -> str:
    """What a stage's loss is a mean of."""
    units = {"dpo": "per pair", "reward": "per pair", "kto": "per reply"}
    return units.get(stage, "nats per token")


def curve(log: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of each entry that has `key`.

    A mean over the steps since the last such entry is placed in the middle of them: beside
    held-out values, which belong to one step, it would lag by half of these steps.
    """
    points = [(entry["step"], float(entry[key])) for entry in log if key in entry]
    if key.startswith("eval_") or key in MOMENTARY:
        return points
    starts = [0, *(step for step, _ in points)]
    return [((start + end) / 2, value) for start, (end, value) in zip(starts, points, strict=False)]


def thin(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """At most `limit` points of a curve: the means of equal runs of them. A run with a value that
    is not finite stays a gap."""
    size = max(-(-len(points) // limit), 1)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in run), sum(y for _, y in run) / len(run)) for run in runs]


def charts(log: Sequence[dict], unit_of_loss: str) -> str:
    """The HTML of the charts that the log has values for."""
    every = sorted({key for entry in log for key in entry})
    sources, files = ([key for key in every if key.startswith(start)] for start in (SOURCE, PAIRS))
    drawn = []
    for title, unit, keys, from_zero in (
        ("Loss", unit_of_loss, ("loss", "eval_loss"), False),
        *CHARTS,
        ("Held-out bits per byte of each source", "", sources, False),
        ("Minimal pairs of each file", "share won, 0.5 by chance", files, False),
    ):
        curves = {key.removeprefix(SOURCE): thin(curve(log, key)) for key in keys}
        if curves := {name: points for name, points in curves.items() if points}:
            drawn.append(chart(title, unit, curves, from_zero, log[-1]["step"]))
    return f"<div class=curves>{''.join(drawn)}</div>" if drawn else ""


def chart(
    title: str,
    unit: str,
    curves: dict[str, list[tuple[float, float]]],
    from_zero: bool = False,
    last: int = 1,
) -> str:
    """Curves over the steps from 0 to `last` as an HTML figure; of several the caption names the
    colours."""
    if not any(isfinite(value) for points in curves.values() for _, value in points):
        return f"<figure><figcaption>{escape(title)}</figcaption>no finite value</figure>"
    names = [
        f'<span style="color:{colour}"> ■</span> {escape(name)}'
        for name, colour in zip(curves, COLOURS * len(curves), strict=False)
    ]
    legend = "".join(names) if len(names) > 1 else ""
    svg = line_chart(f"{title} over the steps", curves, from_zero, last)
    caption = f"{escape(title)} <small>{escape(unit)}{legend}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def plot_loss(log: list[dict], path: Path, title: str, unit: str) -> None:
    """Draw training and held-out loss over the steps, and the learning rate beneath, to a PNG
    file."""
    with canvas(8, 5, layout="constrained") as figure:
        top, bottom = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
            if points := curve(log, key):
                top.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        draw_line(bottom, curve(log, "learning_rate"), color="tab:gray")
        top.set_title(printable(title), parse_math=False)
        top.set(ylabel=f"loss ({unit})")
        bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
        if top.lines:
            top.legend()
        write_bytes(path, to_png(figure))
