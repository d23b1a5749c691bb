"""The report as one HTML page that asks for nothing from outside; every text from the data is
escaped."""

from html import escape
from typing import Any

KEPT, CHANGED, REMOVED = "#3b7dd8", "#e0a526", "#c9453b"
# Of the picture; of a bar with all rows; above the bars
WIDTH, HEIGHT, FLOW, TOP, TURN = 1100, 330, 190, 46, 12

STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }}
body {{ max-width: 1160px; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: .25em .8em; text-align: right; border-bottom: 1px solid #8884; vertical-align: top; }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
svg {{ width: 100%; height: auto; }} svg text {{ fill: currentColor; font-size: 13px; }}
details {{ margin: .3em 0; }} summary {{ cursor: pointer; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .8em; margin: .6em 0 1.2em; }}
.pair > div {{ border-left: 4px solid {REMOVED}; padding-left: .7em; min-width: 0; }}
.pair > div.kept {{ border-color: {KEPT}; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0; font: 13px/1.45 ui-monospace, monospace; }}
small {{ opacity: .75; overflow-wrap: anywhere; }}
"""


def report_page(report: dict[str, Any]) -> str:
    """A report -> its HTML page."""
    rows, characters = report["rows"], report["characters"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Cleaning report</title>
<style>{STYLE}</style></head><body>
<h1>Cleaning report</h1>
<p>{rows["in"]:,} rows in, <b>{rows["out"]:,} kept</b> ({_share(rows["out"], rows["in"])}), {rows["removed"]:,}
removed, {rows["bad"]:,} bad; {characters["in"]:,} characters in, {characters["out"]:,} out
({_share(characters["out"], characters["in"])}).</p>
{flow_svg(report)}
{_steps_table(report)}
{_groups_table(report)}
{_bad_rows(report)}
<h2>Examples</h2>
{"".join(_examples(step) for step in report["steps"])}
{_facts(report)}
</body></html>
"""


def report_text(report: dict[str, Any]) -> str:
    """A report from `clean` -> the lines to print."""
    rows, run = report["rows"], report["run"]
    head = f"{'step':<20}{'rows in':>12}{'changed':>10}{'removed':>10}  reasons"
    lines = [
        f"{step['step']:<20}{step['rows_in']:>12,}{step['rows_changed']:>10,}{step['rows_removed']:>10,}  "
        + ", ".join(f"{reason} {count:,}" for reason, count in list(step["reasons"].items())[:3])
        + (", ..." if len(step["reasons"]) > 3 else "")
        for step in report["steps"]
    ]
    speed = (
        f"{run['rows_per_second']:,.0f} rows/s with {run['processes']} processes,"
        f" {run['seconds']:.1f} s"
        if run["rows_found_finished"] < rows["in"]
        else "was cleaned before"
    )
    added = f" + {rows['added']:,} by splitting" if rows["added"] else ""
    total = (
        f"{rows['in']:,} rows in{added} = {rows['out']:,} out + {rows['removed']:,} removed +"
        f" {rows['bad']:,} bad; {_share(report['characters']['out'], report['characters']['in'])}"
        f" of the characters kept ({speed})"
    )
    split = report["boundary_markers"]
    count = sum(split.values())
    markers = (
        [f"split {count:,} rows at {', '.join(split)} into {count + rows['added']:,}"]
        if split
        else []
    )
    steps = [line.rstrip() for line in lines]
    return "\n".join([head, *steps, total, *markers, f"-> {run['destination']}/report.html"])


def _share(part: int, whole: int) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.1%}" if share in (0, 1) or 0.001 <= share <= 0.999 else f"{share:.3%}"


def flow_svg(report: dict[str, Any]) -> str:
    """The flow of rows as a Sankey diagram: heights are rows; what a step removes leaves
    downwards."""
    rows = report["rows"]
    stages = [("bad rows", rows["in"], rows["bad"], 0)] if rows["bad"] else []
    stages += [
        (s["step"], s["rows_in"], s["rows_removed"], s["rows_changed"]) for s in report["steps"]
    ]
    scale = FLOW / max(rows["in"] + rows["added"], 1)
    step = (WIDTH - 90) / len(stages)
    shapes = []
    for number, (name, rows_in, removed, changed) in enumerate(stages):
        left, kept = 10 + number * step, rows_in - removed
        title = (
            f"<title>{escape(name)}: {rows_in:,} in, {changed:,} changed, {removed:,}"
            " removed</title>"
        )
        shapes.append(
            f'<rect x="{left:.1f}" y="{TOP}" width="{step - 3:.1f}"'
            f' height="{max(kept * scale, 0.5):.2f}" fill="{KEPT}"'
            f' fill-opacity=".55">{title}</rect>'
        )
        if changed:
            shapes.append(
                f'<rect x="{left:.1f}" y="{TOP}" width="{step - 3:.1f}"'
                f' height="{max(changed * scale, 0.8):.2f}" fill="{CHANGED}"'
                f' fill-opacity=".75">{title}</rect>'
            )
        if removed:
            # Along the lower edge of the bar, then a quarter turn of radius TURN, then down.
            top, height = TOP + kept * scale, max(removed * scale, 0.8)
            bend, width, end = left + step * 0.3, min(height, step * 0.5), TOP + FLOW + TURN + 18
            inner, outer = bend + TURN, bend + TURN + width
            low, turned = top + height, top + height + TURN
            shapes.append(
                f'<path d="M{left:.1f},{top:.2f} H{bend:.1f} Q{outer:.1f},{top:.2f}'
                f" {outer:.1f},{turned:.2f} V{end} H{inner:.1f} V{turned:.2f}"
                f' Q{inner:.1f},{low:.2f} {bend:.1f},{low:.2f} H{left:.1f} Z" fill="{REMOVED}"'
                f' fill-opacity=".75">{title}</path><text x="{(inner + outer) / 2:.1f}"'
                f' y="{end + 16}" text-anchor="middle">−{removed:,}</text>'
            )
        shapes.append(
            f'<text x="{left:.1f}" y="{TOP - 10 - 16 * (number % 2)}">{escape(name)}</text>'
        )
    shapes.append(
        f'<text x="{WIDTH - 76}" y="{TOP + 14}">{rows["out"]:,}</text>'
        f'<text x="{WIDTH - 76}" y="{TOP + 32}">kept</text>'
    )
    legend = (
        f'<text x="10" y="{HEIGHT - 8}">height: rows. </text><rect x="110" y="{HEIGHT - 19}"'
        f' width="12" height="12" fill="{KEPT}" fill-opacity=".55"/><text x="127"'
        f' y="{HEIGHT - 8}">kept</text><rect x="175" y="{HEIGHT - 19}" width="12" height="12"'
        f' fill="{CHANGED}" fill-opacity=".75"/><text x="192" y="{HEIGHT - 8}">of these'
        f' changed</text><rect x="310" y="{HEIGHT - 19}" width="12" height="12" fill="{REMOVED}"'
        f' fill-opacity=".75"/><text x="327" y="{HEIGHT - 8}">removed</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}{legend}</svg>'


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table of cells that are escaped here."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _steps_table(report: dict[str, Any]) -> str:
    lines = [
        [
            step["step"],
            f"{step['rows_in']:,}",
            f"{step['rows_changed']:,}",
            f"{step['rows_removed']:,}",
            _share(step["rows_removed"], step["rows_in"]),
            f"{step['characters_out'] - step['characters_in']:+,}",
            ", ".join(f"{reason} {count:,}" for reason, count in step["reasons"].items()),
        ]
        for step in report["steps"]
    ]
    head = ["step", "rows in", "changed", "removed", "share", "characters", "reasons"]
    return f"<h2>Steps</h2>{_table(head, lines)}"


def _groups_table(report: dict[str, Any]) -> str:
    if not report["groups"]:
        return ""
    lines = [
        [
            name,
            f"{group['rows_in']:,}",
            f"{group['rows_out']:,}",
            _share(group["rows_in"] - group["rows_out"], group["rows_in"]),
            ", ".join(
                f"{label} {count:,}"
                for label, count in sorted(group["removed"].items(), key=lambda e: -e[1])
            ),
        ]
        for name, group in report["groups"].items()
    ]
    title = escape(str(report["recipe"]["group_by"]))
    return (
        f"<h2>Rows by {title}</h2>{_table(['group', 'rows in', 'rows out', 'lost', 'by'], lines)}"
    )


def _bad_rows(report: dict[str, Any]) -> str:
    if not report["rows"]["bad"]:
        return ""
    lines = [[row["where"], row["problem"]] for row in report["bad_rows"]]
    return f"<h2>Bad rows ({report['rows']['bad']:,})</h2>{_table(['the first', 'problem'], lines)}"


def _text(where: str, text: str, kept: bool = False) -> str:
    name = ' class="kept"' if kept else ""
    return f"<div{name}><small>{escape(where)}</small><pre>{escape(text)}</pre></div>"


def _examples(step: dict[str, Any]) -> str:
    parts = []
    for reason, examples in step["examples"].items():
        pairs = []
        for example in examples:
            second = ""
            if "after" in example:
                second = _text("after", example["after"], kept=True)
            elif "repeats" in example:
                second = _text(
                    f"repeats {example['repeats']['where']}", example["repeats"]["text"], kept=True
                )
            pairs.append(
                f'<div class="pair">{_text(example["where"], example["before"])}{second}</div>'
            )
        count = step["reasons"].get(reason, step["rows_changed"])
        title = reason if reason == "changed" else f"removed: {reason}"
        parts.append(
            f"<details><summary>{escape(title)} ({count:,})</summary>{''.join(pairs)}</details>"
        )
    return f"<h3>{escape(step['step'])}</h3>{''.join(parts)}" if parts else ""


def _facts(report: dict[str, Any]) -> str:
    files = [[entry["path"], f"{entry['bytes']:,}", entry["hash"]] for entry in report["inputs"]]
    recipe = [
        [name, ", ".join(f"{key}: {value}" for key, value in options.items())]
        for step in report["recipe"]["steps"]
        for name, options in step.items()
    ]
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    return (
        f"<h2>Recipe</h2>{_table(['step', 'options'], recipe)}<p>{escape(packages)}</p>"
        f"<h2>Input</h2>{_table(['file', 'bytes', 'xxh3_128'], files)}"
    )
