"""Greedy generation by MiniMind beside the library's model of the same shape, with the same
weights.

    python benchmarks/generation.py [--size 26m] [--batch_sizes 1 8] [--new_tokens 128] [--compile]

Prints new tokens per second with a dynamic cache, with --compile also with a static one, for which
`generate` compiles the decoding on a GPU (the first call, which compiles, is left out), and whether
the tokens are the same.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from side_by_side import DEVICE, device_name, side_by_side
from transformers import PreTrainedModel
from twins import library_twin, read_size

from minimind import MiniMindForCausalLM


def generate(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, cache: str
) -> torch.Tensor:
    """Exactly `new_tokens` greedy tokens after each prompt."""
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        cache_implementation=cache,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="26m", help="file of configs/model")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt_length", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument(
        "--compile", action="store_true", help="also with a static cache and compiled decoding"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = read_size(args.size)
    model = MiniMindForCausalLM(config).to(DEVICE).eval()
    twin = library_twin(config).to(DEVICE).eval()
    twin.load_state_dict(model.state_dict())
    print(
        f"{device_name()}, {args.size}, {args.prompt_length} + {args.new_tokens} tokens,"
        f" {args.rounds} rounds"
    )
    for batch_size in args.batch_sizes:
        prompts = torch.randint(
            3, config.vocab_size, (batch_size, args.prompt_length), device=DEVICE
        )
        for cache in ("dynamic", *(["static"] if args.compile else [])):
            runs: dict[str, Callable] = {
                type(each).__name__: partial(generate, each, prompts, args.new_tokens, cache)
                for each in (twin, model)
            }
            same = (
                "same tokens" if torch.equal(*(run() for run in runs.values())) else "OTHER TOKENS"
            )
            for name, (seconds, ratio) in side_by_side(runs, args.rounds).items():
                speed = batch_size * args.new_tokens / seconds
                print(
                    f"batch {batch_size:3} {cache:8} {name:20} {speed:8.0f} tokens/s  x"
                    f" {1 / ratio:.2f}  {same}"
                )


if __name__ == "__main__":
    main()
