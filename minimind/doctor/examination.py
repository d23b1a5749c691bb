"""All checks in their order, and their findings on a recipe or on a run that is about to begin."""

import dataclasses
from collections.abc import Sequence

from transformers import Trainer

from minimind.common.errors import UserError
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process
from minimind.common.recipes import read_deepspeed
from minimind.common.severities import SEVERITIES
from minimind.doctor import budget, data, deepspeed, model, precision, rates, recipe, speed
from minimind.doctor.cases import read_case
from minimind.doctor.registry import Case, Check, Finding
from minimind.training.run import Stage

CHECKS: tuple[Check, ...] = (
    deepspeed.deepspeed_optimizer,
    deepspeed.deepspeed_scheduler,
    deepspeed.deepspeed_batch,
    deepspeed.deepspeed_precision,
    deepspeed.deepspeed_clipping,
    deepspeed.deepspeed_auto,
    deepspeed.deprecated_keys,
    precision.fp16_scaling,
    precision.bf16_hardware,
    precision.accumulation,
    data.document_ends,
    model.vocabulary,
    model.tied_weights,
    model.untrained_tokens,
    rates.learning_rate,
    rates.warmup,
    recipe.save_steps,
    recipe.epochs,
    data.held_out_files,
    recipe.disk_space,
    recipe.tracker,
    data.data_findings,
    data.held_out_rows,
    speed.dataloader_speed,
    rates.updates,
    budget.tokens_per_parameter,
    budget.memory,
    speed.run_time,
)


def examine(case: Case, quick: bool = False) -> list[Finding]:
    """All findings of a case, in the order of the checks."""
    findings = [check(case) for check in CHECKS if check.quick or not quick]
    if case.missing:
        found = "; ".join([f"not there: {', '.join(case.missing)}", *case.notes])
        fix = (
            "Correct if an earlier step is still to write it; a run that starts now would be"
            " refused."
        )
        findings.insert(0, Finding("inputs", "warning", found, fix=fix))
    return findings


def doctor(
    recipe: str, options: Sequence[str] = (), stage: str | None = None, world: int = 1, quick=False
) -> dict:
    """The report of `minimind doctor`: {"recipe", "stage", "errors", "warnings", "findings":
    [...]}.

    A mistake for which a run would be refused is among the findings, as "start".
    """
    try:
        case = read_case(recipe, options, stage, world)
        findings, stage = examine(case, quick), case.stage
    except UserError as error:
        fix = "Fix this first: nothing else could be checked."
        findings = [Finding("start", "error", str(error), "a run that begins", fix)]
    counts = {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}
    return {
        "recipe": str(recipe),
        "stage": stage,
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def examine_run(stage: Stage, trainer: Trainer) -> None:
    """Make the quick checks of a run that is about to begin: warnings are printed, errors raise
    UserError unless `--on_findings warn`."""
    args, train = trainer.args, trainer.train_dataset
    case = Case(
        stage.spec.family,
        args=args,
        model=trainer.model,
        tokenizer=trainer.processing_class,
        train=train if hasattr(train, "__len__") else None,
        facts=stage.facts,
        collator=trainer.data_collator,
        deepspeed=read_deepspeed(args.deepspeed) if args.deepspeed else None,
        parent=stage.parent,
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
