"""What scripts/quickstart.sh runs: what this machine is and how long it will take; its stages; what
each of them changed, and the last model's own words.

    python -m minimind.quickstart runs/quickstart < STAGES

A line of STAGES is the name of a stage, the file that it writes last, and its command.
"""

import os
import platform
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM

from minimind import MiniMindConfig
from minimind.common.errors import reports_user_errors
from minimind.common.files import read_json, require_fields, write_json
from minimind.common.forking import run_forked
from minimind.common.language import say, translated
from minimind.common.launch import bf16_is_fast, prepare_launch
from minimind.common.recipes import read_recipe
from minimind.common.terminal import Terminal
from minimind.costs.slowness import seen_reasons, usage
from minimind.evaluation import answer, read_questions, score
from minimind.generation import load_for_generation
from minimind.sharing.facts import longest_row
from minimind.training.arguments import PretrainConfig
from minimind.training.model_arguments import load_model_config_file
from minimind.training.optimizers import build_optimizer

STAGES = ("pretrain", "sft", "lora", "dpo", "reward")
CHAT_STAGES = STAGES[:-1]  # whose models answer questions
VOCABULARY = 1200  # as the script trains it
# Elsewhere the system's own libraries do not survive a fork, and each stage loads them itself
FORKS = sys.platform == "linux"
PROCESSES = 8


def processor() -> str:
    """The name of the first GPU, or of the processor if there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def kind_of_machine() -> str:
    """Processor, cores, memory and precision in one sentence."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    kind = "without bf16: training computes in fp32"
    if bf16_is_fast():
        kind = "with bf16: training computes in bf16"
    return f"{processor()}, {cores} cores, {memory:.0f} GiB of memory, {kind}"


def seconds_of_a_step(recipe: dict, seconds: float = 1.0) -> float:
    """The fastest of the training steps that fit into some seconds, at least two after the first.

    The first step does not count: it warms up.
    """
    args = PretrainConfig(optim=recipe["optim"], report_to=[])
    config = MiniMindConfig(**load_model_config_file(recipe["model_config"]), vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_config(config).to(args.device)
    optimizer = build_optimizer(model, args)
    shape = (recipe["per_device_train_batch_size"], recipe["block_size"])
    ids = torch.randint(3, VOCABULARY, shape, device=args.device)
    times: list[float] = []
    while len(times) < 3 or sum(times[1:]) < seconds:
        began = time.perf_counter()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return min(times[1:])


def steps_in_all(recipes: dict[str, dict]) -> float:
    """All stages' tokens in steps of the pretraining; a pair counts as two rows."""
    tokens = {}
    for name, recipe in recipes.items():
        rows = recipe["max_steps"] * recipe["per_device_train_batch_size"]
        tokens[name] = rows * longest_row(recipe) * (2 if name in ("dpo", "reward") else 1)
    return sum(tokens.values()) / tokens["pretrain"] * recipes["pretrain"]["max_steps"]


def introduce(started: float) -> None:
    """Print what this machine is, and about how long the script will take; `started`: when the
    script's process began, which has loaded the libraries since."""
    loading = time.time() - started
    prepare_launch(uses_deepspeed=False)
    recipes = {name: read_recipe(Path(f"configs/{name}/quickstart.yaml")) for name in STAGES}
    before = usage()
    step, steps = seconds_of_a_step(recipes["pretrain"]), steps_in_all(recipes)
    minutes = ((1 if FORKS else PROCESSES) * loading + steps * step) / 60
    say(f"This machine: {kind_of_machine()}.")
    say(
        f"A pretraining step takes {step:.2g} s just now, and all stages are worth {steps:.0f} of"
        f" them: about {max(1, round(minutes))} min in all."
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for reason in seen_reasons(before, usage(), device, "fp32"):
        say(f"It could be faster: {reason}.")


def run_stages(lines: Sequence[str]) -> None:
    """Run the command of each line whose last file is not there; ends as the first that fails."""
    for line in lines:
        name, file, *words = shlex.split(line)
        if Path(file).exists():
            print(f"== {name}: finished before ({file})", flush=True)
            continue
        print(f"== {name}: {shlex.join(words)}", flush=True)
        if code := run_command(words):
            sys.exit(code if code > 0 else 128 - code)


def run_command(words: list[str]) -> int:
    """Run `minimind OPTION...` or `python FILE OPTION...`; returns the exit code."""
    if not FORKS:
        module = ["-m", "minimind.cli"] if words[0] == "minimind" else []
        return subprocess.run([sys.executable, *module, *words[1:]]).returncode
    return run_forked(become, words)


def become(words: list[str]) -> None:
    """Do in this process what a command of these words does."""
    if words[0] == "minimind":
        sys.argv = words
        runpy.run_module("minimind.cli", run_name="__main__")
    else:
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")


def read_measured(stage: Path) -> dict:
    """The record of a finished stage, with what the summary shows of it; raises UserError."""
    number, remedy = int | float, "Delete the directory and run scripts/quickstart.sh again."
    fields = {"seconds": number, "tokens_seen": int, "tokens_per_second": number, "metrics": dict}
    record = read_json(stage / "stage.json", remedy, fields=fields)
    measures = {"pretrain": "bits_per_byte", "reward": "accuracy"}
    if measure := measures.get(stage.name):
        for when in ("before", "after"):
            where = f"{stage / 'stage.json'}: the metrics"
            require_fields(where, record["metrics"], {when: dict}, remedy)
            require_fields(f"{where} {when}", record["metrics"][when], {measure: number}, remedy)
    return record


def summarise(run: Path) -> dict:
    """Measure the finished stages of a quickstart on its held-out rows."""
    facts = read_questions([str(run / "data" / "sft_eval.jsonl")])
    skill = read_questions([str(run / "data" / "lora_eval.jsonl")])
    records = {name: read_measured(run / name) for name in STAGES}
    models = {name: load_for_generation(str(run / name)) for name in CHAT_STAGES}
    on_facts = {name: score(*models[name], facts) for name in CHAT_STAGES}
    on_skill = {name: score(*models[name], skill) for name in ("sft", "lora")}

    def change(scores: dict, before: str, after: str, measure: str = "exact_match") -> dict:
        return {"before": scores[before][measure], "after": scores[after][measure]}

    timing = ("seconds", "tokens_seen", "tokens_per_second")
    return {
        "bits_per_byte": change(records["pretrain"]["metrics"], "before", "after", "bits_per_byte"),
        "exact_match": change(on_facts, "pretrain", "sft"),
        "exact_match_by": on_facts["sft"]["exact_match_by"],
        "lora": {
            "new_skill": change(on_skill, "sft", "lora"),
            "kept": change(on_facts, "sft", "lora"),
        },
        "dpo": {
            "preferred": change(on_facts, "sft", "dpo", "courteous"),
            "kept": change(on_facts, "sft", "dpo"),
        },
        "reward": change(records["reward"]["metrics"], "before", "after", "accuracy"),
        "questions": {"facts": len(facts), "new_skill": len(skill)},
        "stages": {name: {key: record[key] for key in timing} for name, record in records.items()},
        "chat": sample_chat(*models["dpo"], facts),
    }


def sample_chat(model, tokenizer, questions: list[dict]) -> list[dict]:
    """One conversation over several turns: a greeting, and held-out questions in both languages."""
    texts = ["Who are you?"]
    for language in ("en", "zh"):
        question = next(q for q in questions if q["language"] == language)
        texts.append(question["messages"][-2]["content"])
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer(model, tokenizer, [messages])[0]})
    return messages


