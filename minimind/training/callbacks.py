"""What a run says while it goes on."""

import json
import time
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from minimind.model.modeling_minimind import MiniMindTopKRouter


def clock(seconds: float) -> str:
    """Seconds -> h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class ProgressCallback(TrainerCallback):
    """One line per log: step, loss, learning rate, tokens/s, elapsed, ETA; the same as JSON in train_log.jsonl.

    tokens/s counts the tokens that are not padding, of all processes, over training time: evaluation is left out.
    """

    shown = ("loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "rewards/margins", "grad_norm")
    shown += ("router_load/max",)

    def __init__(self, output_dir: Path):
        self.log_file = output_dir / "train_log.jsonl"
        self.seconds = 0.0  # spent in training steps
        self.step_began = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.last_seconds, self.last_tokens = 0.0, self.first_tokens
        if state.is_world_process_zero and not self.first_step:
            self.log_file.unlink(missing_ok=True)

    def state_dict(self) -> dict:
        """What a resumed run needs, so that tokens/s, elapsed time and ETA go on; see resume.py."""
        return {"seconds": self.seconds, "last_seconds": self.last_seconds, "last_tokens": self.last_tokens}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave; called after `on_train_begin`."""
        self.seconds, self.last_seconds, self.last_tokens = (
            state[name] for name in ("seconds", "last_seconds", "last_tokens")
        )
        self.first_step = self.first_tokens = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.step_began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "num_tokens"}}
        if "loss" in logs and self.seconds > self.last_seconds:
            tokens = state.num_input_tokens_seen - self.last_tokens
            entry["tokens_per_second"] = round(tokens / (self.seconds - self.last_seconds), 1)
            self.last_seconds, self.last_tokens = self.seconds, state.num_input_tokens_seen
            done = state.global_step - self.first_step
            entry["elapsed"] = round(self.seconds, 1)
            entry["eta"] = round(self.seconds / done * (state.max_steps - state.global_step), 1)
        entry = {key: float(value) if isinstance(value, str) else value for key, value in entry.items()}
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(self._line(entry, state.max_steps), flush=True)

    def tokens_per_second(self, state: TrainerState) -> float:
        """Mean over all training steps."""
        return (state.num_input_tokens_seen - self.first_tokens) / max(self.seconds, 1e-9)

    def _line(self, entry: dict, max_steps: int) -> str:
        parts = [f"step {entry['step']:>6,}/{max_steps:,}"] if max_steps else ["before training"]
        parts += [f"{key} {entry[key]:.4f}" for key in self.shown if key in entry]
        if "learning_rate" in entry:
            parts.append(f"lr {entry['learning_rate']:.2e}")
        if "eta" in entry:
            parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{clock(entry['elapsed'])} elapsed, {clock(entry['eta'])} left")
        if "train_loss" in entry:
            parts.append(f"finished training in {clock(entry['train_runtime'])}")
        return "  ".join(parts)


class RouterLoadCallback(TrainerCallback):
    """Adds to each log how a mixture of experts spreads its tokens: `router_load/layer_0/expert_1` is the share of the
    visits since the last log, `router_load/max` the busiest expert's of all layers. Counted on the device, on the main
    process's tokens.

    It has to stand before the trackers' callbacks: they report the logs as they find them.
    """

    def __init__(self, model: nn.Module):
        self.routers = [module for module in model.modules() if isinstance(module, MiniMindTopKRouter)]

    def on_train_begin(self, args, state, control, **kwargs):
        self.visits = [router.weight.new_zeros(len(router.weight), dtype=torch.float) for router in self.routers]
        self.hooks = [
            router.register_forward_hook(
                lambda module, inputs, outputs, visits=visits: self._count(module, outputs, visits)
            )
            for router, visits in zip(self.routers, self.visits, strict=True)
        ]

    @staticmethod
    @torch.no_grad()
    def _count(router: MiniMindTopKRouter, outputs: tuple, visits: torch.Tensor) -> None:
        if router.training:
            top_k_index = outputs[-1].flatten()
            visits.scatter_add_(0, top_k_index, torch.ones_like(top_k_index, dtype=visits.dtype))

    def state_dict(self) -> dict:
        """The visits since the last log, for a resumed run; see resume.py."""
        return {"visits": [visits.cpu() for visits in self.visits]}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` gave; called after `on_train_begin`."""
        for visits, saved in zip(self.visits, state["visits"], strict=True):
            visits.copy_(saved)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        shares = [(visits / visits.sum()).tolist() for visits in self.visits]
        for layer, experts in enumerate(shares):
            logs.update({f"router_load/layer_{layer}/expert_{i}": round(share, 4) for i, share in enumerate(experts)})
        logs["router_load/max"] = max(map(max, shares))
        for visits in self.visits:
            visits.zero_()

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()
