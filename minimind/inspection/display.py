"""An inspection in the terminal: the report, and rows with each token in its role's colour."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from minimind.common.language import translated
from minimind.common.severities import COLOURS
from minimind.common.streams import json_text
from minimind.common.terminal import Terminal
from minimind.inspection.inspection import Inspection
from minimind.inspection.lengths import PARTS, suggested
from minimind.inspection.readable import ReadableRows, role_colour

BAR = 40  # characters of the longest bar
EIGHTHS = "▏▎▍▌▋▊▉█"


def print_inspection(
    inspection: Inspection, numbers: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Print the report and some rows."""
    console = Terminal(soft_wrap=True)
    print_report(inspection.report, console)
    print_rows(inspection, numbers, tokenizer, console)


def print_json(inspection: Inspection, numbers: Iterable[int]) -> None:
    """Print the report as one JSON object, with the rows in the place of their number; row by row,
    since there may be many."""
    head = json_text({**inspection.report, "rows": None}, indent=2)
    before, after = head.split('"rows": null', 1)
    print(before + '"rows": [', end="")
    for index, number in enumerate(numbers):
        print("," if index else "", json_text(inspection.row(number)), sep="\n    ", end="")
    print("]" + after)


def print_report(report: dict, console: Terminal) -> None:
    """Print roles, lengths and findings."""
    console.print(Text("".join(map(translated, summary(report))), "bold"))
    console.print(roles_table(report))
    console.print()

    lengths = report["lengths"]
    named = {lengths["of"]: lengths} | {name: lengths[name] for name in PARTS if name in lengths}
    for name, each in named.items():
        shares = "  ".join(f"{share} %: {value:,}" for share, value in each["percentiles"].items())
        line = f"[bold]tokens per {name}[/]  mean {each['mean']:,}  {shares}"
        console.print(translated(line))
    counts, edges = lengths["histogram"]["counts"], lengths["histogram"]["edges"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        console.print(f"{low:>8,} to {high:<7,} {count:>9,}  [green]{bar(count / max(counts))}[/]")
    console.print()

    console.print(windows_table(lengths))
    fitting = f"{option(lengths)} {lengths['suggested_max_length']}"
    if "prompt" in lengths:  # pairs have two limits
        prompt, *replies = (suggested(lengths[name]["percentiles"]) for name in PARTS)
        fitting = f"--max_prompt_length {prompt} --max_completion_length {max(replies)}"
    console.print(translated(f"99 % fit into {fitting} (a multiple of 64)\n"))
    print_findings(report["findings"], console)


def summary(report: dict) -> tuple[str, str]:
    """The report in one line: what all stages have, and their own."""
    text = f"{report['stage']}: {report['rows']:,} rows, {report['tokens']:,} tokens, "
    if report["stage"] == "pretrain":
        return text, (
            f"{report['documents']:,} documents, {report['bytes_per_token']} bytes per token, "
            f"{report['dropped_tokens']:,} tokens left over, "
            f"{report['partial_character_share']:.1%} of the tokens are parts of characters"
        )
    return text, (
        f"{report['trained_share']:.1%} trained; the end token of"
        f" {report['replies_with_end_trained']:,} of {report['replies_trained']:,} trained"
        f" replies; {report['rows_without_trained_token']:,} rows without a trained token"
    )


def bar(share: float) -> str:
    """A bar of up to 40 characters for a share of 1, in eighths of a character; at least one for
    all but 0."""
    eighths = round(share * BAR * 8) or bool(share)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def option(lengths: dict) -> str:
    """The option that sets the length of a row; of pairs, which have two, what it is."""
    if "prompt" in lengths:
        return "length"
    return "--block_size" if lengths["of"] == "document" else "--max_length"


def empty_table(*columns: str) -> Table:
    """An empty table, its first column aligned to the left and the others to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def roles_table(report: dict) -> Table:
    """The tokens of each role, and how many of them are trained."""
    table = empty_table("role", "tokens", "trained", "share")
    for name, counts in report["roles"].items():
        cells = f"{counts['tokens']:,}", f"{counts['trained']:,}", f"{counts['trained_share']:.1%}"
        table.add_row(Text(name, role_colour(name)[0]), *cells)
    return table


def windows_table(lengths: dict) -> Table:
    """What fits into which length; pairs are never packed."""
    is_packed = not lengths["of"].startswith("pair")
    columns = ("packed into", "padding", "unpacked") if is_packed else ("padding",)
    table = empty_table(option(lengths), "fits", "tokens", *columns)
    percentile_of = {value: name for name, value in reversed(lengths["percentiles"].items())}
    for window in lengths["windows"]:
        size = window["max_length"]
        packing = f"{window['packed_rows']:,}", f"{window['packed_padding']:.1%}"
        table.add_row(
            f"{size:,}" + (f"  ({percentile_of[size]} %)" if size in percentile_of else ""),
            f"{window['rows_share']:.1%}",
            f"{window['tokens_share']:.1%}",
            *packing[: 2 * is_packed],
            f"{window['unpacked_padding']:.1%}",
        )
    return table


def print_findings(findings: Iterable[dict], console: Terminal) -> None:
    """Print each finding with its advice and places; names of the data stay as they are."""
    for finding in findings:
        severity, places = finding["severity"], finding["places"]
        parts = {name: translated(finding[name]) for name in ("text", "advice")}
        line = Text().append(f"{translated(severity):<8}", COLOURS[severity])
        line.append(f"{finding['name']}: ", "bold")
        console.print(line.append(translated("{text}. {advice}").format(**parts)))
        if places:
            more = ", ..." if finding["count"] > len(places) else ""
            console.print(Text(f"         {', '.join(places)}{more}", "dim"))
    if not findings:
        console.print(translated("[green]no findings[/]"))


def print_rows(
    inspection: Inspection,
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
    console: Terminal,
) -> None:
    """Print some rows, after a legend."""
    if not numbers:
        return
    legend = Text(translated("\ntokens, every second one underlined, special ones in italics: "))
    for name, counts in inspection.report["roles"].items():
        colour = role_colour(name)[0]
        if counts["trained"] < counts["tokens"]:
            legend.append(name, f"dim {colour}").append("  ")
        if counts["trained"]:
            legend.append(f"{name} trained", f"bold black on {colour}").append("  ")
    console.print(legend)
    rows = ReadableRows(inspection, tokenizer)
    for number in numbers:
        console.print(Text(f"\n{inspection.title(number)}", "bold"))
        console.print(row_text(rows, number))


def row_text(rows: ReadableRows, number: int) -> Text:
    """One row: trained tokens on their role's colour, ignored ones in it and dim; every second one
    underlined, so that borders show, and special tokens in italics, unlike text that spells one."""
    text = Text()
    for position, token in enumerate(rows[number]):
        colour = role_colour(token.role)[0]
        style = f"bold black on {colour}" if token.trained else f"dim {colour}"
        text.append(token.text, style + " underline" * (position % 2) + " italic" * token.special)
        if token.text.endswith("⏎"):
            text.append("\n")
    return text
