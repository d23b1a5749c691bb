"""The picture of a run."""

import io
import warnings
from collections.abc import Collection
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

from minimind.common.files import write_bytes
from minimind.common.streams import printable
from minimind.training.report import curve

# Families with Chinese glyphs, as Linux distributions, macOS and Windows name them.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti SC",
    "Heiti TC", "Microsoft YaHei", "SimHei", "Arial Unicode MS",
)  # fmt: skip


def font_families(installed: Collection[str]) -> list[str]:
    """matplotlib's own font, and for what it has no glyph of, the Chinese ones among the
    `installed`."""
    return ["DejaVu Sans", *(name for name in CHINESE if name in installed)]


def plot_loss(log: list[dict], path: Path, title: str, unit: str) -> None:
    """Draw training and held-out loss over the steps, and the learning rate beneath, to a PNG
    file."""
    settings = {"font.family": font_families(font_manager.get_font_names()), "text.usetex": False}
    picture = io.BytesIO()
    with plt.rc_context(settings), warnings.catch_warnings():
        # No font here has it: boxes then
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _draw_loss(log, picture, printable(title), unit)
    write_bytes(path, picture.getvalue())


def _draw_loss(log: list[dict], picture: io.BytesIO, title: str, unit: str) -> None:
    figure, (top, bottom) = plt.subplots(
        2, sharex=True, figsize=(8, 5), height_ratios=(4, 1), layout="constrained"
    )
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o--")):
        points = curve(log, key)
        if points:
            top.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    rates = curve(log, "learning_rate")
    if rates:
        bottom.plot(*zip(*rates, strict=True), color="tab:gray")
    top.set_title(title, parse_math=False)
    top.set(ylabel=f"loss ({unit})")
    bottom.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    if top.lines:
        top.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
