"""report.html of a stage directory: one page about a run, which loads nothing.

It is made from the directory's own files alone: stage.json (or, during the run, what stage.json
will hold), train_log.jsonl, samples.jsonl and mask_report.json.
"""

import json
import time
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import TrainerState

from minimind.common.charts import bar_chart
from minimind.common.errors import UserError, decoration
from minimind.common.files import read_json, write_text
from minimind.common.page import page, table
from minimind.evaluation import TIMES, read_rewards
from minimind.stage_directory import read_stage
from minimind.training.callback_handler import Decoration
from minimind.training.plots import charts, loss_unit, read_log
from minimind.training.progress import clock
from minimind.training.samples import read_samples

PAUSE = 30  # seconds between two reports of a run: to draw one takes up to half a second
ROUNDS = 20  # of samples that are shown
STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: .8em; padding: 0; }
.tiles li { list-style: none; border: 1px solid #8884; border-radius: 8px; padding: .4em 1em; }
.tiles b { display: block; font-size: 1.35em; font-variant-numeric: tabular-nums; }
.curves { display: grid; gap: 1em; }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
figure { max-width: 640px; }
"""
TILES = (  # key of the log, name on the page, format
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "held-out loss", "{:.4f}"),
    ("eval_bits_per_byte", "held-out bits per byte", "{:.4f}"),
    ("eval_rewards/accuracies", "held-out reward accuracy", "{:.1%}"),
    ("eval_accuracy", "held-out accuracy", "{:.1%}"),
    ("eval_pairs_sum", "minimal pairs won", "{:.1%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("memory_gib", "memory", "{:.2f} GiB"),
    ("time_budget", "time budget used", "{:.1%}"),
)


class ReportCallback(Decoration):
    """Rewrites the report at evaluations and checkpoints, at most once in `PAUSE` seconds.
    `record` is what stage.json will hold, as far as it is known."""

    def __init__(self, directory: Path, record: dict[str, Any]):
        self.directory, self.record, self.due = directory, record, 0.0

    def _rewrite(self, args, state, control, **kwargs):
        if time.monotonic() >= self.due:
            self.write(state, "running")
            self.due = time.monotonic() + PAUSE

    on_evaluate = on_save = _rewrite

    def write(self, state: TrainerState, status: str) -> None:
        """Write the report of a run that is not complete: "running" or "interrupted"."""
        if not state.is_world_process_zero or not state.global_step:
            return
        record = {**self.record, "steps": state.global_step, "max_steps": state.max_steps}
        record |= {"tokens_seen": int(state.num_input_tokens_seen), "state": status}
        write_report(self.directory, record)


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


def title_of(stage: str, directory: Path) -> str:
    """The heading of a run's pictures and pages: its directory and its parent's, and the stage if
    neither names it.

    >>> title_of("sft", Path("runs/26m/sft")), title_of("lora", Path("runs/26m/jokes"))
    ('26m/sft', 'lora: 26m/jokes')
    """
    name = "/".join(directory.parts[-2:])
    return name if directory.name == stage else f"{stage}: {name}"


def report_page(directory: Path, record: dict[str, Any]) -> str:
    """The HTML page of a stage directory; a section that fails is left out."""
    log: list[dict] = []
    with decoration("reading train_log.jsonl"):
        log = read_log(directory / "train_log.jsonl")
    stage = record.get("stage", "run")
    sections = {
        "": lambda: _summary(record, log),
        "Curves": lambda: charts(log, loss_unit(stage)),
        "What the curves say": lambda: _reading(record.get("reading")),
        "Loss of single tokens": lambda: histogram(record.get("token_loss")),
        "Held-out metrics": lambda: _metrics(record, log),
        "Rewards": lambda: _rewards(stage, record),
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
    return page(title_of(stage, directory), body, STYLE)


def _summary(record: dict, log: Sequence[dict]) -> str:
    last = {key: entry[key] for entry in log for key in entry}  # the last value of each
    is_complete = "metrics" in record
    steps = f"{record.get('steps', last.get('step', 0)):,}"
    tiles = {"state": "complete" if is_complete else record.get("state", "running"), "steps": steps}
    if not is_complete:  # a killed run writes nothing more, so the page is of this moment
        tiles["written"] = time.strftime("%Y-%m-%d %H:%M")
        tiles["steps"] += f" of {record['max_steps']:,}" if record.get("max_steps") else ""
    if "tokens_seen" in record:
        tiles["tokens seen"] = f"{record['tokens_seen']:,}"
    tiles |= {name: form.format(last[key]) for key, name, form in TILES if key in last}
    if "elapsed" in last:
        tiles["training time"] = clock(last["elapsed"])
    if not is_complete and "eta" in last:
        tiles["left"] = clock(last["eta"])
    items = (f"<li>{escape(name)}<b>{escape(value)}</b></li>" for name, value in tiles.items())
    return f"<ul class=tiles>{''.join(items)}</ul>"


def histogram(counts: dict | None) -> str:
    """How the loss of single held-out tokens is distributed, as bars; see
    `evaluation.token_loss_distribution`."""
    if not counts:
        return ""
    edges, heights = counts["edges"], counts["counts"]
    tips = [
        f"{low:g} to {high:g} nats: {count:,} tokens"
        for low, high, count in zip(edges, edges[1:], heights, strict=False)
    ]
    facts = ", ".join(f"{name} {counts[name]:.3f}" for name in ("mean", "median", "p90", "p99"))
    return (
        f"<p>{counts['tokens']:,} held-out tokens, nats: {facts}. The last bar holds all beyond"
        " it.</p><figure><figcaption>Tokens <small>by their loss in nats</small></figcaption>"
        f"{bar_chart('Histogram of the loss per token', heights, edges, tips)}</figure>"
    )


def _reading(findings: Sequence[dict] | None) -> str:
    """What is wrong with a preference training; see `preference_reading.read_curves`."""
    if findings is None:
        return ""
    fields = ("severity", "text", "advice")
    rows = [[finding[field] for field in fields] for finding in findings]
    return table(fields, rows) or "<p>Nothing unusual.</p>"


def _metrics(record: dict, log: Sequence[dict]) -> str:
    metrics = record.get("metrics")
    if not metrics and (evaluations := [entry for entry in log if "eval_loss" in entry]):
        metrics = {
            name: {
                key.removeprefix("eval_"): value
                for key, value in entry.items()
                if key.startswith("eval_")
            }
            for name, entry in (("before", evaluations[0]), ("after", evaluations[-1]))
        }
    metrics = metrics or {"before": {}, "after": {}}
    names = dict.fromkeys(key for values in metrics.values() for key in values if key not in TIMES)
    rows = [
        [name, *(metrics[when].get(name, "") for when in ("before", "after"))] for name in names
    ]
    shown = table(("metric", "before", "after" if "metrics" in record else "now"), rows)
    if best := record.get("best"):
        metric, value = escape(best["metric"]), best["value"]
        shown += f"<p>Best: {metric} {value:.6g} after step {best['step']:,}.</p>"
    return shown


def _rewards(stage: str, record: dict) -> str:
    """What a reward model's held-out metrics say, in sentences."""
    metrics = (record.get("metrics") or {}).get("after")
    if stage != "reward" or not metrics:
        return ""
    return "".join(f"<p>{escape(sentence)}.</p>" for sentence in read_rewards(metrics))


def _samples(rows: Sequence[dict]) -> str:
    rounds = [(step, list(group)) for step, group in groupby(rows, key=lambda row: row["step"])]
    parts = []
    for step, group in rounds[: -ROUNDS - 1 : -1]:
        texts = table(("prompt", "text"), [(row["prompt"], row["text"]) for row in group], (0, 1))
        is_open = "" if parts else " open"
        parts.append(f"<details{is_open}><summary>after step {step:,}</summary>{texts}</details>")
    return "".join(parts)


def _numbers(facts: dict) -> str:
    """The numbers among some facts, in words."""
    return ", ".join(
        f"{value:,} {key.replace('_', ' ')}"
        for key, value in facts.items()
        if isinstance(value, int | float)
    )


def _data(data: dict) -> str:
    rows = []
    for part, facts in data.items():
        if not isinstance(facts, dict):
            continue
        files = "\n".join(map(str, facts.get("files") or ["held out of the training rows"]))
        rows.append((part, _numbers(facts), files, facts.get("hash") or ""))
        for source in facts.get("sources", ()):
            name = source.get("name") or "\n".join(map(str, source.get("files", ())))
            rows.append((f"{part}, one source", _numbers(source), name, ""))
    return table(("part", "rows and tokens", "files", "hash"), rows, texts=(2,))


def _mask(file: Path) -> str:
    """Roles and findings of the inspection's report, if there is one; see
    `inspection.Inspection`."""
    if not file.exists():
        return ""
    report = read_json(file, "The report does without it.")
    roles = [
        (role, counts["tokens"], counts["trained"], f"{counts['trained_share']:.1%}")
        for role, counts in report["roles"].items()
    ]
    fields = ("severity", "count", "text", "advice")
    findings = [[finding[field] for field in fields] for finding in report.get("findings", ())]
    return (
        f"<p>{escape(_numbers(report))}</p>"
        + table(("role", "tokens", "trained", "share"), roles)
        + table(fields, findings)
    )


def _lineage(directory: Path, record: dict) -> str:
    weights = record.get("weights", "being trained")
    rows = [(str(directory), record.get("stage", ""), weights, *_raw_text(record))]
    seen = set()
    while (parent := record.get("parent")) and parent["directory"] not in seen:
        seen.add(parent["directory"])
        try:
            record = read_stage(parent["directory"])
        except UserError:
            record = {}
        facts = parent["directory"], parent.get("stage") or "", parent["weights"]
        if not record or record.get("weights") not in (None, parent["weights"]):
            note = "holds other weights by now" if record else "no longer there"
            rows.append((*facts, note, ""))
            break
        rows.append((*facts, *_raw_text(record)))
    return table(("stage directory", "stage", "weights", "raw text", "its hash"), rows, texts=(3,))


def _raw_text(record: dict) -> tuple[str, str]:
    train = (record.get("data") or {}).get("train") or {}
    return "\n".join(map(str, train.get("files", ()))), str(train.get("hash") or "")


def _recipe(record: dict) -> str:
    options = record.get("options") or {}
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in options.items()]
    facts = {name: record.get(name) for name in ("command", "git_commit", "python", "seed")}
    facts = {name: str(value) for name, value in facts.items() if value is not None}
    facts |= record.get("libraries") or {}
    title = "<p>Options that are not the library's defaults.</p>" if rows else ""
    return (
        f"{title}{table(('option', 'value'), rows)}<details><summary>Command and versions</summary>"
        f"{table(('what', 'value'), facts.items())}</details>"
    )
