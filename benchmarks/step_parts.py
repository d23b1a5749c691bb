"""Alternatives within a training step: attention kernels, and ways to the loss.

    python benchmarks/step_parts.py [--size 26m] [--parts attention loss]

Attention is compared on plain rows, and on rows of four documents that cannot see each other, in
bf16 weights, forward and backward. The loss is that of the head's logits, with the gradients of
states and weight.
"""

import argparse
from functools import partial

import torch
from side_by_side import DEVICE, device_name, side_by_side
from torch.nn.functional import cross_entropy, linear
from transformers.utils import is_flash_attn_2_available
from twins import read_size

from minimind import MiniMindForCausalLM
from minimind.model.kernels_minimind import causal_lm_loss


def step(model, ids, **inputs) -> None:
    """Forward and backward."""
    model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
    model.zero_grad()


def attention(config, ids: torch.Tensor, rounds: int) -> None:
    """Time each attention implementation that is installed."""
    batch, length = ids.shape
    positions, runs = torch.arange(length // 4, device=DEVICE).repeat(batch, 4), {}
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        if name == "flash_attention_2" and not is_flash_attn_2_available():
            print(f"attention, {name}: skipped, flash-attn is not installed")
            continue
        if name == "flex_attention" and DEVICE == "cpu":
            print(f"attention, {name}: skipped, it has no backward pass on a CPU")
            continue
        model = MiniMindForCausalLM(config)
        model.set_attn_implementation(name)
        model.to(DEVICE, torch.bfloat16).train()  # flash attention computes in nothing else
        runs[f"{name}, plain rows"] = partial(step, model, ids)
        runs[f"{name}, 4 documents a row"] = partial(step, model, ids, position_ids=positions)
    for name, (seconds, ratio) in side_by_side(runs, rounds).items():
        print(f"attention, {name}: {seconds * 1e3:.1f} ms a step, x {ratio:.2f}", flush=True)


def loss(config, ids: torch.Tensor, rounds: int) -> None:
    """Time the head and the loss together by each way."""
    vocabulary, labels = config.vocab_size, ids.flatten()
    factory = {"device": DEVICE, "dtype": torch.bfloat16}
    weight = torch.randn(vocabulary, config.hidden_size, **factory).mul_(0.02).requires_grad_()
    states = torch.randn(len(labels), config.hidden_size, **factory).requires_grad_()
    ways = {
        "ours": lambda: causal_lm_loss(
            linear(states, weight), None, vocabulary, shift_labels=labels
        ),
        "cross_entropy": lambda: cross_entropy(linear(states, weight).float(), labels),
        "linear_cross_entropy": lambda: torch.nn.functional.linear_cross_entropy(
            states, weight, labels
        ),
    }
    runs = {
        name: lambda way=way: torch.autograd.grad(way(), (states, weight))
        for name, way in ways.items()
    }
    for name, (seconds, ratio) in side_by_side(runs, rounds).items():
        print(f"head and loss, {name}: {seconds * 1e3:.2f} ms, x {ratio:.2f}", flush=True)


PARTS = {"attention": attention, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="26m", help="file of configs/model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    config = read_size(args.size)
    shape = (args.batch_size, args.length)
    ids = torch.randint(3, config.vocab_size, shape, device=DEVICE)
    print(f"{device_name()}, {args.size}, {shape[0]} x {shape[1]} tokens, {args.rounds} rounds")
    for name in args.parts:
        PARTS[name](config, ids, args.rounds)


if __name__ == "__main__":
    main()
