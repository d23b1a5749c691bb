"""Score cards for people: a table on a terminal, Markdown, a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minimind.common.charts import COLOURS, GRID, canvas, to_png
from minimind.common.errors import decoration
from minimind.common.files import write_bytes
from minimind.common.language import translated
from minimind.evaluation.statistics import Measure, estimate
from minimind.score_card.tasks import Card

SHOWN = 30  # measures of a task in a table on a terminal and in the picture
COLUMNS = ("model", "measure", "n", "score", "95 % interval", "chance", "verdict")
NUMBERS = ("n", "score", "chance", "A", "B", "B - A", "p", "step", "tokens")
VERDICTS = {
    True: "better than chance",
    False: "worse than chance",
    None: "not distinguishable from chance",
}


class ScoreRow(NamedTuple):
    """One measure of one model."""

    directory: str
    name: str
    n: int
    score: float
    interval: tuple[float, float]
    chance: float | None
    verdict: str
    is_share: bool

    def cells(self) -> list[str]:
        """The row as texts."""
        low, high = map(self.shown, self.interval)
        chance = "" if self.chance is None else self.shown(self.chance)
        score = self.shown(self.score)
        verdict = translated(self.verdict) if self.verdict else ""
        return [self.name, f"{self.n:,}", score, f"{low} - {high}", chance, verdict]

    def shown(self, value: float) -> str:
        """A value as a text: a share in percent."""
        return f"{value:.1%}" if self.is_share else f"{value:,.4f}"


def is_share(measure: Measure) -> bool:
    """Whether a measure counts right and wrong items."""
    return measure.weights is None and all(0 <= value <= 1 for value in measure.values.values())


def rows(cards: Sequence[Card], most: int | None = None) -> Iterator[ScoreRow]:
    """The measures of each task, of each the models in their order; at most so many of a task."""
    names = dict.fromkeys(
        (task, name)
        for card in cards
        for task in card.results
        for name in list(card.results[task].measures)[:most]
    )
    for task, name in names:
        for card in cards:
            if measure := card.results[task].measures.get(name):
                found = estimate(measure)
                verdict = VERDICTS[found["above_chance"]] if "chance" in found else ""
                yield ScoreRow(
                    card.directory,
                    name,
                    found["n"],
                    found["score"],
                    tuple(found["interval"]),
                    found.get("chance"),
                    verdict,
                    is_share(measure),
                )


class Table(NamedTuple):
    """A table: all its lines for a file, and those that fit on a terminal."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    shown: Sequence[Sequence[str]]

    def for_terminal(self):
        """A rich table, with numbers on the right."""
        from rich.table import Table as RichTable

        table = RichTable()
        for name in self.columns:
            table.add_column(translated(name), justify="right" if name in NUMBERS else "left")
        for line in self.shown:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """All lines in Markdown."""
        escaped = [
            [str(cell).replace("|", "\\|") for cell in line]
            for line in (self.columns, ["---"] * len(self.columns), *self.lines)
        ]
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def card_table(cards: Sequence[Card]) -> Table:
    """The measures of each task; a terminal shows the first of them, and names the model where
    there are several."""
    lines, shown = (
        [[row.directory, *row.cells()] for row in rows(cards, most)] for most in (None, SHOWN)
    )
    if len(cards) == 1:
        return Table(COLUMNS[1:], [line[1:] for line in lines], [line[1:] for line in shown])
    return Table(COLUMNS, lines, shown)


def remarks(cards: Sequence[Card]) -> Iterator[str]:
    """What controls and contamination say in words; of several models with the directory."""
    for card in cards:
        for result in card.results.values():
            for remark in result.section.get("remarks", ()):
                text = translated(remark)
                yield f"{card.directory}: {text}" if len(cards) > 1 else text


def picture(file: Path, cards: Sequence[Card]) -> None:
    """Write the shares with their intervals and chance lines as a PNG, and below them the bits per
    byte, if there are any."""
    found = list(rows(cards, SHOWN))
    panels = {
        "share of items": [row for row in found if row.is_share],
        "bits per byte": [row for row in found if row.name.endswith("bits_per_byte")],
    }
    panels = {title: panel for title, panel in panels.items() if panel}
    heights = [0.6 + len({row.name for row in panel}) for panel in panels.values()]
    if not panels:
        return
    with decoration("the picture of the card"):
        row_height = 0.22 + 0.08 * len(cards)
        height = row_height * sum(heights) + 0.2 * len(cards) + 0.5 * len(panels)
        with canvas(9, height, layout="constrained") as figure:
            grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
            for axes, (title, panel) in zip(grid, panels.items(), strict=True):
                draw_panel(axes, title, panel, [card.directory for card in cards])
            handles, labels = grid[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", frameon=False, fontsize=9)
            write_bytes(file, to_png(figure))


def draw_panel(
    axes: Any, title: str, panel: Sequence[ScoreRow], directories: Sequence[str]
) -> None:
    """Draw the scores of one unit: a line for each measure, the models below each other on it."""
    names = list(dict.fromkeys(row.name for row in panel))
    for row in panel:
        index, line = directories.index(row.directory), names.index(row.name)
        place = line + 0.6 * (index + 0.5) / len(directories) - 0.3
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(row.interval, [place, place], color=colour, linewidth=2)
        axes.plot([row.score], [place], "o", color=colour, markersize=4)
        if row.chance is not None:
            axes.plot([row.chance] * 2, [line - 0.45, line + 0.45], color="#888888", linestyle=":")
    for index, directory in enumerate(directories):
        axes.plot([], [], "o-", color=COLOURS[index % len(COLOURS)], label=directory)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(translated(title), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color=GRID)
    if panel[0].is_share:
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
