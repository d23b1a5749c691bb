"""An inspection as one HTML page: the report, and rows with each token in its role's colour."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerFast

from minimind.common.charts import canvas, draw_bars, plain, to_png, to_svg
from minimind.common.page import page, table
from minimind.inspection.display import roles_table, summary, windows_table
from minimind.inspection.inspection import Inspection
from minimind.inspection.readable import ReadableRows, ReadableToken, role_colour

STYLE = """
body { max-width: 68rem; } svg { max-width: 45rem; }
dt { margin-top: .6rem; } dd { margin-left: 1.5rem; }
.error { color: #cf222e; } .warning { color: #9a6700; } .info { color: #0b7285; }
.where { opacity: .7; font-size: 85%; } label { margin-right: 1rem; white-space: nowrap; }
fieldset { border: 1px solid #8884; position: sticky; top: 0; background: Canvas; }
.row { font: 14px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; margin: .3rem 0 1.5rem; }
i { font-style: normal; border-left: 1px solid #8884; padding: 1px 0; }
i { color: hsl(var(--hue) 45% 50%); }
i.t { color: #111; background: hsl(var(--hue) 60% 78%); font-weight: 600; }
i.t { border-left-color: hsl(var(--hue) 40% 55%); }
i.s { font-style: italic; opacity: .75; }
label span { padding: 0 .3rem; background: hsl(var(--hue) 60% 78%); color: #111; }
body:has(#trained:not(:checked)) i.t { display: none; }
body:has(#ignored:not(:checked)) i:not(.t) { display: none; }
"""


def inspection_page(
    inspection: Inspection,
    numbers: Iterable[int],
    tokenizer: PreTrainedTokenizerFast,
    source: str,
) -> str:
    """The report and some rows, headed by their `source`.

    Each token shows its id, label and role when the pointer rests on it; boxes hide roles, trained
    or ignored tokens.
    """
    report, rows = inspection.report, ReadableRows(inspection, tokenizer)
    names = list(report["roles"])  # a role's name comes from the data, so classes are numbers
    style = STYLE + "".join(
        f".r{index} {{ --hue: {role_colour(name)[1]}; }}\n"
        f"body:has(#r{index}:not(:checked)) i.r{index} {{ display: none; }}\n"
        for index, name in enumerate(names)
    )
    findings = "".join(map(_finding, report["findings"]))
    shown = "".join(
        f"<div class=where>{escape(inspection.title(number))}</div><div class=row>"
        f"{''.join(_token(token, names.index(token.role)) for token in rows[number])}</div>"
        for number in numbers
    )
    body = (
        f"<p>{escape(''.join(summary(report)))}</p>{_html_table(roles_table(report))}"
        f"<h2>Findings</h2><dl>{findings or 'none'}</dl>"
        f"<h2>Lengths</h2>{length_svg(report['lengths'])}"
        f"{_html_table(windows_table(report['lengths']))}"
        f"<h2>Rows</h2><fieldset>{_boxes(names)}</fieldset>{shown}"
    )
    return page(f"minimind inspect: {source}", body, style)


def _finding(finding: dict) -> str:
    name, text, advice = (escape(finding[field]) for field in ("name", "text", "advice"))
    severity, places = finding["severity"], escape(", ".join(finding["places"]))
    return (
        f"<dt><b class={severity}>{severity}</b> {name}: {text}</dt>"
        f"<dd>{advice}<br><span class=where>{places}</span></dd>"
    )


def _boxes(names: list[str]) -> str:
    boxes = {f"r{n}": f"<span class=r{n}>{escape(name)}</span>" for n, name in enumerate(names)}
    boxes |= {"trained": "trained", "ignored": "ignored"}
    return "".join(
        f"<label><input type=checkbox id={key} checked> {name}</label>"
        for key, name in boxes.items()
    )


def _token(token: ReadableToken, role: int) -> str:
    classes = f"r{role}" + " t" * token.trained + " s" * token.special
    label = token.label if token.trained else "ignored"
    tip = escape(f"id {token.token_id}, label {label}, {token.role}")
    line_end = "<br>" if token.text.endswith("⏎") else ""
    return f'<i class="{classes}" title="{tip}">{escape(token.text)}</i>{line_end}'


def _html_table(printed: Table) -> str:
    """A table of the terminal as the same one in HTML."""
    columns = [[*map(str, column.cells)] for column in printed.columns]
    head = [str(column.header) for column in printed.columns]
    return table(head, zip(*columns, strict=True), texts=(0,))


@contextmanager
def _length_chart(lengths: dict) -> Iterator[Any]:
    """The histogram of `describe_lengths` as a figure."""
    counts, edges = lengths["histogram"]["counts"], lengths["histogram"]["edges"]
    with canvas(8, 3, layout="constrained") as figure:
        axes = plain(figure.add_subplot())
        draw_bars(axes, counts, edges, color="tab:green")
        axes.set(xlabel=f"tokens per {lengths['of']}", ylabel=f"{lengths['of']}s")
        yield figure


def length_svg(lengths: dict) -> str:
    """The histogram of `describe_lengths` as an inline SVG."""
    with _length_chart(lengths) as figure:
        return to_svg(figure, "length histogram")


def length_png(lengths: dict) -> bytes:
    """The histogram of `describe_lengths` as the content of a PNG file."""
    with _length_chart(lengths) as figure:
        return to_png(figure)
