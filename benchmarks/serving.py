"""How fast `minimind serve` writes: its batch beside the library's `generate` on the same stock
model, and 1 and 16 clients of the server.

    python benchmarks/serving.py [--size 26m] [--seconds 60] [--new_tokens 64] [--gguf] [--quick]

The model has random weights, which take as long as trained ones. Prints tokens per second of both
ways of generating, the tokens of each compared; then, for each number of clients, the answers, the
tokens per second, and the time to the first token. An answer that fails ends the benchmark.

--gguf adds llama.cpp with the model's GGUF files (pip install llama-cpp-python), which writes one
text at a time, and in q8_0 other tokens.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import Any

import openai
import torch
from side_by_side import DEVICE, device_name, side_by_side
from transformers import PreTrainedModel
from twins import library_twin, read_size

from minimind import MiniMindForCausalLM
from minimind.export import export
from minimind.serving.batching import Batcher, Job
from minimind.tokenizer import load_tokenizer, save_tokenizer

QUICK = {"size": "tiny", "seconds": 3.0, "new_tokens": 16, "rounds": 1}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "runs", "home")


def by_generate(model: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` greedy tokens after each prompt, by the library."""
    ids = torch.tensor(prompts, device=DEVICE)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
        )
    return output[:, ids.shape[1] :].tolist()


def by_batch(batcher: Batcher, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The same by the server's batch."""
    done: Queue = Queue()

    def take(token: int, job: int) -> bool:
        if len(jobs[job].written) == count:
            done.put(None)
        return True

    jobs = [
        Job(ids, count, 0.0, 1.0, partial(take, job=number), done.put)
        for number, ids in enumerate(prompts)
    ]
    batcher.submit(jobs)
    for _ in prompts:
        if problem := done.get():
            raise problem
    return [job.written for job in jobs]


def by_llama_cpp(llama: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The same by llama.cpp."""
    return [list(islice(llama.generate(ids, temp=0.0), count)) for ids in prompts]


def load_gguf(directory: Path, dtype: str) -> Any:
    """llama.cpp with the GGUF export of a stage directory, keys and values in fp32."""
    import llama_cpp

    out = Path(f"{directory}.{dtype}")
    export(directory, out, "gguf", dtype)
    fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
    return llama_cpp.Llama(str(out / "model.gguf"), n_ctx=1024, verbose=False, **fp32, **threads)


def measure_generation(model: PreTrainedModel, directory: Path, args: argparse.Namespace) -> None:
    """Print how fast each way writes 1 and 16 texts."""
    model.generation_config.eos_token_id = None  # all texts have the same length
    batcher = Batcher(model, most=16)
    batcher.start()
    ways = {"generate": partial(by_generate, model), "batch": partial(by_batch, batcher)}
    for dtype in ("float32", "q8_0") if args.gguf else ():
        ways[f"llama.cpp {dtype}"] = partial(by_llama_cpp, load_gguf(directory, dtype))
    for size in (1, 16):
        prompts = torch.randint(3, model.config.vocab_size, (size, 64)).tolist()
        runs = {
            name: partial(way, prompts, args.new_tokens)
            for name, way in ways.items()
            if size == 1 or not name.startswith("llama")  # it writes one after the other
        }
        expected = runs["generate"]()
        same = {name: run() == expected for name, run in runs.items()}
        for name, (seconds, ratio) in side_by_side(runs, args.rounds).items():
            speed = size * args.new_tokens / seconds
            tokens = "same tokens" if same[name] else "OTHER TOKENS"
            print(f"{size:3} texts  {name:17} {speed:7.0f} tokens/s  x {1 / ratio:.2f}  {tokens}")
    batcher.stop()


async def client(address: str, number: int, end: float, args: argparse.Namespace) -> list[tuple]:
    """Chat until `end`: of each answer its tokens, and the seconds to the first one."""
    answers = []
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as api:
        while time.perf_counter() < end:
            words = " ".join(WORDS[(number + len(answers)) % len(WORDS) :])
            began, first, usage = time.perf_counter(), None, None
            stream = await api.chat.completions.create(
                model="model",
                messages=[{"role": "user", "content": f"{number}: {words}"}],
                max_tokens=args.new_tokens,
                temperature=0.8,
                top_p=0.9,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    first = first or time.perf_counter() - began
                usage = chunk.usage or usage
            answers.append((usage.completion_tokens, first or 0.0))
    return answers


async def measure_clients(address: str, clients: int, args: argparse.Namespace) -> float:
    """Print and return the tokens per second that some clients get at once; one client alone needs
    a third of the time."""
    began = time.perf_counter()
    end = began + args.seconds / (3 if clients == 1 else 1)
    work = (client(address, number, end, args) for number in range(clients))
    answers = [each for own in await asyncio.gather(*work) for each in own]
    speed = sum(tokens for tokens, _ in answers) / (time.perf_counter() - began)
    firsts = sorted(first for _, first in answers)
    print(
        f"{clients:3} clients {len(answers):5} answers {speed:7.0f} tokens/s, first token after"
        f" {statistics.median(firsts):.2f} s (slowest {firsts[-1]:.2f} s)",
        flush=True,
    )
    return speed


def measure_server(directory: Path, args: argparse.Namespace) -> None:
    """Start the server as a user does, and print what 1 and 16 clients get."""
    command = [sys.executable, "-m", "minimind.cli", "serve", str(directory), "--port", "0"]
    environment = {**os.environ, "MINIMIND_LANG": "en", "MINIMIND_CACHE": f"{directory}.cache"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        line = next(line for line in server.stdout if line.startswith("http"))
        address = line.split()[0]
        speeds = [asyncio.run(measure_clients(address, clients, args)) for clients in (1, 16)]
        server.terminate()
    print(f"16 clients get {speeds[1] / speeds[0]:.1f} times the tokens/s of one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="26m", help="file of configs/model")
    parser.add_argument("--seconds", type=float, default=60.0, help="of 16 clients")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", action="store_true", help="also llama.cpp")
    parser.add_argument("--quick", action="store_true", help="a small model and short times")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    torch.manual_seed(0)
    config = read_size(args.size)
    model = MiniMindForCausalLM(config).eval()
    twin = library_twin(config).to(DEVICE).eval()
    twin.load_state_dict(model.state_dict())
    print(f"{device_name()}, {args.size}, texts of {args.new_tokens} tokens")
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "model"
        model.save_pretrained(directory)
        save_tokenizer(load_tokenizer(), directory)
        measure_generation(twin, directory, args)
        measure_server(directory, args)


if __name__ == "__main__":
    main()
