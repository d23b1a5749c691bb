"""The end of scripts/quickstart.sh: measure what each stage changed, and let the last model speak.

python -m minimind.quickstart runs/quickstart
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minimind.chat import load_for_generation
from minimind.checkpoints import read_stage, write_json
from minimind.errors import reports_user_errors
from minimind.evaluation import answer, read_questions, score

STAGES = ("pretrain", "sft", "lora", "dpo")


def summarise(run: Path) -> dict:
    """Measure the finished stages of a quickstart on its held-out rows; see `main` for what the names mean."""
    facts = read_questions([str(run / "data" / "sft_eval.jsonl")])
    skill = read_questions([str(run / "data" / "lora_eval.jsonl")])
    records = {name: read_stage(run / name) for name in STAGES}
    models = {name: load_for_generation(str(run / name)) for name in STAGES}
    on_facts = {name: score(*models[name], facts) for name in STAGES}
    on_skill = {name: score(*models[name], skill) for name in ("sft", "lora")}
    bits = {when: metrics["bits_per_byte"] for when, metrics in records["pretrain"]["metrics"].items()}
    return {
        "bits_per_byte": bits,
        "exact_match": {"before": on_facts["pretrain"]["exact_match"], "after": on_facts["sft"]["exact_match"]},
        "exact_match_by": on_facts["sft"]["exact_match_by"],
        "lora": {
            "new_skill": {"before": on_skill["sft"]["exact_match"], "after": on_skill["lora"]["exact_match"]},
            "kept": {"before": on_facts["sft"]["exact_match"], "after": on_facts["lora"]["exact_match"]},
        },
        "dpo": {
            "preferred": {"before": on_facts["sft"]["courteous"], "after": on_facts["dpo"]["courteous"]},
            "kept": {"before": on_facts["sft"]["exact_match"], "after": on_facts["dpo"]["exact_match"]},
        },
        "questions": {"facts": len(facts), "new_skill": len(skill)},
        "stages": {
            name: {key: record[key] for key in ("seconds", "tokens_seen", "tokens_per_second")}
            for name, record in records.items()
        },
        "chat": sample_chat(*models["dpo"], facts),
    }


def sample_chat(model, tokenizer, questions: list[dict]) -> list[dict]:
    """One conversation over several turns: held-out questions in both languages, and a greeting."""
    asked = [next(q["messages"][-2]["content"] for q in questions if q["language"] == name) for name in ("en", "zh")]
    messages = []
    for text in ("Who are you?", *asked):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, [messages])[0]})
    return messages


def show(summary: dict, console: Console) -> None:
    """Print the summary as one table, and the conversation."""
    table = Table(title="quickstart: what each stage changed, measured on rows no stage was trained on")
    for column in ("stage", "measure", "before", "after", "seconds", "tokens/s"):
        table.add_column(column, justify="left" if column in ("stage", "measure") else "right")

    def row(stage: str, measure: str, values: dict, form: str, timed: bool = True) -> None:
        timing = summary["stages"][stage]
        times = [f"{timing['seconds']:.0f}", f"{timing['tokens_per_second']:,.0f}"] if timed else ["", ""]
        shown = [format(values[when], form) for when in ("before", "after")]
        table.add_row(stage if timed else "", measure, *shown, *times)

    row("pretrain", "bits per byte", summary["bits_per_byte"], ".3f")
    row("sft", "held-out questions right", summary["exact_match"], ".1%")
    row("lora", "new skill right", summary["lora"]["new_skill"], ".1%")
    row("lora", "held-out questions right", summary["lora"]["kept"], ".1%", timed=False)
    row("dpo", "courteous answers", summary["dpo"]["preferred"], ".1%")
    row("dpo", "held-out questions right", summary["dpo"]["kept"], ".1%", timed=False)
    console.print(table)
    for message in summary["chat"]:
        mark = ">" if message["role"] == "user" else " "
        console.print(f"{mark} {message['content']}", markup=False)


@reports_user_errors
def main() -> None:
    """Write summary.json into the run's directory and show it."""
    run = Path(sys.argv[1])
    summary = summarise(run)
    write_json(run / "summary.json", summary)
    show(summary, Console(highlight=False))


if __name__ == "__main__":
    main()
