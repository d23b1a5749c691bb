"""report.html of a stage directory: one page about a run, which asks for nothing from outside.

It is made from the directory's own files and nothing else (stage.json or, while the run goes on,
what it will say; train_log.jsonl, samples.jsonl, mask_report.json), and every text in it is
escaped.
"""

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerState

from minimind.common.errors import UserError, decoration
from minimind.common.files import json_lines, read_json, write_text
from minimind.evaluation import TIMES
from minimind.stage_directory import read_stage
from minimind.training.callback_handler import Decoration
from minimind.training.progress import clock
from minimind.training.samples import read_samples

POINTS = 600  # of a curve at most: about one for each pixel
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 520, 200, 62, 24, 26, 12
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b0489a", "#8a7a2f", "#c9453b")
# Of a log's values these are of its step; the others that training logs are means over the steps
# since the last log.
MOMENTARY = ("learning_rate", "grad_norm", "memory_gib")
# Title, unit, the keys drawn in it, and whether its axis begins at 0; a loss stands before them,
# see `loss_unit`.
CURVES = (
    ("Bits per byte", "", ("bits_per_byte", "eval_bits_per_byte"), False),
    ("Reward accuracy", "share of pairs", ("rewards/accuracies", "eval_rewards/accuracies"), True),
    ("Reward margin", "", ("rewards/margins", "eval_rewards/margins"), False),
    ("Learning rate", "", ("learning_rate",), True),
    ("Gradient norm", "", ("grad_norm",), True),
    ("Speed", "tokens/s", ("tokens_per_second",), True),
    ("MFU", "share of the peak", ("mfu",), True),
    ("Memory", "GiB", ("memory_gib",), True),
    ("Busiest expert", "share of visits", ("router_load/max",), True),
)
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 1340px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 1.6em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { padding: .25em .8em; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }
td { overflow-wrap: anywhere; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; padding: 0; }
.tiles li { list-style: none; border: 1px solid #8884; border-radius: 8px; padding: .4em 1em; }
.tiles b { display: block; font-size: 1.35em; font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1em; }
figure { margin: 0; max-width: 640px; } figcaption { font-weight: 600; }
svg { width: 100%; max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
summary { cursor: pointer; } small { opacity: .75; overflow-wrap: anywhere; }
"""


class ReportCallback(Decoration):
    """Writes the report anew at each evaluation and checkpoint. `record`: what stage.json will say
    by then."""

    def __init__(self, directory: Path, record: dict[str, Any]):
        self.directory, self.record = directory, record

    def _write(self, args, state, control, **kwargs):
        self.write(state, "running")

    on_evaluate = on_save = _write

    def write(self, state: TrainerState, said: str) -> None:
        """Write the report of a run that is not complete; `said` is what it is, "running" or
        "interrupted"."""
        if not state.is_world_process_zero or not state.global_step:
            return
        progress = {"steps": state.global_step, "tokens_seen": int(state.num_input_tokens_seen)}
        write_report(
            self.directory, {**self.record, **progress, "max_steps": state.max_steps, "state": said}
        )


def write_report(directory: Path, record: dict[str, Any] | None = None) -> Path | None:
    """Write `directory`/report.html, complete or not at all; without a `record` from its
    stage.json.

    Whatever goes wrong costs a run its report and nothing else. Returns the path, None where it was
    not written.
    """
    path = directory / "report.html"
    with decoration("the report"):
        write_text(path, report_page(directory, record or read_stage(directory)))
        return path


def read_log(file: Path) -> list[dict]:
    """The numbers in a train_log.jsonl by their steps. Where a run went back to a checkpoint, the
    later ones count."""
    entries: list[dict] = []
    for line in json_lines(file):
        entry = {key: value for key, value in line.items() if isinstance(value, int | float)}
        if "step" not in entry:
            continue
        if entries and entries[-1]["step"] > entry["step"]:
            entries = [earlier for earlier in entries if earlier["step"] < entry["step"]]
        entries.append(entry)
    return entries


def title_of(stage: str, directory: Path) -> str:
    """What pictures and pages of a run are headed by: its directory and its parent's, and the stage
    if neither says.

    >>> title_of("sft", Path("runs/26m/sft")), title_of("lora", Path("runs/26m/jokes"))
    ('26m/sft', 'lora: 26m/jokes')
    """
    name = "/".join(directory.parts[-2:])
    return name if directory.name == stage else f"{stage}: {name}"


def loss_unit(stage: str) -> str:
    """What a stage's loss is a mean of."""
    return "per pair" if stage == "dpo" else "nats per token"


def curve(log: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of each entry that has `key`. A mean over the steps since the last such entry
    stands in the middle of these steps: beside held-out values, which are of one step, it would lag
    by half of them."""
    points = [(entry["step"], float(entry[key])) for entry in log if key in entry]
    if key.startswith("eval_") or key in MOMENTARY:
        return points
    before = [0, *(step for step, _ in points)]
    return [
        ((since + step) / 2, value) for since, (step, value) in zip(before, points, strict=False)
    ]


def report_page(directory: Path, record: dict[str, Any]) -> str:
    """The HTML page of a stage directory; a section that fails is left out."""
    log: list[dict] = []
    with decoration("reading train_log.jsonl"):
        log = read_log(directory / "train_log.jsonl")
    stage = record.get("stage", "run")
    title = escape(title_of(stage, directory))
    sections = {
        "": lambda: _summary(record, log),
        "Curves": lambda: curves(log, loss_unit(stage)),
        "Loss of single tokens": lambda: histogram(record.get("token_loss")),
        "Held-out metrics": lambda: _metrics(record, log),
        "Samples": lambda: _samples(read_samples(directory / "samples.jsonl")),
        "Data": lambda: _data(record.get("data") or {}),
        "What is trained": lambda: _mask(directory / "mask_report.json"),
        "Lineage": lambda: _lineage(directory, record),
        "Recipe": lambda: _recipe(record),
    }
    body = ""
    for name, write in sections.items():
        with decoration(f"the report's section {name}"):
            if content := write():
                body += f"<h2>{name}</h2>\n{content}\n" if name else f"{content}\n"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
{body}</body></html>
"""


def _summary(record: dict, log: Sequence[dict]) -> str:
    last = {key: entry[key] for entry in log for key in entry}  # the last value of each
    finished = "metrics" in record
    steps = f"{record.get('steps', last.get('step', 0)):,}"
    tiles = {"state": "complete" if finished else record.get("state", "running"), "steps": steps}
    if not finished:  # a run that was killed says nothing more: the page is of this moment
        tiles["written"] = time.strftime("%Y-%m-%d %H:%M")
        tiles["steps"] += f" of {record['max_steps']:,}" if record.get("max_steps") else ""
    if "tokens_seen" in record:
        tiles["tokens seen"] = f"{record['tokens_seen']:,}"
    for key, name, form in (
        ("loss", "loss", "{:.4f}"),
        ("eval_loss", "held-out loss", "{:.4f}"),
        ("eval_bits_per_byte", "held-out bits per byte", "{:.4f}"),
        ("eval_rewards/accuracies", "held-out reward accuracy", "{:.1%}"),
        ("tokens_per_second", "tokens/s", "{:,.0f}"),
        ("mfu", "MFU", "{:.1%}"),
        ("memory_gib", "memory", "{:.2f} GiB"),
    ):
        if key in last:
            tiles[name] = form.format(last[key])
    if "elapsed" in last:
        tiles["training time"] = clock(last["elapsed"])
    if not finished and "eta" in last:
        tiles["left"] = clock(last["eta"])
    return f"<ul class=tiles>{''.join(f'<li>{escape(k)}<b>{escape(v)}</b></li>' for k, v in tiles.items())}</ul>"


def thin(points: Sequence[tuple[float, float]], limit: int = POINTS) -> list[tuple[float, float]]:
    """At most `limit` points of a curve: means of equal runs of them. A value that is not finite
    stays a gap."""
    size = -(-len(points) // limit)
    runs = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(fmean(x for x, _ in run), sum(y for _, y in run) / len(run)) for run in runs]


def curves(log: Sequence[dict], unit_of_loss: str) -> str:
    """The curves that the log has points for."""
    sources = sorted(
        {key for entry in log for key in entry if key.startswith("eval_bits_per_byte/")}
    )
    every = [
        ("Loss", unit_of_loss, ("loss", "eval_loss"), False),
        *CURVES,
        ("Held-out bits per byte of each source", "", tuple(sources), False),
    ]
    drawn = []
    for title, unit, keys, from_zero in every:
        found = {key.removeprefix("eval_bits_per_byte/"): thin(curve(log, key)) for key in keys}
        series = {name: points for name, points in found.items() if points}
        if series:
            drawn.append(chart(title, unit, series, from_zero, log[-1]["step"]))
    return f"<div class=curves>{''.join(drawn)}</div>" if drawn else ""


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover low..high in about `count` steps.

    >>> nice_ticks(0.3, 7.2)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= span / count * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Axes:
    """A picture's axes: across from `left` to `right`, upwards over `ticks`, and how both are
    drawn."""

    left: float
    right: float
    ticks: list[float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place of a value in the picture, whose origin is at the top."""
        across = (x - self.left) / (self.right - self.left)
        up = (y - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * across,
            HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * up,
        )

    def figure(self, label: str, ticks_x: Iterable[float], drawn: str, caption: str = "") -> str:
        """The picture as inline SVG: lines at `ticks`, numbers beside them and beneath, and what is
        `drawn` on it."""
        parts = []
        for tick in self.ticks:
            y = self.at(self.left, tick)[1]
            parts.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8883"/>'
            )
            parts.append(
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
            )
        for tick in ticks_x:
            x = self.at(tick, self.ticks[0])[0]
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{tick:,.6g}</text>'
            )
        return (
            f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
            f' aria-label="{escape(label)}">'
            f"{''.join(parts)}{drawn}</svg></figure>"
        )


def chart(
    title: str,
    unit: str,
    series: dict[str, list[tuple[float, float]]],
    from_zero: bool = False,
    last: int = 1,
) -> str:
    """Lines over the steps from 0 to the `last` one, or as far as there are points."""
    finite = [(x, y) for points in series.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return f"<figure><figcaption>{escape(title)}</figcaption>no finite value</figure>"
    ys = [y for _, y in finite] + [0.0] * from_zero
    axes = Axes(0, max(last, *(x for x, _ in finite)) or 1, nice_ticks(min(ys), max(ys)))
    colours = dict(zip(series, COLOURS * len(series), strict=False))
    lines = "".join(_line(axes, points, colours[name]) for name, points in series.items())
    names = [f'<span style="color:{colours[name]}"> ■</span> {escape(name)}' for name in series]
    legend = "".join(names) if len(series) > 1 else ""
    caption = f"<figcaption>{escape(title)} <small>{escape(unit)}{legend}</small></figcaption>"
    steps = [tick for tick in nice_ticks(axes.left, axes.right, 6) if tick <= axes.right]
    return axes.figure(f"{title} over the steps", steps, lines, caption)


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str) -> str:
    """One curve, with gaps where it is not finite; a point that stands alone is a dot."""
    parts = []
    for whole, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        places = [axes.at(*point) for point in run] if whole else []
        if len(places) == 1:
            parts.append(
                f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
            )
        elif places:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.7"/>'
            )
    return "".join(parts)


def histogram(counts: dict | None) -> str:
    """How the loss of single held-out tokens is distributed, as bars; see
    `evaluation.token_loss_distribution`."""
    if not counts:
        return ""
    edges, heights = counts["edges"], counts["counts"]
    axes = Axes(edges[0], edges[-1], nice_ticks(0, max(heights)))
    bars = []
    for low, high, count in zip(edges, edges[1:], heights, strict=False):
        (left, top), (right, bottom) = axes.at(low, count), axes.at(high, 0)
        bars.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}"'
            f' height="{bottom - top:.1f}" fill="{COLOURS[0]}"><title>{low:g} to {high:g} nats:'
            f" {count:,} tokens</title></rect>"
        )
    said = ", ".join(f"{name} {counts[name]:.3f}" for name in ("mean", "median", "p90", "p99"))
    caption = "<figcaption>Tokens <small>by their loss in nats</small></figcaption>"
    return (
        f"<p>{counts['tokens']:,} held-out tokens, nats: {said}. The last bar holds all beyond"
        " it.</p>"
        + axes.figure("Histogram of the loss per token", edges[::4], "".join(bars), caption)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], texts: Sequence[int] = ()) -> str:
    """An HTML table; numbers are set to the right, `texts` are columns whose line breaks are
    kept."""

    def cell(column: int, value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = (
            f"{value:,}" if isinstance(value, int) else f"{value:,.6g}" if number else str(value)
        )
        kind = ' class="number"' if number else ' class="text"' if column in texts else ""
        return f"<td{kind}>{escape(shown)}</td>"

    lines = [
        f"<tr>{''.join(cell(column, value) for column, value in enumerate(row))}</tr>"
        for row in rows
    ]
    headings = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        if lines
        else ""
    )


def _metrics(record: dict, log: Sequence[dict]) -> str:
    metrics = record.get("metrics")
    if not metrics:
        evaluations = [entry for entry in log if "eval_loss" in entry]
        metrics = {"before": evaluations[0], "after": evaluations[-1]} if evaluations else {}
        metrics = {
            name: {
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.startswith("eval_")
            }
            for name, entry in metrics.items()
        }
    names = dict.fromkeys(key for values in metrics.values() for key in values if key not in TIMES)
    rows = [
        [name, *(metrics[when].get(name, "") for when in ("before", "after"))] for name in names
    ]
    best = record.get("best")
    said = (
        f"<p>Best: {escape(best['metric'])} {best['value']:.6g} after step {best['step']:,}.</p>"
        if best
        else ""
    )
    return table(("metric", "before", "after" if "metrics" in record else "now"), rows) + said


def _samples(rows: Sequence[dict]) -> str:
    rounds = [(step, list(group)) for step, group in groupby(rows, key=lambda row: row["step"])][
        ::-1
    ]
    parts = []
    for index, (step, group) in enumerate(rounds[:20]):
        inner = table(
            ("prompt", "text"), [(row["prompt"], row["text"]) for row in group], texts=(0, 1)
        )
        opened = " open" if index == 0 else ""
        parts.append(f"<details{opened}><summary>after step {step:,}</summary>{inner}</details>")
    return "".join(parts)


def _data(data: dict) -> str:
    rows = []
    for part, facts in data.items():
        if not isinstance(facts, dict):
            continue
        counts = {key: value for key, value in facts.items() if isinstance(value, int | float)}
        listed = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
        files = "\n".join(map(str, facts.get("files") or ["held out of the training rows"]))
        rows.append((part, listed, files, facts.get("hash") or ""))
        for source in facts.get("sources", ()):
            counts = {key: value for key, value in source.items() if isinstance(value, int | float)}
            listed = ", ".join(
                f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()
            )
            name = source.get("name") or "\n".join(map(str, source.get("files", ())))
            rows.append((f"{part}, one source", listed, name, ""))
    return table(("part", "rows and tokens", "files", "hash"), rows, texts=(2,))


def _mask(file: Path) -> str:
    """The report of an inspection, where there is one: its roles and findings; see
    `inspection.Inspection`."""
    if not file.exists():
        return ""
    report = read_json(file, "The report does without it.")
    said = ", ".join(
        f"{value:,} {key.replace('_', ' ')}"
        for key, value in report.items()
        if isinstance(value, int | float)
    )
    roles = [
        (role, counts["tokens"], counts["trained"], f"{counts['trained_share']:.1%}")
        for role, counts in report["roles"].items()
    ]
    fields = ("severity", "count", "text", "advice")
    findings = [[each[field] for field in fields] for each in report.get("findings", ())]
    return (
        f"<p>{escape(said)}</p>"
        + table(("role", "tokens", "trained", "share"), roles)
        + table(fields, findings)
    )


def _lineage(directory: Path, record: dict) -> str:
    rows = [
        (
            str(directory),
            record.get("stage", ""),
            record.get("weights", "being trained"),
            *_raw(record),
        )
    ]
    seen = set()
    while (parent := record.get("parent")) and parent["directory"] not in seen:
        seen.add(parent["directory"])
        try:
            record = read_stage(parent["directory"])
        except UserError:
            record = {}
        moved = record.get("weights") not in (None, parent["weights"])
        note = "no longer there" if not record else "holds other weights by now" if moved else ""
        rows.append(
            (parent["directory"], parent.get("stage") or "", parent["weights"], *_raw(record))
        )
        if note:
            rows[-1] = (*rows[-1][:3], note, "")
            break
    return table(("stage directory", "stage", "weights", "raw text", "its hash"), rows, texts=(3,))


def _raw(record: dict) -> tuple[str, str]:
    train = (record.get("data") or {}).get("train") or {}
    return "\n".join(map(str, train.get("files", ()))), str(train.get("hash") or "")


def _recipe(record: dict) -> str:
    rows = [
        (name, json.dumps(value, ensure_ascii=False))
        for name, value in (record.get("options") or {}).items()
    ]
    facts = {
        key: record[key]
        for key in ("command", "git_commit", "python", "seed")
        if record.get(key) is not None
    }
    facts |= record.get("libraries") or {}
    return (
        (
            f"<p>Options that are not the library's defaults.</p>{table(('option', 'value'), rows)}"
            if rows
            else ""
        )
        + "<details><summary>Command and"
        f" versions</summary>{table(('what', 'value'), map(_text_pair, facts.items()))}"
        + "</details>"
    )


def _text_pair(pair: tuple[str, Any]) -> tuple[str, str]:
    return pair[0], str(pair[1])
