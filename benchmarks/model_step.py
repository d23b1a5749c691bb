"""Forward and backward of MiniMind beside the library's model of the same shape, on the same
weights and tokens.

    python benchmarks/model_step.py [--sizes 26m 64m 198m-moe] [--precisions float32 bfloat16
    autocast] [--profile]

A dense size is compared with Qwen3ForCausalLM; a mixture of experts with the dense model of the
same active size, every implementation of the experts and Qwen3MoeForCausalLM beside it. `bfloat16`
holds the weights in bf16, as DeepSpeed does, `autocast` in fp32, as the plain Trainer does.
`--profile` says where each one's time goes.
"""

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from side_by_side import DEVICE, device_name, side_by_side
from transformers import PreTrainedModel
from twins import SHAPE, library_twin, read_size

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import reports_user_errors

EXPERTS = ("eager", "grouped_mm")


def alternatives(config: MiniMindConfig) -> dict[str, PreTrainedModel]:
    """The models to time; the ratios are to the first."""
    twin = library_twin(config)
    if not config.num_experts:
        assert twin.num_parameters() == MiniMindForCausalLM(config).num_parameters()
        return {type(twin).__name__: twin, "MiniMind": MiniMindForCausalLM(config)}
    active = config.num_experts_per_tok + config.n_shared_experts
    dense = MiniMindConfig(
        **{name: getattr(config, name) for name in SHAPE}
        | {"intermediate_size": active * config.moe_intermediate_size}
    )
    models = {
        "MiniMind, dense": MiniMindForCausalLM(dense),
        "MiniMind, MoE": MiniMindForCausalLM(config),
    }
    for name in EXPERTS:  # written into the configuration, so each has its own
        models[f"MiniMind, MoE, {name}"] = MiniMindForCausalLM(copy.deepcopy(config))
        models[f"MiniMind, MoE, {name}"].set_experts_implementation(name)
        if not config.n_shared_experts:
            models[f"Qwen3MoE, {name}"] = library_twin(config)
            models[f"Qwen3MoE, {name}"].set_experts_implementation(name)
    return models


def step(model: PreTrainedModel, input_ids: torch.Tensor, precision: str) -> Callable[[], None]:
    """One forward and backward in training mode, gradients dropped at the end."""
    model.to(DEVICE, torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    autocast = torch.autocast(DEVICE, torch.bfloat16) if precision == "autocast" else nullcontext()

    def run() -> None:
        with autocast:
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    return run


def shares(run: Callable[[], None], count: int = 8) -> str:
    """The operators that take most of one step, each with its share."""
    with torch.profiler.profile() as profile:
        run()
    spent = {
        e.key: e.self_device_time_total or e.self_cpu_time_total for e in profile.key_averages()
    }
    most = sorted(spent, key=spent.get, reverse=True)[:count]
    return ", ".join(
        f"{name.removeprefix('aten::')} {spent[name] / sum(spent.values()):.0%}" for name in most
    )


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["26m", "64m", "198m-moe"], help="files of configs/model"
    )
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16", "autocast"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--profile", action="store_true", help="also print each model's most expensive operators"
    )
    args = parser.parse_args()
    print(f"{device_name()}, {args.batch_size} x {args.length} tokens, {args.rounds} rounds")
    for size in args.sizes:
        for precision in args.precisions:
            torch.manual_seed(0)
            config = read_size(size)
            input_ids = torch.randint(
                3, config.vocab_size, (args.batch_size, args.length), device=DEVICE
            )
            steps = {
                name: step(model, input_ids, precision)
                for name, model in alternatives(config).items()
            }
            for name, (seconds, ratio) in side_by_side(steps, args.rounds).items():
                print(
                    f"{size:9} {precision:9} {name:26} {seconds * 1000:8.0f} ms   x {ratio:.2f}",
                    flush=True,
                )
            for name, run in steps.items() if args.profile else ():
                print(f"    {name}: {shares(run)}", flush=True)


if __name__ == "__main__":
    main()
