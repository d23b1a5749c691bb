"""What would go wrong in a run, found before it: `minimind doctor RECIPE`, and the cheap checks at
every start."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer

from minimind.common.errors import UserError
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process
from minimind.common.recipes import read_deepspeed
from minimind.doctor import budget  # noqa: F401 (registers its checks)
from minimind.doctor.cases import read_case
from minimind.doctor.checks import CHECKS, SEVERITIES, Case, Finding

NAMED = 3  # checks that were left out for the same reason; of more the number


def examine(case: Case, quick: bool = False) -> list[Finding]:
    """All findings of a case, in the order of the checks."""
    findings = [
        each(case)
        for each in CHECKS
        if case.args is not None or not each.needs
        if each.quick or not quick
    ]
    if case.missing:
        found = "; ".join([f"not there: {', '.join(case.missing)}", *case.notes])
        fix = (
            "Right where an earlier step is still to make it; a run that starts now would be"
            " refused."
        )
        findings.insert(0, Finding("inputs", "warning", found, fix=fix))
    return findings


def doctor(
    recipe: str, options: Sequence[str] = (), stage: str | None = None, world: int = 1, quick=False
) -> dict:
    """The report of `minimind doctor`: {"recipe", "stage", "errors", "warnings", "findings":
    [...]}.

    What a run would be refused for stands among the findings, as "start".
    """
    try:
        case = read_case(recipe, options, stage, world)
        findings, stage = examine(case, quick), case.stage
    except UserError as error:
        fix = "Mend this first: nothing else could be checked."
        findings = [Finding("start", "error", str(error), "a run that begins", fix)]
    counts = {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}
    return {
        "recipe": str(recipe),
        "stage": stage,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def print_report(report: dict) -> None:
    """The findings, what is wrong first, and in one line what was not checked."""
    from rich.markup import escape
    from rich.table import Table

    from minimind.common.terminal import Terminal

    colours = {"error": "bold red", "warning": "yellow", "ok": "green"}
    console = Terminal()
    console.print(f"[bold]{escape(report['recipe'])}[/] ({report['stage'] or '?'})")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in sorted(
        report["findings"], key=lambda finding: SEVERITIES.index(finding["severity"])
    ):
        severity = finding["severity"]
        if severity != "skipped":
            lines = [
                finding["found"],
                finding["expected"] and f"expected: {finding['expected']}",
                finding["fix"],
            ]
            words = escape("\n".join(translated(line) for line in lines if line))
            table.add_row(f"[{colours[severity]}]{translated(severity)}[/]", finding["name"], words)
    console.print(table)
    if left_out := not_checked(report["findings"]):
        console.print(translated(f"not checked: {escape(left_out)}"))
    counts = (
        f"{report[name]} {translated(name if report[name] != 1 else name[:-1])}"
        for name in ("errors", "warnings")
    )
    console.print(", ".join(counts))


def not_checked(findings: Sequence[dict]) -> str:
    """The checks that were left out, by their reason; of many the number."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding["severity"] == "skipped":
            reasons.setdefault(finding["found"], []).append(finding["name"])
    named = {
        why: ", ".join(names) if len(names) <= NAMED else f"{len(names)} checks"
        for why, names in reasons.items()
    }
    return "; ".join(
        f"{translated(names)} ({translated(reason)})" for reason, names in named.items()
    )


def examine_run(stage: str, trainer: Trainer, facts: dict, parent: Path | None) -> None:
    """The quick checks of a run about to begin: warnings are printed, errors raise UserError unless
    `--on_findings warn`."""
    args = trainer.args
    case = Case(
        stage,
        args=args,
        model=trainer.model,
        tokenizer=trainer.processing_class,
        train=trainer.train_dataset if hasattr(trainer.train_dataset, "__len__") else None,
        facts=facts,
        collator=trainer.data_collator,
        deepspeed=read_deepspeed(args.deepspeed) if args.deepspeed else None,
        parent=parent,
        world=args.world_size,
    )
    findings = examine(case, quick=True)
    errors = [finding for finding in findings if finding.severity == "error"]
    if is_main_process():
        for finding in findings:
            if finding.severity == "warning" or (finding in errors and args.on_findings == "warn"):
                say(f"{finding.severity}: {finding.name}: {_sentence(finding)}")
    if errors and args.on_findings == "error":
        listed = "".join(f"\n  {finding.name}: {_sentence(finding)}" for finding in errors)
        raise UserError(f"this run would go wrong:{listed}\nTo train it still: --on_findings warn.")


def _sentence(finding: Finding) -> str:
    form = "{found}, expected {expected}. {fix}" if finding.expected else "{found}. {fix}"
    parts = {name: translated(getattr(finding, name)) for name in ("found", "expected", "fix")}
    return translated(form).format(**parts)
