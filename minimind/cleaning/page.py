"""The report of a cleaning as one HTML page."""

from html import escape
from typing import Any

from minimind.cleaning.counts import CHANGED
from minimind.cleaning.report import share
from minimind.common.charts import canvas, to_svg
from minimind.common.errors import decoration
from minimind.common.page import page, table

KEPT_COLOUR, CHANGED_COLOUR, REMOVED_COLOUR = "#3b7dd8", "#e0a526", "#c9453b"
STYLE = f"""
body {{ max-width: 1160px; }} details {{ margin: .3em 0; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .8em; margin: .6em 0 1.2em; }}
.pair > div {{ border-left: 4px solid {REMOVED_COLOUR}; padding-left: .7em; min-width: 0; }}
.pair > div.kept {{ border-color: {KEPT_COLOUR}; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0; }}
pre {{ font: 13px/1.45 ui-monospace, monospace; }}
"""
# Of the flow, in points: the picture, a bar with all rows, above the bars, the turn of a branch.
WIDTH, HEIGHT, FLOW, TOP, TURN = 1100, 300, 190, 46, 12


def report_page(report: dict[str, Any]) -> str:
    """A report as its HTML page."""
    rows, characters = report["rows"], report["characters"]
    summary = (
        f"{rows['in']:,} rows in, <b>{rows['out']:,} kept</b> ({share(rows['out'], rows['in'])}),"
        f" {rows['removed']:,} removed, {rows['bad']:,} bad; {characters['in']:,} characters in,"
        f" {characters['out']:,} out ({share(characters['out'], characters['in'])})."
    )
    picture = ""
    with decoration("the picture of the rows"):
        picture = flow(report)
    examples = "".join(map(_examples, report["steps"]))
    body = f"<p>{summary}</p>{picture}{_steps(report)}{_groups(report)}{_bad_rows(report)}"
    body += f"<h2>Examples</h2>{examples}{_facts(report)}"
    return page("Cleaning report", body, STYLE)


def flow(report: dict[str, Any]) -> str:
    """The flow of rows from left to right through the steps, as an HTML figure: heights are rows,
    and what a step removes leaves downwards."""
    rows = report["rows"]
    steps = [("bad rows", rows["in"], rows["bad"], 0)] if rows["bad"] else []
    steps += [
        (step["step"], step["rows_in"], step["rows_removed"], step["rows_changed"])
        for step in report["steps"]
    ]
    scale, width = FLOW / max(rows["in"] + rows["added"], 1), (WIDTH - 90) / len(steps)
    tips = {}
    with canvas(WIDTH / 72, HEIGHT / 72) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        axes.axis("off")
        for number, (name, rows_in, removed, changed) in enumerate(steps):
            left, kept = 10 + number * width, rows_in - removed
            bars = [(max(kept * scale, 0.5), KEPT_COLOUR, 0.55)]
            bars += [(max(changed * scale, 0.8), CHANGED_COLOUR, 0.75)] * bool(changed)
            for height, colour, alpha in bars:
                axes.bar(left, height, width - 3, TOP, align="edge", color=colour, alpha=alpha)
            if removed:
                _draw_branch(axes, left, TOP + kept * scale, removed * scale, width, removed)
            axes.text(left, TOP - 10 - 16 * (number % 2), name, fontsize=13)
            for index, patch in enumerate(axes.patches):
                if patch.get_gid() is None:
                    patch.set_gid(f"rows{index}")
                    facts = f"{rows_in:,} in, {changed:,} changed, {removed:,} removed"
                    tips[f"rows{index}"] = f"{name}: {facts}"
        axes.text(WIDTH - 76, TOP + 14, f"{rows['out']:,}\nkept", fontsize=13, va="center")
        svg = to_svg(figure, "the rows that each step keeps, changes and removes", tips)
    colours = (
        ("kept", KEPT_COLOUR),
        ("of these changed", CHANGED_COLOUR),
        ("removed", REMOVED_COLOUR),
    )
    legend = "".join(f'<span style="color:{colour}"> ■</span> {name}' for name, colour in colours)
    return f"<figure>{svg}<small>height: rows.{legend}</small></figure>"


