"""An inspection in the terminal and as one HTML file: rows with each token in its role's colour,
trained or not."""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from minimind.common.language import translated
from minimind.common.streams import json_text
from minimind.common.terminal import Terminal
from minimind.data.packing import IGNORED
from minimind.inspection import Inspection
from minimind.tokenizer import text_bytes

# The name of a role's colour in the terminal, and its hue on the page; other roles share the last.
COLOURS = {
    "system": ("magenta", 290),
    "user": ("blue", 215),
    "assistant": ("green", 140),
    "tool": ("cyan", 185),
    "document": ("green", 140),
    "": ("yellow", 40),
}
SEVERITIES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
BAR = 40  # characters of the longest bar
EIGHTHS = "▏▎▍▌▋▊▉█"


class Piece(NamedTuple):
    """One token as it is shown."""

    text: str
    token_id: int
    label: int
    role: str
    special: bool

    @property
    def trained(self) -> bool:
        """Whether it has a label."""
        return self.label != IGNORED


class Pieces:
    """Rows -> tokens each readable by itself.

    A line break is shown as "⏎", a part of a character as its bytes (<0xE4>), other control
    characters escaped.
    """

    def __init__(self, inspection: Inspection, tokenizer: PreTrainedTokenizerFast):
        self.inspection = inspection
        pieces = text_bytes(tokenizer)
        self.texts = [
            self.readable(raw, tokenizer.convert_ids_to_tokens(token_id))
            for token_id, raw in enumerate(pieces)
        ]
        self.special = {token_id for token_id, raw in enumerate(pieces) if not raw}

    @staticmethod
    def readable(raw: bytes, name: str) -> str:
        """A token's bytes, or, where it has none, its name -> printable text."""
        try:
            text = raw.decode() or name
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)
        text = text.replace("\n", "⏎")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def of_row(self, number: int) -> Iterator[Piece]:
        """The tokens of one row."""
        tokens, messages = self.inspection.tokens, self.inspection.messages
        span = slice(tokens.starts[number], tokens.starts[number + 1])
        roles = messages.names[messages.role[messages.of_token[span]]]
        for token_id, label, role in zip(
            tokens.ids[span].tolist(), tokens.labels[span].tolist(), roles, strict=True
        ):
            yield Piece(self.texts[token_id], token_id, label, str(role), token_id in self.special)


# The terminal.


def bar(share: float) -> str:
    """A share of 1 -> a bar of up to 40 characters, in eighths of a character; something for all
    but 0."""
    eighths = round(share * BAR * 8) or bool(share)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def table(*columns: str) -> Table:
    """An empty table, its first column aligned to the left and the others to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    return made


def print_inspection(
    inspection: Inspection, numbers: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The report and some rows."""
    console = Terminal(soft_wrap=True)
    print_report(inspection.report, console)
    print_rows(inspection, numbers, tokenizer, console)


def print_json(inspection: Inspection, numbers: Iterable[int]) -> None:
    """The report as one JSON object, with the rows in place of their number; row by row, since they
    may be many."""
    head = json_text({**inspection.report, "rows": None}, indent=2)
    before, after = head.split('"rows": null', 1)
    print(before + '"rows": [', end="")
    for index, number in enumerate(numbers):
        print("," if index else "", json_text(inspection.row(number)), sep="\n    ", end="")
    print("]" + after)


