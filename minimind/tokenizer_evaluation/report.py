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
    """Raises UserError where the report cannot be written to `save`."""
    if save and Path(save).suffix not in EXPORTS:
        raise UserError(f"--save {save}: expected a name that ends in {', '.join(EXPORTS)}.")
    if save and not Path(save).parent.is_dir():
        raise UserError(f"--save {save}: the directory {Path(save).parent} does not exist.")
    if save:
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
    """The result of `judging.evaluate` -> what is printed."""
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
    """The result of `judging.compare` -> what is printed."""
    judged = result["tokenizers"]
    names = _short([one["directory"] for one in judged])
    return [
        _contests(result, names),
        _side_by_side(judged, names),
        _round_trip({name: one["round_trip"] for name, one in zip(names, judged, strict=True)}),
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
    rows |= {LANGUAGE_NAMES[name]: found for name, found in result["languages"].items()}
    return rows | {escape(name): domains[name] for name in list(domains)[:DOMAINS_SHOWN]}


def _add_sections(table: Table, result: dict, cells) -> Table:
    breaks = {0, len(result["languages"])}
    for index, (name, found) in enumerate(_rows(result).items()):
        table.add_row(name, *cells(found), end_section=index in breaks)
    if (more := len(result["domains"]) - DOMAINS_SHOWN) > 0:
        table.add_row(f"... {more:,} more (--json has all)")
    return table


def _sizes(result: dict) -> Table:
    columns = ("documents", "MB", "tokens", "bytes/token", "characters/token", "tokens/document")
    return _add_sections(
        _table("Size of the text in tokens", "", *columns),
        result,
        lambda found: (
            f"{found['documents']:,}",
            f"{found['bytes'] / 1e6:.2f}",
            f"{found['tokens']:,}",
            _figure(found["bytes_per_token"]),
            _figure(found["characters_per_token"]),
            _figure(found["tokens_per_document"], ",.1f"),
        ),
    )


def _contests(result: dict, names: list[str]) -> Table:
    columns = [
        "MB",
        *(f"tokens\n{name}" for name in names),
        *(f"against\n{name}" for name in names[1:]),
        "fewest",
    ]

    def cells(found: dict) -> list[str]:
        best = min(found["tokens"])
        tokens = [
            f"[green]{count:,}[/green]" if count == best else f"{count:,}"
            for count in found["tokens"]
        ]
        return [
            f"{found['bytes'] / 1e6:.2f}",
            *tokens,
            *(_figure(ratio and ratio - 1, "+.1%") for ratio in found["ratio"][1:]),
            escape(names[found["tokens"].index(best)] if found["winner"] else "several"),
        ]

    title = "Tokens of the same text; 'against': how many more or fewer the first has"
    return _add_sections(_table(title, "", *columns), result, cells)


def _figure(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _judgement_rows(judged: dict) -> dict[str, str]:
    fertility, vocabulary = judged["fertility"], judged["vocabulary"]
    cover = vocabulary["tokens_that_cover"]
    return {
        "tokens per English word": _figure(fertility["en"]),
        "tokens per Chinese character": _figure(fertility["zh"]),
        "pieces of characters in the text": _figure(judged["pieces"], ".3%"),
        "single bytes of characters in the text": _figure(judged["byte_tokens"], ".3%"),
        "tokens never used": _figure(1 - vocabulary["used"], ".1%"),
        **{
            f"tokens used fewer than {times} times": _figure(share, ".1%")
            for times, share in vocabulary["used_fewer_than"].items()
            if times != "1"
        },
        **{
            f"tokens that make {float(share):.1%} of the text": f"{count:,}"
            for share, count in cover.items()
        },
    }


def _vocabulary(result: dict) -> Table:
    table = _table("Vocabulary", "", "")
    for name, value in _judgement_rows(result).items():
        table.add_row(name, value)
    table.add_row(
        "longest tokens, and how often",
        escape(" ".join(_used(found) for found in result["longest"])),
    )
    return table


def _side_by_side(judged: list[dict], names: list[str]) -> Table:
    table = _table("Vocabulary", "", *names)
    table.add_row("tokens", *(f"{one['vocab_size']:,}" for one in judged))
    table.add_row(
        "splitting rule", *(one["pre_tokenizer"] or "[red]not llama.cpp's[/red]" for one in judged)
    )
    for name, values in zip(
        _judgement_rows(judged[0]),
        zip(*(_judgement_rows(one).values() for one in judged), strict=True),
        strict=True,
    ):
        table.add_row(name, *values)
    return table


def _used(found: dict) -> str:
    return f"{found['token']!r}\u00a0{found['uses']:,}"


def _kinds(result: dict) -> Table:
    table = _table("Tokens by kind", "kind", "in the vocabulary", "share of the text's tokens")
    for kind, found in result["kinds"].items():
        table.add_row(kind, f"{found['tokens']:,}", _figure(found["text"], ".2%"))
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
            found = trip["probes"][probe]
            mark = "green" if found["exact"] == found["texts"] else "red"
            cells += [
                f"[{mark}]{found['exact']} of {found['texts']}[/{mark}]",
                f"{found['tokens']:,}",
            ]
        table.add_row(probe, f"{first['bytes']:,}", *cells)
    lines = [
        f"{name}: {one['text']!r} came back as {one['back']!r}"
        for name in trips
        for one in trips[name]["changed"]
    ]
    if lines:
        table.caption = escape("\n".join(lines[:10]))
    return table
