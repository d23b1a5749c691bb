"""What would go wrong in a run, found before it: `minimind doctor RECIPE`, and the cheap checks at every start."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer

from minimind.doctor.cases import read_case, read_deepspeed
from minimind.doctor.checks import CHECKS, SEVERITIES, Case, Finding
from minimind.errors import UserError
from minimind.training.launch import is_main_process


def examine(case: Case, quick: bool = False) -> list[Finding]:
    """All findings of a case, in the order of the checks."""
    findings = [each(case) for each in CHECKS if case.args is not None or not each.needs if each.quick or not quick]
    if case.missing:
        found = f"not there: {', '.join(case.missing)}"
        fix = "Right where an earlier step is still to make it; what depends on it was not checked."
        findings.insert(0, Finding("inputs", "warning", found, "all that the recipe reads", fix))
    return findings


def doctor(recipe: str, options: Sequence[str] = (), stage: str | None = None, world: int = 1, quick=False) -> dict:
    """The report of `minimind doctor`: {"recipe", "stage", "errors", "warnings", "findings": [...]}.

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
    """The findings as a table, what is wrong first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"error": "bold red", "warning": "yellow", "ok": "green", "skipped": "dim"}
    console = Console(highlight=False)
    table = Table("check", "", "found", "expected", "fix", title=f"{report['recipe']} ({report['stage'] or '?'})")
    for finding in sorted(report["findings"], key=lambda finding: SEVERITIES.index(finding["severity"])):
        severity = finding["severity"]
        table.add_row(
            finding["name"],
            f"[{colours[severity]}]{severity}[/]",
            *(escape(finding[key]) for key in ("found", "expected", "fix")),
        )
    console.print(table)
    counts = (f"{report[name]} {name if report[name] != 1 else name[:-1]}" for name in ("errors", "warnings"))
    console.print(", ".join(counts))


def examine_run(stage: str, trainer: Trainer, facts: dict, parent: Path | None) -> None:
    """The quick checks of a run about to begin: warnings are printed, errors raise UserError unless
    `--on_findings warn`."""
    args = trainer.args
    deepspeed = args.deepspeed
    if isinstance(deepspeed, str):
        deepspeed = read_deepspeed(deepspeed)
    case = Case(
        stage,
        args=args,
        model=trainer.model,
        tokenizer=trainer.processing_class,
        train=trainer.train_dataset if hasattr(trainer.train_dataset, "__len__") else None,
        facts=facts,
        collator=trainer.data_collator,
        deepspeed=deepspeed or None,
        parent=parent,
        world=args.world_size,
    )
    findings = examine(case, quick=True)
    errors = [finding for finding in findings if finding.severity == "error"]
    if is_main_process():
        for finding in findings:
            if finding.severity == "warning" or (finding in errors and args.on_findings == "warn"):
                print(f"{finding.severity}: {finding.name}: {_sentence(finding)}", flush=True)
    if errors and args.on_findings == "error":
        listed = "".join(f"\n  {finding.name}: {_sentence(finding)}" for finding in errors)
        raise UserError(f"this run would go wrong:{listed}\nTo train it still: --on_findings warn.")


def _sentence(finding: Finding) -> str:
    expected = f", expected {finding.expected}" if finding.expected else ""
    return f"{finding.found}{expected}. {finding.fix}"
