"""What `minimind tokenizer evaluate` and `compare` print."""

import io
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from minimind.common.errors import UserError
from minimind.common.files import check_output, write_text
from minimind.common.terminal import Terminal

DOMAINS_SHOWN = 30
WIDTH = 120  # columns, where no terminal says
EXPORTS = {".svg": "export_svg", ".html": "export_html", ".txt": "export_text"}
LANGUAGE_NAMES = {"zh": "Chinese", "en": "English", "other": "other"}


def check_save(save: str | None) -> None:
    """Raise UserError if the report cannot be written to `save`."""
    if not save:
        return
    if Path(save).suffix not in EXPORTS:
        raise UserError(f"--save {save}: expected a name that ends in {', '.join(EXPORTS)}.")
    if not Path(save).parent.is_dir():
        raise UserError(f"--save {save}: the directory {Path(save).parent} does not exist.")
    check_output(save)


def show(
    tables: Sequence[Table | str], title: str, save: str | None = None, quiet: bool = False
) -> None:
    """Print tables, unless `quiet`, and write them to `save`, a picture (.svg), a page (.html) or
    text (.txt)."""
    console = Terminal(record=bool(save), file=io.StringIO() if quiet else None)
    if save or not console.is_terminal:
        console.width = WIDTH
    for table in tables:
        console.print(table)
    if save:
        options = {"title": title} if save.endswith(".svg") else {}
        write_text(save, getattr(console, EXPORTS[Path(save).suffix])(**options))


def evaluation_tables(result: dict) -> list[Table | str]:
    """The result of `comparison.evaluate` as the tables to print."""
    facts = result["tokenizer"]
    rule = facts["pre_tokenizer"] or "[red]none that a GGUF file can name[/red]"
    lines = [
        f"[bold]{escape(facts['directory'])}[/bold]: {facts['vocab_size']:,} tokens, "
        f"{len(facts['control_tokens'])} of them control tokens; splitting rule: {rule}"
    ]
    if facts["added_tokens"]:
        lines.append(
            "[yellow]any text can call these by name:[/yellow]"
            f" {escape(' '.join(facts['added_tokens']))}"
        )
    return [
        "\n".join(lines),
        _sizes(result),
        _vocabulary(result),
        _kinds(result),
        _round_trip({facts["directory"]: result["round_trip"]}),
    ]


def comparison_tables(result: dict) -> list[Table | str]:
    """The result of `comparison.compare` as the tables to print."""
    tokenizers = result["tokenizers"]
    names = _short([each["directory"] for each in tokenizers])
    trips = [each["round_trip"] for each in tokenizers]
    return [
        _contests(result, names),
        _side_by_side(tokenizers, names),
        _round_trip(dict(zip(names, trips, strict=True))),
    ]


