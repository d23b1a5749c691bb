"""The report of a cleaning: what report.json holds, and what the command prints."""

from collections.abc import Sequence
from typing import Any

from minimind.cleaning.counts import Counts, StepCounts
from minimind.cleaning.extras import version
from minimind.cleaning.procedure import FORMAT_VERSION, Procedure
from minimind.data.bad_rows import BadRows

REPORT = {"key": str, "rows": dict, "steps": list, "shards": list}  # what is read of a report.json


def make_report(
    key: str,
    procedure: Procedure,
    counts: Counts,
    rows_in: int,
    bad: BadRows,
    inputs: Sequence[dict[str, Any]],
    shards: Sequence[dict[str, Any]],
    repeated: dict[int, dict[str, str]],
) -> dict[str, Any]:
    """The report of a finished cleaning; `repeated`: the rows that examples repeat, by number."""
    steps = {label: counts.step(label) for label in procedure.labels}
    first, last = (steps[procedure.labels[end]] for end in (0, -1))
    rows = {
        "in": rows_in,
        "added": counts.rows_added,
        "out": sum(shard["rows"] for shard in shards),
        "removed": sum(step.rows_removed for step in steps.values()),
        "bad": bad.count,
    }
    if rows["in"] + rows["added"] != rows["out"] + rows["removed"] + rows["bad"]:
        raise RuntimeError(f"rows were lost or doubled: {rows}")
    return {
        "format_version": FORMAT_VERSION,
        "key": key,
        "recipe": procedure.as_dict(),
        "packages": {package: version(package) for package in procedure.packages},
        "inputs": inputs,
        "rows": rows,
        "characters": {"in": first.characters_in, "out": last.characters_out},
        "boundary_markers": counts.markers,
        "steps": [_step_report(label, step, repeated) for label, step in steps.items()],
        "groups": dict(sorted(counts.groups.items())),
        "bad_rows": [{"where": where, "problem": problem} for where, problem in bad.first],
        "shards": shards,
    }


def _step_report(
    label: str, step: StepCounts, repeated: dict[int, dict[str, str]]
) -> dict[str, Any]:
    examples: dict[str, list[dict[str, Any]]] = {}
    for reason, of_reason in sorted(step.examples.items()):
        examples[reason] = [
            {name: value for name, value in example.items() if name != "order"}
            | ({"repeats": repeated[example["repeats"]]} if "repeats" in example else {})
            for example in of_reason
        ]
    return {
        "step": label,
        "rows_in": step.rows_in,
        "rows_out": step.rows_in - step.rows_removed,
        "rows_changed": step.rows_changed,
        "rows_removed": step.rows_removed,
        "characters_in": step.characters_in,
        "characters_out": step.characters_out,
        "reasons": dict(sorted(step.reasons.items(), key=lambda entry: (-entry[1], entry[0]))),
        "examples": examples,
    }


def share(part: int, total: int) -> str:
    """A share in percent, with more digits where it is close to none or all."""
    value = part / total if total else 0.0
    return f"{value:.1%}" if value in (0, 1) or 0.001 <= value <= 0.999 else f"{value:.3%}"


def report_text(report: dict[str, Any]) -> str:
    """A report from `clean` as the text to print."""
    rows, run, characters = report["rows"], report["run"], report["characters"]
    lines = [f"{'step':<20}{'rows in':>12}{'changed':>10}{'removed':>10}  reasons"]
    for step in report["steps"]:
        reasons = [f"{reason} {count:,}" for reason, count in step["reasons"].items()]
        shown = ", ".join(reasons[:3] + ["..."] * (len(reasons) > 3))
        changed, removed = step["rows_changed"], step["rows_removed"]
        line = f"{step['step']:<20}{step['rows_in']:>12,}{changed:>10,}{removed:>10,}  {shown}"
        lines.append(line.rstrip())
    speed = "was cleaned before"
    if run["rows_found_finished"] < rows["in"]:
        rate = f"{run['rows_per_second']:,.0f} rows/s"
        speed = f"{rate} with {run['processes']} processes, {run['seconds']:.1f} s"
    added = f" + {rows['added']:,} by splitting" if rows["added"] else ""
    lines.append(
        f"{rows['in']:,} rows in{added} = {rows['out']:,} out + {rows['removed']:,} removed +"
        f" {rows['bad']:,} bad; {share(characters['out'], characters['in'])} of the characters"
        f" kept ({speed})"
    )
    if markers := report["boundary_markers"]:
        count = sum(markers.values())
        lines.append(f"split {count:,} rows at {', '.join(markers)} into {count + rows['added']:,}")
    return "\n".join([*lines, f"-> {run['destination']}/report.html"])
