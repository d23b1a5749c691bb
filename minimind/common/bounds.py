"""What the numbers among the options may be, of commands and stages alike. Loads neither torch nor
transformers."""

import argparse
import json
import math
from collections.abc import Iterable
from typing import Any

from minimind.common.errors import UserError

MOST = 2**31 - 1  # what counts something stays within what every library takes for a count

# Intervals in the notation of mathematics: "[0, 1)" is at least 0 and below 1. "most" is MOST.
INTERVALS = {
    "[0, 1)": "adam_beta1 adam_beta2 eval_ratio label_smoothing_factor lora_dropout",
    "[0, 0.5)": "label_smoothing",
    "[0, 1]": "ld_alpha min_lr_rate ref_model_mixup_alpha",
    "(0, 1]": "top_p",
    "(0, inf)": (
        "adam_epsilon beta discopop_tau f_alpha_divergence_coef learning_rate mixing_temperature"
        " rope_theta"
    ),
    "[0, inf)": (
        "early_stopping_threshold loss_weights max_grad_norm min_lr neftune_noise_alpha"
        " router_aux_loss_coef temperature weight_decay"
    ),
    "(0, most]": "eval_steps logging_steps num_train_epochs save_steps",
    "[0, most]": (
        "eval_delay lr_decay_steps max_eval_rows max_nonfinite_steps min_frequency rows"
        " warmup_steps"
    ),
    "[1, most]": (
        "batch_size early_stopping_patience eval_accumulation_steps gradient_accumulation_steps"
        " lora_alpha max_new_tokens max_steps num_attention_heads per_device_eval_batch_size"
        " per_device_train_batch_size precompute_ref_batch_size ref_model_sync_steps"
        " save_total_limit torch_empty_cache_steps"
    ),
    "[2, most]": "block_size max_length",
    "[-1, most]": "sample_steps",
    "[0, 4294967295]": "data_seed seed",  # numpy's
    "[1, 10000]": "lora_r",
    "[1, 65536]": "sample_tokens",
    "[1, 16777216]": "vocab_size",
    "[0, 1024]": "dataloader_num_workers",
    "[1, 1024]": "dataloader_prefetch_factor dataset_num_proc num_proc",
    "[1, 1048576]": "ddp_bucket_cap_mb processes",
    "[1, 31536000]": "ddp_timeout",  # seconds: a year
    "[0, 65535]": "local_rank",
    "[1, 1e18]": "tokens",
    "[0, 1048576]": (
        "head_dim hidden_size intermediate_size moe_intermediate_size n_shared_experts num_experts "
        "num_experts_per_tok num_key_value_heads"
    ),
    "[0, 1000]": "num_hidden_layers",
}
BOUNDS = {name: interval for interval, names in INTERVALS.items() for name in names.split()}
BOUNDS["evaluate max_new_tokens"] = "[0, most]"  # a command's own
# Options of the libraries that take a word, and would say so in the first step.
CHOICES = {
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "torch_compile_mode": (
        "default",
        "reduce-overhead",
        "max-autotune",
        "max-autotune-no-cudagraphs",
    ),
}
# Options that the libraries read, write or send themselves.
FOR_LIBRARIES = (
    "adapter",
    "destination",
    "directories",
    "directory",
    "model",
    "model_name_or_path",
    "out",
)
FOR_LIBRARIES += ("output_dir", "project", "run_name", "source", "tokenizer")
WORDS = {
    "[": "at least {}",
    "(": "above {}",
    "[]": "at least {} and at most {}",
    "[)": "at least {} and below {}",
    "(]": "above {} and at most {}",
}


def check_options(
    actions: Iterable[argparse.Action], options: argparse.Namespace, command: str = ""
) -> None:
    """Raises UserError where an option that was given is a number out of its bounds, or no text for
    a name or path.

    `command`: the last word of its name, for bounds of its own.
    """
    for action in actions:
        value = getattr(options, action.dest, None)
        if not isinstance(value, int | float | str | list) or value == action.default:
            continue
        name = f"--{action.dest}" if action.option_strings else action.dest
        interval = BOUNDS.get(f"{command} {action.dest}", BOUNDS.get(action.dest))
        for each in value if isinstance(value, list) else [value]:
            if action.dest.endswith("_kwargs"):
                check_object(name, each)
            elif isinstance(each, str):
                check_text(name, each)
                if action.dest in FOR_LIBRARIES:
                    check_encoding(name, each)
                if each not in (choices := CHOICES.get(action.dest, (each,))):
                    raise UserError(f"{name} {shown(each)}: expected one of {', '.join(choices)}.")
            elif isinstance(each, int | float) and not isinstance(each, bool):
                check_number(name, each, interval or "(-inf, inf)")


def check_numbers(place: str, fields: dict[str, Any]) -> None:
    """`check_number` of each number in a JSON object, nested ones included."""
    for name, value in fields.items():
        if isinstance(value, dict):
            check_numbers(f"{place}: {name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(f"{place}: {name}", value, BOUNDS.get(name, "(-inf, inf)"))
        elif name in BOUNDS and value is not None:
            raise UserError(f"{place}: {name} {shown(value)}: expected a number.")


def check_number(name: str, value: float, interval: str) -> None:
    """Raises UserError where a number is not in an interval, such as "[0, 1)"; NaN and infinity are
    in none."""
    low, high = (float(MOST if end == "most" else end) for end in interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    # Also without bounds of its own: beyond 2**63 an integer fits in no tensor, database or JSON of
    # others.
    usual = math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    if above and below and usual:
        return
    brackets = interval[0]
    if math.isfinite(high) and (high != MOST or not below):
        brackets += interval[-1]
    expected = (
        WORDS[brackets].format(f"{low:,.10g}", f"{high:,.10g}")
        if math.isfinite(low)
        else "a finite number"
    )
    raise UserError(f"{name} {shown(value)}: expected {expected}.")


def shown(value: Any) -> str:
    """A value as it was given, if it is short."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:20]}... ({len(text):,} characters)"


def check_text(name: str, text: str) -> None:
    """Raises UserError for a text that can be neither a name nor a path, but in a --prompt or
    --system."""
    if name not in ("--prompt", "--system", "--columns", "--unread_columns") and not text.strip():
        raise UserError(f"{name}: found an empty text. Give a value, or leave the option out.")
    if "\0" in text:
        raise UserError(
            f"{name}: found a NUL character, which no name or path can have. Remove it."
        )


def check_encoding(name: str, path: str) -> None:
    """Raises UserError for a path that is not UTF-8, which tokenizers and safetensors neither read
    nor write."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} {path}: found a name that is not UTF-8, perhaps of an archive from Windows."
            " Rename it."
        ) from None


def check_object(name: str, text: str) -> None:
    """Raises UserError for arguments of something that are no JSON object."""
    try:
        if isinstance(value := json.loads(text), dict):
            return check_numbers(name, value)
    except (ValueError, RecursionError):
        pass
    raise UserError(f"""{name} {shown(text)}: expected a JSON object, such as '{{"name": 0.1}}'.""")