def print_report(report: dict, console: Terminal) -> None:
    """Roles, lengths and findings."""
    console.print(Text("".join(map(translated, summary(report))), "bold"))
    roles = table("role", "tokens", "trained", "share")
    for name, counts in report["roles"].items():
        colour = COLOURS.get(name, COLOURS[""])[0]
        cells = f"{counts['tokens']:,}", f"{counts['trained']:,}", f"{counts['trained_share']:.1%}"
        roles.add_row(Text(name, colour), *cells)
    console.print(roles)
    console.print()
    lengths = report["lengths"]
    shown = "  ".join(f"{name} %: {value:,}" for name, value in lengths["percentiles"].items())
    console.print(
        translated(f"[bold]tokens per {lengths['of']}[/]  mean {lengths['mean']:,}  {shown}")
    )
    counts, edges = lengths["histogram"]["counts"], lengths["histogram"]["edges"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        console.print(f"{low:>8,} to {high:<7,} {count:>9,}  [green]{bar(count / max(counts))}[/]")
    console.print()
    console.print(windows_table(lengths))
    fitting = (
        f"99 % fit into {option(lengths)} {lengths['suggested_max_length']} (a multiple of 64)\n"
    )
    console.print(translated(fitting))
    print_findings(report["findings"], console)


def summary(report: dict) -> tuple[str, str]:
    """The report in one line: what all stages have, and their own."""
    text = f"{report['stage']}: {report['rows']:,} rows, {report['tokens']:,} tokens, "
    if report["stage"] == "pretrain":
        return (
            text,
            (
                f"{report['documents']:,} documents, {report['bytes_per_token']} bytes per token, "
                f"{report['dropped_tokens']:,} tokens left over, "
                f"{report['partial_character_share']:.1%} of the tokens are parts of characters"
            ),
        )
    return (
        text,
        (
            f"{report['trained_share']:.1%} trained; the end token of"
            f" {report['replies_with_end_trained']:,} of {report['replies_trained']:,} trained"
            f" replies; {report['rows_without_trained_token']:,} rows without a trained token"
        ),
    )


def option(lengths: dict) -> str:
    """The option that says how long a row is."""
    return "--block_size" if lengths["of"] == "document" else "--max_length"


def windows_table(lengths: dict) -> Table:
    """What fits into which --max_length; pairs are never packed."""
    packed = not lengths["of"].startswith("pair")
    columns = ("packed into", "padding", "unpacked") if packed else ("padding",)
    made = table(option(lengths), "fits", "tokens", *columns)
    of_size = {value: name for name, value in reversed(lengths["percentiles"].items())}
    for window in lengths["windows"]:
        size = window["max_length"]
        rows = (f"{window['packed_rows']:,}", f"{window['packed_padding']:.1%}") if packed else ()
        made.add_row(
            f"{size:,}{f'  ({of_size[size]} %)' if size in of_size else ''}",
            f"{window['rows_share']:.1%}",
            f"{window['tokens_share']:.1%}",
            *rows,
            f"{window['unpacked_padding']:.1%}",
        )
    return made


def print_findings(findings: Iterable[dict], console: Terminal) -> None:
    """Each finding with its advice and places; what they say of the data is printed as it is."""
    for finding in findings:
        line = Text().append(
            f"{translated(finding['severity']):<8}", SEVERITIES[finding["severity"]]
        )
        parts = {name: translated(finding[name]) for name in ("text", "advice")}
        told = translated("{text}. {advice}").format(**parts)
        line.append(f"{finding['name']}: ", "bold").append(told)
        console.print(line)
        if finding["places"]:
            more = ", ..." if finding["count"] > len(finding["places"]) else ""
            console.print(Text(f"         {', '.join(finding['places'])}{more}", "dim"))
    if not findings:
        console.print(translated("[green]no findings[/]"))


def row_text(inspection: Inspection, number: int, pieces: Pieces) -> Text:
    """One row: trained tokens on their role's colour, ignored ones in it and dim; every second one
    underlined, so that borders show, and special tokens in italics, unlike text that spells one."""
    shown = Text()
    for position, piece in enumerate(pieces.of_row(number)):
        colour = COLOURS.get(piece.role, COLOURS[""])[0]
        style = f"bold black on {colour}" if piece.trained else f"dim {colour}"
        style += " underline" * (position % 2) + " italic" * piece.special
        shown.append(piece.text, style)
        if piece.text.endswith("⏎"):
            shown.append("\n")
    return shown


def print_rows(
    inspection: Inspection, numbers: Sequence[int], tokenizer, console: Terminal
) -> None:
    """Some rows, after a legend."""
    if not numbers:
        return
    pieces = Pieces(inspection, tokenizer)
    legend = Text(translated("\ntokens, every second one underlined, special ones in italics: "))
    for name, counts in inspection.report["roles"].items():
        colour = COLOURS.get(name, COLOURS[""])[0]
        if counts["trained"] < counts["tokens"]:
            legend.append(name, f"dim {colour}").append("  ")
        if counts["trained"]:
            legend.append(f"{name} trained", f"bold black on {colour}").append("  ")
    console.print(legend)
    for number in numbers:
        console.print(Text(f"\n{inspection.title(number)}", "bold"))
        console.print(row_text(inspection, number, pieces))


# The page.


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d1d9e0; --dim: #656d76 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --dim: #9198a1 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { padding: .15rem .8rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } th, td { border-bottom: 1px solid var(--line) }
img { max-width: 100%; background: #fff } dt { margin-top: .6rem } dd { margin-left: 1.5rem }
.error { color: #cf222e } .warning { color: #9a6700 } .info { color: #0b7285 }
.where { color: var(--dim); font-size: 85% } label { margin-right: 1rem; white-space: nowrap }
fieldset { border: 1px solid var(--line); position: sticky; top: 0; background: var(--paper) }
.row { font: 14px/1.9 ui-monospace, monospace; overflow-wrap: anywhere; margin: .3rem 0 1.5rem }
i { font-style: normal; border-left: 1px solid var(--line); padding: 1px 0; color: hsl(var(--hue) 45% 50%) }
i.t { color: #111; background: hsl(var(--hue) 60% 78%); border-left-color: hsl(var(--hue) 40% 55%); font-weight: 600 }
i.s { font-style: italic; opacity: .75 }
label span { padding: 0 .3rem; background: hsl(var(--hue) 60% 78%); color: #111 }
body:has(#trained:not(:checked)) i.t, body:has(#ignored:not(:checked)) i:not(.t) { display: none }
"""


def length_png(lengths: dict) -> bytes:
    """The histogram of `describe_lengths` as a PNG."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    edges, counts = lengths["histogram"]["edges"], lengths["histogram"]["counts"]
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    # The last bar holds the tail and is as wide as the others, whatever its edge.
    names = [f"{low:,}" for low in edges[:-1]]
    axes.bar(range(len(counts)), counts, width=0.95, align="edge", color="tab:green")
    axes.set_xticks(range(len(counts) + 1), [*names, f"{edges[-1]:,}"], rotation=45)
    axes.set(xlabel=f"tokens per {lengths['of']}", ylabel=f"{lengths['of']}s")
    axes.grid(alpha=0.3, axis="y")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    return file.getvalue()


def html_table(made: Table) -> str:
    """A table of the terminal -> the same in HTML."""
    columns = [column.header for column in made.columns]
    rows = zip(*([*column.cells] for column in made.columns), strict=True)
    cells = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{html.escape(str(name))}</th>' for name in columns)}</tr>{cells}</table>"


def page(inspection: Inspection, numbers: Iterable[int], tokenizer, source: str) -> str:
    """The report and some rows as one HTML page that asks nothing of the network; all text of the
    data is escaped.

    Each token tells its id, label and role when the pointer rests on it; boxes hide roles, trained
    or ignored tokens.
    """
    report, pieces = inspection.report, Pieces(inspection, tokenizer)
    names = list(report["roles"])  # a role's name comes from the data, so classes are numbers
    style = STYLE
    for index, name in enumerate(names):
        style += f".r{index} {{ --hue: {COLOURS.get(name, COLOURS[''])[1]} }}\n"
        style += f"body:has(#r{index}:not(:checked)) i.r{index} {{ display: none }}\n"
    image = base64.b64encode(length_png(report["lengths"])).decode()
    roles = table("role", "tokens", "trained", "share")
    for name, counts in report["roles"].items():
        roles.add_row(
            name,
            f"{counts['tokens']:,}",
            f"{counts['trained']:,}",
            f"{counts['trained_share']:.1%}",
        )
    findings = "".join(
        f"<dt><b class={finding['severity']}>{finding['severity']}</b>"
        f" {html.escape(finding['name'])}:"
        f" {html.escape(finding['text'])}</dt><dd>{html.escape(finding['advice'])}<br><span"
        f" class=where>{html.escape(', '.join(finding['places']))}</span></dd>"
        for finding in report["findings"]
    )
    boxes = {
        f"r{index}": f'<span class="r{index}">{html.escape(name)}</span>'
        for index, name in enumerate(names)
    }
    boxes |= {"trained": "trained", "ignored": "ignored"}
    filters = "".join(
        f"<label><input type=checkbox id={key} checked> {name}</label>"
        for key, name in boxes.items()
    )
    rows = []
    for number in numbers:
        shown = []
        for piece in pieces.of_row(number):
            label = piece.label if piece.trained else "ignored"
            tip = html.escape(f"id {piece.token_id}, label {label}, {piece.role}", quote=True)
            trained = " t" * piece.trained + " s" * piece.special
            line = "<br>" if piece.text.endswith("⏎") else ""
            text = html.escape(piece.text)
            shown.append(
                f'<i class="r{names.index(piece.role)}{trained}" title="{tip}">{text}</i>{line}'
            )
        rows.append(
            f"<div class=where>{html.escape(inspection.title(number))}</div><div"
            f" class=row>{''.join(shown)}</div>"
        )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    line = "".join(summary(report))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<title>minimind inspect: {html.escape(source)}</title><style>{style}</style>"
        f"<h1>{html.escape(source)}</h1><p>{html.escape(line)}</p>{html_table(roles)}"
        f"<h2>Findings</h2><dl>{findings or 'none'}</dl>"
        f'<h2>Lengths</h2><img alt="length histogram" src="data:image/png;base64,{image}">'
        f"{html_table(windows_table(report['lengths']))}"
        f"<h2>Rows</h2><fieldset>{filters}</fieldset>{''.join(rows)}</html>"
    )