def show(summary: dict, console: Terminal) -> None:
    """Print the summary as one table, and the conversation."""
    title = "quickstart: what each stage changed, measured on rows no stage was trained on"
    table = Table(title=translated(title))
    for column in ("stage", "measure", "before", "after", "seconds", "tokens/s"):
        justify = "left" if column in ("stage", "measure") else "right"
        table.add_column(translated(column), justify=justify)

    def row(stage: str, measure: str, values: dict, form: str, first: bool = True) -> None:
        timing = summary["stages"][stage]
        times = [f"{timing['seconds']:.0f}", f"{timing['tokens_per_second']:,.0f}"]
        cells = [translated(measure), *(format(values[when], form) for when in ("before", "after"))]
        table.add_row(*((stage, *cells, *times) if first else ("", *cells, "", "")))

    row("pretrain", "bits per byte", summary["bits_per_byte"], ".3f")
    row("sft", "held-out questions right", summary["exact_match"], ".1%")
    row("lora", "new skill right", summary["lora"]["new_skill"], ".1%")
    row("lora", "held-out questions right", summary["lora"]["kept"], ".1%", first=False)
    row("dpo", "courteous answers", summary["dpo"]["preferred"], ".1%")
    row("dpo", "held-out questions right", summary["dpo"]["kept"], ".1%", first=False)
    row("reward", "held-out pairs right", summary["reward"], ".1%")
    console.print(table)
    for message in summary["chat"]:
        mark = ">" if message["role"] == "user" else " "
        console.print(f"{mark} {message['content']}", markup=False)


@reports_user_errors
def main() -> None:
    """Run the stages of the lines on stdin, then write summary.json beside them and show it."""
    run, lines = Path(sys.argv[1]), sys.stdin.read().splitlines()
    started = psutil.Process().create_time()
    if FORKS:
        # What the scripts import, once for all; under this name their main() does not run
        for script in {words[3] for words in map(str.split, lines) if words[2] == "python"}:
            runpy.run_path(script)
        run_forked(introduce, started)
    else:
        introduce(started)
    run_stages(lines)
    print("== evaluation", flush=True)
    summary = summarise(run)
    write_json(run / "summary.json", summary)
    show(summary, Terminal())


if __name__ == "__main__":
    main()
