"""Time of an optimizer step, and its share of a training step: AdamW, torch's Muon, ours.

    python benchmarks/optimizer_step.py [--quick] [--bf16 true|false] [--json FILE]
    python benchmarks/optimizer_step.py --sizes 104m --batch_size 64 --length 512

On a processor that stands for an older one:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/optimizer_step.py
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from side_by_side import DEVICE, device_name, seconds
from twins import read_size

from minimind.common.launch import bf16_is_fast
from minimind.model import MiniMindForCausalLM
from minimind.training.optimizers import MuonWithAdamW, orthogonalized


class TorchMuon:
    """torch.optim.Muon with AdamW. It always iterates in bf16; where that is emulated, `fp32` lets
    it iterate in fp32 instead."""

    def __init__(self, matrices, others, fp32: bool):
        options = {"lr": 1e-3, "weight_decay": 0.1}
        self.fp32 = fp32
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
        self.adamw = torch.optim.AdamW(others, fused=True, **options)

    def step(self):
        cast = torch.Tensor.bfloat16
        if self.fp32:
            torch.Tensor.bfloat16 = lambda tensor: tensor.to(torch.float32, copy=True)
        try:
            self.muon.step()
        finally:
            torch.Tensor.bfloat16 = cast
        self.adamw.step()


def measure(name: str, shape: tuple[int, int], bf16: bool, rounds: int) -> dict:
    """Milliseconds of forward and backward pass and of each optimizer, in turn."""
    config = read_size(name)
    model = MiniMindForCausalLM(config).to(DEVICE)
    named = dict(model.named_parameters())
    matrices = [p for key, p in named.items() if p.ndim > 1 and "_proj" in key]
    others = [p for key, p in named.items() if not (p.ndim > 1 and "_proj" in key)]
    ids = torch.randint(3, config.vocab_size, shape, device=DEVICE)

    def passes():
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    betas = {"betas": (0.9, 0.95), "eps": 1e-8}
    alternatives = {
        "forward and backward": passes,
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step,
        "torch's Muon": TorchMuon(matrices, others, fp32=not bf16_is_fast(DEVICE)).step,
        "our Muon": MuonWithAdamW(matrices, others, 1e-3, 0.1, **betas).step,
    }
    times = {key: [] for key in alternatives}
    for round_ in range(rounds + 1):
        for key, function in alternatives.items():
            elapsed = 1e3 * seconds(function)
            if round_:  # the first one warms up
                times[key].append(elapsed)
    passes_ms = statistics.median(times["forward and backward"])
    rows = {}
    for key, own in times.items():
        middle = statistics.median(own)
        share = None if key == "forward and backward" else middle / (middle + passes_ms)
        rows[key] = {"ms": middle, "min": min(own), "max": max(own), "share": share}
        shown = "" if share is None else f"{share:7.1%} of a step"
        title = f"step, {name}, {key}:"
        print(f"{title:34} {middle:8.1f} ms ({min(own):.1f} to {max(own):.1f}){shown}")
    return rows


def singular_values(result: torch.Tensor) -> list[float]:
    """The smallest and the largest one."""
    values = torch.linalg.svdvals(result.float())
    return [values.min().item(), values.max().item()]


def orthogonality() -> dict:
    """Singular values of both results for a matrix (256, 704) with values from 0.003 of its norm
    on."""
    left = torch.linalg.qr(torch.randn(256, 256))[0]
    right = torch.linalg.qr(torch.randn(704, 256))[0]
    matrix = (left * torch.logspace(0, -1.85, 256) @ right.T).to(DEVICE)
    copy = torch.nn.Parameter(torch.zeros_like(matrix))
    copy.grad = matrix.clone()
    torch.optim.Muon([copy], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    found = {
        "torch's": singular_values(-copy),
        "ours": singular_values(orthogonalized([matrix[None]])),
    }
    for key, (low, high) in found.items():
        print(f"singular values, {key}: {low:.2f} to {high:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model alone, fewer rounds")
    parser.add_argument("--sizes", nargs="+", help="of configs/model; default: tiny 26m")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--bf16", choices=("true", "false"), help="default: where it is fast")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bf16 = bf16_is_fast(DEVICE) if options.bf16 is None else options.bf16 == "true"
    shape = options.batch_size, options.length
    tokens = options.batch_size * options.length
    print(f"{device_name()}, {'bf16' if bf16 else 'fp32'}, {tokens:,} tokens a step")
    names, rounds = (["tiny"], 5) if options.quick else (options.sizes or ["tiny", "26m"], 11)
    rows = {name: measure(name, shape, bf16, rounds) for name in names}
    result = {"device": device_name(), "bf16": bf16, "rows": rows, "values": orthogonality()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