def _draw_branch(
    axes: Any, left: float, top: float, height: float, width: float, removed: int
) -> None:
    """Draw what a step removes: along the lower edge of its bar, then a quarter turn, then down."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    height, end = max(height, 0.8), TOP + FLOW + TURN + 18
    bend, low, turned = left + width * 0.3, top + height, top + height + TURN
    inner, outer = bend + TURN, bend + TURN + min(height, width * 0.5)
    corners = [
        (Path.MOVETO, left, top),
        (Path.LINETO, bend, top),
        (Path.CURVE3, outer, top),
        (Path.CURVE3, outer, turned),
        (Path.LINETO, outer, end),
        (Path.LINETO, inner, end),
        (Path.LINETO, inner, turned),
        (Path.CURVE3, inner, low),
        (Path.CURVE3, bend, low),
        (Path.LINETO, left, low),
    ]
    codes, xs, ys = zip(*corners, strict=True)
    path = Path([*zip(xs, ys, strict=True)], codes)
    axes.add_patch(PathPatch(path, color=REMOVED_COLOUR, alpha=0.75, linewidth=0))
    axes.text((inner + outer) / 2, end + 16, f"−{removed:,}", fontsize=13, ha="center")


def _steps(report: dict[str, Any]) -> str:
    rows = [
        [
            step["step"],
            step["rows_in"],
            step["rows_changed"],
            step["rows_removed"],
            share(step["rows_removed"], step["rows_in"]),
            f"{step['characters_out'] - step['characters_in']:+,}",
            _listed(step["reasons"]),
        ]
        for step in report["steps"]
    ]
    head = ("step", "rows in", "changed", "removed", "share", "characters", "reasons")
    return f"<h2>Steps</h2>{table(head, rows)}"


def _groups(report: dict[str, Any]) -> str:
    if not report["groups"]:
        return ""
    rows = []
    for name, group in report["groups"].items():
        rows_in, rows_out = group["rows_in"], group["rows_out"]
        removed = dict(sorted(group["removed"].items(), key=lambda entry: -entry[1]))
        lost = share(rows_in - rows_out, rows_in)
        rows.append([name, rows_in, rows_out, lost, _listed(removed)])
    shown = table(("group", "rows in", "rows out", "lost", "by"), rows)
    return f"<h2>Rows by {escape(str(report['recipe']['group_by']))}</h2>{shown}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _bad_rows(report: dict[str, Any]) -> str:
    if not report["rows"]["bad"]:
        return ""
    rows = [[row["where"], row["problem"]] for row in report["bad_rows"]]
    return f"<h2>Bad rows ({report['rows']['bad']:,})</h2>{table(('the first', 'problem'), rows)}"


def _examples(step: dict[str, Any]) -> str:
    parts = []
    for reason, examples in step["examples"].items():
        pairs = []
        for example in examples:
            pair = _text(example["where"], example["before"])
            if "after" in example:
                pair += _text("after", example["after"], "kept")
            elif "repeats" in example:
                row = example["repeats"]
                pair += _text(f"repeats {row['where']}", row["text"], "kept")
            pairs.append(f'<div class="pair">{pair}</div>')
        count = step["reasons"].get(reason, step["rows_changed"])
        title = escape(reason if reason == CHANGED else f"removed: {reason}")
        summary = f"<summary>{title} ({count:,})</summary>"
        parts.append(f"<details>{summary}{''.join(pairs)}</details>")
    return f"<h3>{escape(step['step'])}</h3>{''.join(parts)}" if parts else ""


def _text(where: str, text: str, kind: str = "") -> str:
    return f'<div class="{kind}"><small>{escape(where)}</small><pre>{escape(text)}</pre></div>'


def _facts(report: dict[str, Any]) -> str:
    files = [[entry["path"], entry["bytes"], entry["hash"]] for entry in report["inputs"]]
    steps = [
        [name, ", ".join(f"{key}: {value}" for key, value in options.items())]
        for step in report["recipe"]["steps"]
        for name, options in step.items()
    ]
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    return (
        f"<h2>Recipe</h2>{table(('step', 'options'), steps)}<p>{escape(packages)}</p>"
        f"<h2>Input</h2>{table(('file', 'bytes', 'xxh3_128'), files)}"
    )
