"""Checks of the rows that are trained on and held out."""

import os

from minimind.doctor.registry import Case, check
from minimind.inspection import Inspection, data_paths
from minimind.stages import inspect_training_rows

FEW_ENDS = 0.2  # of the end tokens that there should be
OVERLAP = 0.5  # of the held-out rows also trained on: the held-out loss measures nothing


@check("tokenizer", "train", "facts")
def document_ends(case: Case) -> tuple:
    if not case.spec.reads_documents:
        return "ok", "conversations end by their template"
    facts, rows = case.facts["train"], case.sampled_ids()
    ends = sum(int((row == case.tokenizer.eos_token_id).sum()) for row in rows)
    tokens = sum(map(len, rows))
    expected = tokens * facts["documents"] / max(facts["tokens"], 1)
    found = f"{ends:,} end tokens in {tokens:,} tokens of the rows"
    if expected < 5 or ends >= FEW_ENDS * expected:
        return "ok", found
    fix = (
        "Pack with the tokenizer that the run has ('minimind prepare'), or the model learns to run"
        " on."
    )
    after = f"about {expected:,.0f}: {case.tokenizer.eos_token!r} after each document"
    return "error", found, after, fix


@check("facts")
def held_out_files(case: Case) -> tuple:
    train, held_out = case.facts["train"], case.facts["eval"]
    files = [{os.path.realpath(file) for file in part["files"]} for part in (train, held_out)]
    both = sorted(files[0] & files[1])
    if both or (train.get("hash") and train["hash"] == held_out.get("hash")):
        found = f"{', '.join(both) or 'the same content'} is trained on and held out"
        fix = "Leave eval_files out: a share of the rows is then held out, copies included."
        return "error", found, "held-out rows that are not trained on", fix
    return "ok", "the files differ" if files[1] else "rows are held out by content"


@check("rows", quick=False)
def data_findings(case: Case) -> tuple:
    report = inspection_of(case).report
    findings = [f for f in report["findings"] if f["name"] != "held_out_rows_trained"]
    files = " ".join(data_paths(case.data_args.train_files))
    for severity in ("error", "warning"):
        texts = [f"{f['name']} ({f['text']})" for f in findings if f["severity"] == severity]
        if texts:
            fix = f"See which rows and why: minimind inspect {files} --stage {case.stage}"
            return severity, "; ".join(texts), "", fix
    return "ok", f"{report['rows']:,} rows, nothing wrong"


def inspection_of(case: Case) -> Inspection:
    """The report of `minimind inspect` on the rows of a case, made once."""
    if case.inspection is None:
        case.inspection = inspect_training_rows(
            case.spec, case.rows, case.tokenizer, case.data_args, case.chat_args
        )
    return case.inspection


@check("rows", quick=False)
def held_out_rows(case: Case) -> tuple:
    if not case.data_args.eval_files:
        return "ok", "rows are held out by content, copies beside each other"
    findings = inspection_of(case).report["findings"]
    both = next((f for f in findings if f["name"] == "held_out_rows_trained"), None)
    if both is None:
        return "ok", "no held-out row is trained on"
    facts = case.facts["eval"]
    held_out = max(facts.get("documents") or facts.get("rows") or both["count"], 1)
    severity = "error" if both["count"] > OVERLAP * held_out else "warning"
    fix = f"{both['advice']} First: {', '.join(both['places'][:2])}"
    return severity, both["text"], "none", fix
