"""One SFT step of the tiny model, with TRL's tiled head and with the model's own loss, on the same packed batch.

    python benchmarks/sft_step.py [--vocab_size 6400] [--length 512] [--rounds 8]

Prints the median time of each and the median of the ratios, pair by pair, so that a machine whose speed drifts gives
the same answer.
"""

import argparse
import platform
import statistics
import time

import torch
from trl.trainer.utils import add_fused_lm_head

from minimind import MiniMindConfig, MiniMindForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab_size", type=int, default=6400)
    parser.add_argument("--length", type=int, default=512, help="tokens per row; 8 rows")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MiniMindConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=args.vocab_size)
    own = MiniMindForCausalLM(config).to(device)
    tiled = MiniMindForCausalLM(config).to(device)
    tiled.load_state_dict(own.state_dict())
    add_fused_lm_head(tiled, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's SFTTrainer asks for it

    input_ids = torch.randint(3, args.vocab_size, (8, args.length), device=device)
    labels = torch.where(torch.rand(input_ids.shape, device=device) < 0.35, input_ids, -100)
    position_ids = (torch.arange(args.length, device=device) % 64).expand_as(input_ids).contiguous()

    def step(model, **options) -> float:
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "use_cache": False}
            model(**batch, **options).loss.backward()
        model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step(own), step(tiled, fused_lm_head=True)
    pairs = [(step(own), step(tiled, fused_lm_head=True)) for _ in range(args.rounds)]
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{device} ({name}), vocabulary {args.vocab_size:,}, 8 x {args.length} tokens, {args.rounds} rounds")
    print(f"model's own loss  {statistics.median(own for own, _ in pairs) * 1000:8.0f} ms")
    print(f"TRL's tiled head  {statistics.median(tiled for _, tiled in pairs) * 1000:8.0f} ms")
    print(f"ratio tiled / own {statistics.median(tiled / own for own, tiled in pairs):8.2f}")


if __name__ == "__main__":
    main()
