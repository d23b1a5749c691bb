"""What a run says while it goes on."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerState


def clock(seconds: float) -> str:
    """Seconds -> h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class ProgressCallback(TrainerCallback):
    """One line per log: step, loss, learning rate, tokens/s, elapsed, ETA; the same as JSON in train_log.jsonl.

    tokens/s counts the tokens that are not padding, of all processes, over training time: evaluation is left out.
    """

    shown = ("loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "rewards/margins", "grad_norm")

    def __init__(self, output_dir: Path):
        self.log_file = output_dir / "train_log.jsonl"
        self.seconds = 0.0  # spent in training steps since the start of this process
        self.step_began = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.last_seconds, self.last_tokens = 0.0, self.first_tokens
        if state.is_world_process_zero and not self.first_step:
            self.log_file.unlink(missing_ok=True)

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
        """Mean over all training steps of this process."""
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
