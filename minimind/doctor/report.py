"""The report of the doctor in the terminal."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from minimind.common.language import translated
from minimind.common.severities import COLOURS, SEVERITIES
from minimind.common.terminal import Terminal

NAMED = 3  # checks that were skipped for one reason; of more only the number is printed


def print_report(report: dict) -> None:
    """Print the findings, the worst first, and in one line what was not checked."""
    console = Terminal()
    console.print(f"[bold]{escape(report['recipe'])}[/] ({report['stage'] or '?'})")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    findings = [finding for finding in report["findings"] if finding["severity"] != "skipped"]
    for finding in sorted(findings, key=lambda f: SEVERITIES.index(f["severity"])):
        severity, expected = finding["severity"], finding["expected"]
        lines = [finding["found"], expected and f"expected: {expected}", finding["fix"]]
        text = escape("\n".join(translated(line) for line in lines if line))
        table.add_row(f"[{COLOURS[severity]}]{translated(severity)}[/]", finding["name"], text)
    console.print(table)
    if skipped := not_checked(report["findings"]):
        console.print(translated(f"not checked: {escape(skipped)}"))
    counts = (
        f"{report[name]} {translated(name if report[name] != 1 else name[:-1])}"
        for name in ("errors", "warnings")
    )
    console.print(", ".join(counts))


def not_checked(findings: Sequence[dict]) -> str:
    """The checks that were skipped, by their reason."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding["severity"] == "skipped":
            reasons.setdefault(finding["found"], []).append(finding["name"])
    parts = []
    for reason, names in reasons.items():
        listed = ", ".join(names) if len(names) <= NAMED else f"{len(names)} checks"
        parts.append(f"{translated(listed)} ({translated(reason)})")
    return "; ".join(parts)
