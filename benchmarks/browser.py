"""The page of `minimind export --format web` in a headless Chromium on one core: its size, the time
to load it, the tokens per second, and whether its greedy tokens are those of transformers.

    python benchmarks/browser.py runs/quickstart/sft [--dtypes q8_0 float16 float32]
        [--new_tokens 40] [--speed_tokens 128] [--rounds 3] [--core 1] [--json]

transformers computes in fp32 with the weights that the page holds, such as those that q8_0 gives
back. Where a token differs, the difference between the log-probabilities of both tokens is printed:
llama.cpp also rounds activations, in q8_0 to 8 bits.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import Browser, open_browser
from pipeline import wait_until

from minimind.export import DTYPES, export, with_weights
from minimind.export.gguf import rounded
from minimind.stage_directory import load_model

QUESTIONS = (
    "Once upon a time there was",
    "What is 17 + 25?",
    "Please introduce yourself in one sentence.",
    "从前有座山，山里有座庙，",
    "中国的首都是",
    "你好！请用一句话介绍你自己。",
)
# The tokens after a question, past the end of the reply, and the seconds from the first to the last
WRITE = """(async () => {
    turns = [{ user: %s, assistant: "" }];
    const [ends, special] = [facts.ends, facts.special], tokens = [], times = [];
    const ids = await prompt(facts.window >> 1);
    const write = (text, token) => { times.push(performance.now()); tokens.push(token); };
    facts.ends = facts.special = [];
    await generate(ids, %d, 0, { aborted: false }, write);
    [facts.ends, facts.special, turns] = [ends, special, []];
    return { ids, tokens, seconds: (times.at(-1) - times[0]) / 1000 };
})()"""


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Let processes that start meanwhile run on one core only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def write(browser: Browser, question: str, count: int) -> dict:
    """`count` greedy tokens of the page after a question."""
    return browser.evaluate(WRITE % (json.dumps(question), count))


def speed(browser: Browser, question: str, count: int) -> float:
    """Tokens per second of a text, the reading of its prompt aside."""
    return (count - 1) / write(browser, question, count)["seconds"]


@torch.no_grad()
def compare(model: PreTrainedModel, ids: list[int], tokens: list[int]) -> dict:
    """How many of the tokens after a prompt are those of transformers, and at the first other one
    how much likelier transformers finds its own."""
    prompt = torch.tensor([ids])
    mask, length = torch.ones_like(prompt), len(tokens)
    own = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=length)[
        0, len(ids) :
    ].tolist()
    pairs = enumerate(zip(own, tokens, strict=True))
    same = next((place for place, (a, b) in pairs if a != b), length)
    if same == length:
        return {"tokens": length, "same": same}
    logits = model(torch.tensor([[*ids, *own[:same]]]), use_cache=False).logits[0, -1].float()
    apart = (logits[own[same]] - logits[tokens[same]]).item()
    return {"tokens": length, "same": same, "nats_apart": apart}


def measure(directory: str, source: PreTrainedModel, dtype: str, args: argparse.Namespace) -> dict:
    """The figures of the page of one data type."""
    with tempfile.TemporaryDirectory() as root, on_core(args.core):
        page = Path(root) / "page"
        export(directory, page, "web", dtype)
        file = page / "index.html"
        with open_browser(f"{root}/profile") as browser:
            began = time.perf_counter()
            browser.open(file.as_uri())
            wait_until(
                lambda: browser.evaluate("typeof state === 'object' && state[0] !== 'loading'")
            )
            load = time.perf_counter() - began
            first = speed(browser, QUESTIONS[0], args.new_tokens)
            speeds = [
                speed(browser, QUESTIONS[number % len(QUESTIONS)], args.speed_tokens)
                for number in range(args.rounds)
            ]
            written = [write(browser, question, args.new_tokens) for question in QUESTIONS]
        size = file.stat().st_size
    reference = with_weights(source, lambda name, weight: rounded(name, weight, dtype))
    reference.generation_config.eos_token_id = None  # texts go on past the end of a reply
    compared = [compare(reference, each["ids"], each["tokens"]) for each in written]
    return {
        "dtype": dtype,
        "page_bytes": size,
        "load_seconds": round(load, 2),
        "first_tokens_per_second": round(first, 1),
        "tokens_per_second": round(statistics.median(speeds), 1),
        "slowest": round(min(speeds), 1),
        "fastest": round(max(speeds), 1),
        "prompts": compared,
    }


def show(row: dict) -> None:
    """Print a row of the table, and where tokens differ."""
    compared = row["prompts"]
    prompts = sum(each["same"] == each["tokens"] for each in compared)
    tokens = sum(each["same"] for each in compared)
    print(
        f"{row['dtype']:9} {row['page_bytes'] / 1e6:6.1f} MB {row['load_seconds']:6.1f} s"
        f" {row['first_tokens_per_second']:8.0f} {row['tokens_per_second']:6.0f}"
        f" ({row['slowest']:.0f} to {row['fastest']:.0f})   {prompts} of {len(compared)} prompts,"
        f" {tokens} of {sum(each['tokens'] for each in compared)} tokens",
        flush=True,
    )
    for question, each in zip(QUESTIONS, compared, strict=True):
        if "nats_apart" in each:
            print(
                f"          {question!r}: token {each['same'] + 1} differs, of which transformers"
                f" finds its own {each['nats_apart']:.4f} nats likelier"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("directory", help="a stage directory")
    add("--dtypes", nargs="+", choices=DTYPES, default=["q8_0", "float16", "float32"])
    add("--new_tokens", type=int, default=40, help="of each text that is compared")
    add("--speed_tokens", type=int, default=128, help="of each text that is timed")
    add("--rounds", type=int, default=3, help="texts that are timed")
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="for all of Chromium")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    source = load_model(args.directory).eval()
    millions = source.num_parameters() / 1e6
    if not args.json:
        print(f"{millions:.1f} M parameters, Chromium on core {args.core}")
        print("page                load   tokens/s: first, then (median)   greedy tokens equal")
    rows = []
    for dtype in args.dtypes:
        rows.append(measure(args.directory, source, dtype, args))
        if not args.json:
            show(rows[-1])
    if args.json:
        print(json.dumps({"millions": round(millions, 1), "core": args.core, "rows": rows}))


if __name__ == "__main__":
    main()