def _short(directories: list[str]) -> list[str]:
    """The last parts of some paths, or the paths where those are not distinct."""
    names = [Path(directory).resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else directories


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(escape(column), justify="right")
    return table


def _rows(result: dict) -> dict[str, dict]:
    """Sections of rows: all, each language, each domain; of many domains the largest."""
    domains = result["domains"]
    rows = {"all": result["total"]}
    rows |= {LANGUAGE_NAMES[name]: counts for name, counts in result["languages"].items()}
    return rows | {escape(name): domains[name] for name in list(domains)[:DOMAINS_SHOWN]}


def _add_sections(table: Table, result: dict, cells) -> Table:
    breaks = {0, len(result["languages"])}
    for index, (name, counts) in enumerate(_rows(result).items()):
        table.add_row(name, *cells(counts), end_section=index in breaks)
    if (more := len(result["domains"]) - DOMAINS_SHOWN) > 0:
        table.add_row(f"... {more:,} more (--json has all)")
    return table


def _sizes(result: dict) -> Table:
    def cells(counts: dict) -> list[str]:
        return [
            f"{counts['documents']:,}",
            f"{counts['bytes'] / 1e6:.2f}",
            f"{counts['tokens']:,}",
            _figure(counts["bytes_per_token"]),
            _figure(counts["characters_per_token"]),
            _figure(counts["tokens_per_document"], ",.1f"),
        ]

    columns = ("documents", "MB", "tokens", "bytes/token", "characters/token", "tokens/document")
    return _add_sections(_table("Size of the text in tokens", "", *columns), result, cells)


def _contests(result: dict, names: list[str]) -> Table:
    def cells(counts: dict) -> list[str]:
        tokens, best = counts["tokens"], min(counts["tokens"])
        return [
            f"{counts['bytes'] / 1e6:.2f}",
            *(f"[green]{count:,}[/green]" if count == best else f"{count:,}" for count in tokens),
            *(_figure(ratio and ratio - 1, "+.1%") for ratio in counts["ratio"][1:]),
            escape(names[tokens.index(best)] if counts["winner"] else "several"),
        ]

    tokens, against = ([f"{word}\n{name}" for name in names] for word in ("tokens", "against"))
    columns = ("MB", *tokens, *against[1:], "fewest")
    title = "Tokens of the same text; 'against': how many more or fewer the first has"
    return _add_sections(_table(title, "", *columns), result, cells)


def _figure(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _vocabulary_rows(tokenizer: dict) -> dict[str, str]:
    fertility, vocabulary = tokenizer["fertility"], tokenizer["vocabulary"]
    rows = {
        "tokens per English word": _figure(fertility["en"]),
        "tokens per Chinese character": _figure(fertility["zh"]),
        "pieces of characters in the text": _figure(tokenizer["pieces"], ".3%"),
        "single bytes of characters in the text": _figure(tokenizer["byte_tokens"], ".3%"),
        "tokens never used": _figure(1 - vocabulary["used"], ".1%"),
    }
    for times, share in vocabulary["used_fewer_than"].items():
        if times != "1":
            rows[f"tokens used fewer than {times} times"] = _figure(share, ".1%")
    for share, count in vocabulary["tokens_that_cover"].items():
        rows[f"tokens that make {float(share):.1%} of the text"] = f"{count:,}"
    return rows


def _vocabulary(result: dict) -> Table:
    table = _table("Vocabulary", "", "")
    for name, value in _vocabulary_rows(result).items():
        table.add_row(name, value)
    longest = " ".join(f"{each['token']!r}\u00a0{each['uses']:,}" for each in result["longest"])
    table.add_row("longest tokens, and how often", escape(longest))
    return table


def _side_by_side(tokenizers: list[dict], names: list[str]) -> Table:
    table = _table("Vocabulary", "", *names)
    table.add_row("tokens", *(f"{each['vocab_size']:,}" for each in tokenizers))
    rules = (each["pre_tokenizer"] or "[red]not llama.cpp's[/red]" for each in tokenizers)
    table.add_row("splitting rule", *rules)
    columns = [_vocabulary_rows(each) for each in tokenizers]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _kinds(result: dict) -> Table:
    table = _table("Tokens by kind", "kind", "in the vocabulary", "share of the text's tokens")
    for kind, counts in result["kinds"].items():
        table.add_row(kind, f"{counts['tokens']:,}", _figure(counts["text"], ".2%"))
    return table


def _round_trip(trips: dict[str, dict]) -> Table:
    headers = ("exact", "tokens")
    columns = [
        f"{header}\n{name}" if len(trips) > 1 else header for name in trips for header in headers
    ]
    table = _table("Round trip of texts that tokenizers lose", "texts", "bytes", *columns)
    for probe, first in next(iter(trips.values()))["probes"].items():
        cells = []
        for trip in trips.values():
            counts = trip["probes"][probe]
            exact, texts = counts["exact"], counts["texts"]
            colour = "green" if exact == texts else "red"
            cells += [f"[{colour}]{exact} of {texts}[/{colour}]", f"{counts['tokens']:,}"]
        table.add_row(probe, f"{first['bytes']:,}", *cells)
    lines = [
        f"{name}: {each['text']!r} came back as {each['back']!r}"
        for name, trip in trips.items()
        for each in trip["changed"]
    ]
    if lines:
        table.caption = escape("\n".join(lines[:10]))
    return table
