"""The curve of a run: the cards of its checkpoints, in the order of their steps."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from minimind.common.charts import COLOURS, GRID, canvas, to_png
from minimind.common.errors import UserError, decoration
from minimind.common.files import read_json, write_bytes
from minimind.score_card.report import ScoreRow, Table, rows
from minimind.score_card.tasks import CONTROLS, Card
from minimind.stage_directory import read_stage

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"  # the library's, in each checkpoint
DRAWN = 2  # measures of a task, from the first


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory is a checkpoint of a run."""
    path = Path(directory)
    return bool(CHECKPOINT.fullmatch(path.name)) and (path / STATE).is_file()


def curve_of(directories: Sequence[str], expand: bool = False) -> list[str] | None:
    """The checkpoints of runs by their steps; None where the directories are other models.

    Three or more checkpoints are a curve, as of a shell's RUN/checkpoint-*. With `expand` the
    directories are runs: all their checkpoints, and the run's own weights where it is complete with
    those of another step.

    Raises:
        UserError: a run has no checkpoint.
    """
    if not expand:
        if len(directories) < 3 or not all(map(is_checkpoint, directories)):
            return None
        return sorted(directories, key=lambda path: (run_of(path), place(path)["step"]))
    return [path for run in directories for path in checkpoints_of(run)]


def checkpoints_of(run: str) -> list[str]:
    """The points of a run's curve, see `curve_of`; raises UserError."""
    found = [path for path in Path(run).glob("checkpoint-*") if is_checkpoint(path)]
    if not found:
        raise UserError(
            f"{run}: found no checkpoint, expected checkpoint-N directories. Train with"
            " --save_steps, and --save_total_limit as large as the number of points."
        )
    steps = [place(path)["step"] for path in found]
    if read_stage(run).get("weights_step") not in (None, *steps):
        found.append(Path(run))
    return [str(path) for path in sorted(found, key=lambda path: place(path)["step"])]


def place(directory: str | Path) -> dict[str, int | None]:
    """The `step` of a checkpoint or a complete run, and the `tokens` trained until then, if they
    are known; raises UserError."""
    if is_checkpoint(directory):
        state = read_json(Path(directory) / STATE, "Take another checkpoint.")
        step, tokens = state.get("global_step"), state.get("num_input_tokens_seen")
    else:
        stage = read_stage(directory)
        step = stage.get("weights_step")
        tokens = stage.get("tokens_seen") if step == stage.get("steps") else None
    if not isinstance(step, int):
        raise UserError(f"{directory}: found no step, expected a checkpoint of a run.")
    return {"step": step, "tokens": int(tokens) if tokens else None}


def run_of(directory: str) -> str:
    """The directory of the run that a checkpoint, or the complete run itself, belongs to."""
    path = Path(directory)
    return str(path.parent if is_checkpoint(path) else path)


def curves_json(cards: Sequence[Card]) -> dict:
    """The `checkpoints` of a run, each with its step, tokens and card; of several runs: `runs`."""
    runs: dict[str, list[dict]] = {}
    for card in cards:
        entry = {**place(card.directory), **card.entries()}
        runs.setdefault(run_of(card.directory), []).append(entry)
    found = [{"directory": run, "checkpoints": entries} for run, entries in runs.items()]
    return found[0] if len(found) == 1 else {"runs": found}


class Curve(NamedTuple):
    """A measure of a run, by step."""

    run: str
    name: str
    points: list[tuple[int, ScoreRow]]


def curves(cards: Sequence[Card]) -> list[Curve]:
    """The first measures of each task."""
    found: dict[tuple[str, str], Curve] = {}
    of_tasks = [
        card._replace(results={k: v for k, v in card.results.items() if k != CONTROLS})
        for card in cards
    ]
    for row in rows(of_tasks, DRAWN):
        key = run_of(row.directory), row.name
        found.setdefault(key, Curve(*key, [])).points.append((place(row.directory)["step"], row))
    return list(found.values())


def curve_table(cards: Sequence[Card]) -> Table:
    """A line for each checkpoint, with the first measures of each task."""
    found = curves(cards)
    names = list(dict.fromkeys(curve.name for curve in found))
    at = {(row.directory, curve.name): row for curve in found for _, row in curve.points}
    lines = []
    for card in cards:
        where = place(card.directory)
        scores = []
        for name in names:
            row = at.get((card.directory, name))
            low, high = map(row.shown, row.interval) if row else ("", "")
            scores.append(f"{row.shown(row.score)} ({low} - {high})" if row else "")
        tokens = "" if where["tokens"] is None else f"{where['tokens']:,}"
        lines.append([card.directory, f"{where['step']:,}", tokens, *scores])
    return Table(["model", "step", "tokens", *names], lines, lines)


def curve_picture(file: Path, cards: Sequence[Card]) -> None:
    """Write the first measures of each task over the steps as a PNG, with bands for their intervals
    and dotted lines for chance."""
    found = curves(cards)
    names = list(dict.fromkeys(curve.name for curve in found))
    runs = list(dict.fromkeys(curve.run for curve in found))
    if not names:
        return
    with decoration("the picture of the curve"), canvas(8, 2.6 * len(names)) as figure:
        panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
        for name, axes in zip(names, panels, strict=True):
            axes.set_title(name, fontsize=9, parse_math=False)
            axes.grid(color=GRID)
            axes.set_ymargin(0.1)
        for curve in found:
            axes, colour = panels[names.index(curve.name)], COLOURS[runs.index(curve.run) % 6]
            steps, points = zip(*curve.points, strict=True)
            axes.plot(steps, [row.score for row in points], "o-", color=colour, label=curve.run)
            band = zip(*(row.interval for row in points), strict=True)
            axes.fill_between(steps, *band, color=colour, alpha=0.2, linewidth=0)
            if points[0].chance is not None:
                axes.axhline(points[0].chance, color="#888888", linestyle=":")
            if points[0].is_share:
                axes.yaxis.set_major_formatter("{x:.0%}")
        panels[0].legend(fontsize=8)
        panels[-1].set_xlabel("step")
        figure.tight_layout()
        write_bytes(file, to_png(figure))
