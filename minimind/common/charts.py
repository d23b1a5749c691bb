"""Charts of reports, drawn by matplotlib: inline SVG for a page, or PNG.

Text in an SVG stays text, in the page's own colour and font, so that a chart can be read in the
light and in the dark; the same values always give the same bytes.
"""

import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import groupby
from typing import Any

Points = Sequence[tuple[float, float]]

COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b0489a", "#8a7a2f", "#c9453b")
GRID = "#88888840"
SIZE = 520 / 72, 200 / 72  # of a chart on a page, in inches; the page stretches it
PLACE = 0.12, 0.14, 0.83, 0.78  # of its axes within it
LABELS = 9  # beneath a histogram, at most
# Families with Chinese glyphs, as Linux distributions, macOS and Windows name them.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
    "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "Microsoft YaHei", "SimHei",
    "Arial Unicode MS",
)  # fmt: skip
SETTINGS = {
    "axes.autolimit_mode": "round_numbers",  # an axis begins and ends at a tick
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "minimind",
    "text.usetex": False,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def font_families(installed: Collection[str]) -> list[str]:
    """matplotlib's own font, then those of the `installed` ones that have Chinese glyphs."""
    return ["DejaVu Sans", *(name for name in CHINESE if name in installed)]


@contextmanager
def canvas(width: float, height: float, **options: Any) -> Iterator[Any]:
    """An empty matplotlib figure, in inches; draw and save it within the block.

    matplotlib is imported here and not above: it may be missing or broken, which must cost no more
    than the chart, and it takes half a second.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    families = font_families(font_manager.get_font_names())
    with matplotlib.rc_context({**SETTINGS, "font.family": families}), warnings.catch_warnings():
        # Boxes stand for the characters that no installed font has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(width, height), **options)


def to_svg(figure: Any, label: str, tips: Mapping[str, str] | None = None) -> str:
    """A figure as an inline <svg> element. `label` describes it, and `tips` its parts: group id
    (`gid`) -> what is shown where the pointer rests on the group."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"')
    for gid, tip in (tips or {}).items():
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{escape(tip)}</title>")
    # The charts of a page would share their ids, and HTML needs no XML names.
    svg = re.sub(r' (?:id|xmlns[:\w]*)="[^"]*"', "", svg)
    return re.sub(r"\s*\n\s*", " ", svg)


def to_png(figure: Any) -> bytes:
    """A figure as a PNG file's content."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def draw_line(axes: Any, points: Points, **style: Any) -> None:
    """Draw a curve, with gaps where it is not finite; a point between two gaps is a dot."""
    for is_finite, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        if is_finite:
            places, width = list(run), {}
            if len(places) == 1:
                places, width = places * 2, {"linewidth": 6}
            options = {**style, **width, "solid_capstyle": "round", "clip_on": False}
            axes.plot(*zip(*places, strict=True), **options)


def line_chart(
    label: str, series: Mapping[str, Points], from_zero: bool = False, last: float = 1
) -> str:
    """Curves over the steps from 0 to `last`, or as far as there are points, as an inline SVG."""
    with canvas(*SIZE) as figure:
        axes = plain(figure.add_axes(PLACE))
        if from_zero:
            axes.update_datalim([(0, 0)])
        for points, colour in zip(series.values(), COLOURS * len(series), strict=False):
            draw_line(axes, points, color=colour, linewidth=1.7)
        axes.set_xlim(0, max(last, *(x for points in series.values() for x, _ in points)) or 1)
        return to_svg(figure, label)


def bar_chart(
    label: str, counts: Sequence[int], edges: Sequence[float], tips: Sequence[str]
) -> str:
    """A histogram of bars, each with its tip, as an inline SVG; see `draw_bars`."""
    with canvas(*SIZE) as figure:
        draw_bars(plain(figure.add_axes(PLACE)), counts, edges, color=COLOURS[0])
        return to_svg(figure, label, {f"bar{number}": tip for number, tip in enumerate(tips)})


def draw_bars(axes: Any, counts: Sequence[int], edges: Sequence[float], **style: Any) -> None:
    """Draw a histogram with bars of equal width, since the last one may hold a long tail."""
    bars = axes.bar(range(len(counts)), counts, width=0.95, align="edge", **style)
    for number, bar in enumerate(bars):
        bar.set(gid=f"bar{number}", clip_on=False)
    places = range(len(edges) - 1, -1, -len(edges) // LABELS)  # the last edge has a label
    axes.set_xticks(places, [f"{edges[place]:,.6g}" for place in places])
    axes.set_xlim(0, len(counts))


def plain(axes: Any) -> Any:
    """The axes with lines at round numbers and nothing else around the values.

    Marks at the ticks would refer to shapes by their ids, which `to_svg` removes.
    """
    axes.grid(axis="y", color=GRID, clip_on=False)
    axes.tick_params(left=False, bottom=False, labelsize=12)
    axes.spines[:].set_visible(False)
    axes.locator_params(axis="y", nbins=5, steps=(1, 2, 5, 10))
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.yaxis.set_major_formatter("{x:,.6g}")
    return axes
