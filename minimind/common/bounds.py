"""The values that options of commands and stages may have. Loads neither torch nor transformers."""

import argparse
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from minimind.common.errors import UserError

MOST = 2**31 - 1  # the largest count that every library accepts

# Options by interval, in the notation of mathematics: "[0, 1)" is at least 0 and below 1.
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
        "center_rewards_coefficient desirable_weight early_stopping_threshold loss_weights"
        " max_grad_norm min_lr neftune_noise_alpha router_aux_loss_coef simpo_gamma temperature"
        " undesirable_weight weight_decay"
    ),
    "(0, most]": "eval_steps logging_steps num_train_epochs save_steps",
    "[0, most]": (
        "eval_delay lr_decay_steps max_eval_rows max_nonfinite_steps min_frequency num_shots"
        " rows warmup_steps"
    ),
    "[1, most]": (
        "batch_size early_stopping_patience eval_accumulation_steps gradient_accumulation_steps"
        " lora_alpha max_eval_pairs max_new_tokens max_steps num_attention_heads"
        " per_device_eval_batch_size"
        " per_device_train_batch_size precompute_ref_batch_size ref_model_sync_steps"
        " save_total_limit torch_empty_cache_steps"
    ),
    "[2, most]": "block_size max_completion_length max_length max_prompt_length",
    "[-1, most]": "sample_steps",
    "[0, 4294967295]": "data_seed seed",  # numpy's
    "[1, 10000]": "lora_r num_virtual_tokens",
    "[1, 1024]": "dataloader_prefetch_factor dataset_num_proc num_proc best_of samples",
    "[1, 65536]": "sample_tokens",
    "[1, 16777216]": "vocab_size",
    "[0, 1024]": "dataloader_num_workers",
    "[1, 1048576]": "ddp_bucket_cap_mb processes",
    "[1, 31536000]": "ddp_timeout",  # seconds: a year
    "[0, 65535]": "local_rank port",
    "[1, 1e18]": "tokens",
    "[0, 1048576]": (
        "head_dim hidden_size intermediate_size moe_intermediate_size n_shared_experts num_experts "
        "num_experts_per_tok num_key_value_heads"
    ),
    "[0, 1000]": "num_hidden_layers",
}
BOUNDS = {name: interval for interval, names in INTERVALS.items() for name in names.split()}
BOUNDS["evaluate max_new_tokens"] = "[0, most]"  # a command's own
BOUNDS["pairs samples"] = "[2, 1024]"
# Choices of library options that the libraries themselves check only in the first step.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CHOICES = {
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "torch_compile_mode": COMPILE_MODES,
}
# Options that the libraries read, write or send, and that have to be UTF-8.
FOR_LIBRARIES = ("adapter", "destination", "directories", "directory", "directory_a", "directory_b")
FOR_LIBRARIES += (
    "paths",
    "include_path",
    "model",
    "model_name_or_path",
    "out",
    "output_dir",
    "project",
    "reward_model",
)
FOR_LIBRARIES += ("run_name", "source", "tokenizer")
# Options that are durations, each with its unit.
DURATIONS = ("time_budget",)
UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}  # seconds
DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in UNITS))
LONGEST = 366 * UNITS["d"]
EXPECTED = {  # by the brackets of an interval
    "[": "at least {}",
    "(": "above {}",
    "[]": "at least {} and at most {}",
    "[)": "at least {} and below {}",
    "(]": "above {} and at most {}",
}


def check_options(
    actions: Iterable[argparse.Action], options: argparse.Namespace, command: str = ""
) -> None:
    """Raise UserError for a number out of its bounds, or a text that cannot be a name or path.

    `command`: the last word of the command's name, which may have bounds of its own.
    """
    for action in actions:
        value = getattr(options, action.dest, None)
        if not isinstance(value, int | float | str | list) or value == action.default:
            continue
        name = f"--{action.dest}" if action.option_strings else action.dest
        interval = BOUNDS.get(f"{command} {action.dest}") or BOUNDS.get(action.dest)
        for each in value if isinstance(value, list) else [value]:
            if action.dest.endswith("_kwargs"):
                check_object(name, each)
            elif isinstance(each, str):
                check_text(name, each)
                if action.dest in DURATIONS:
                    seconds_of(name, each)
                if action.dest in FOR_LIBRARIES:
                    check_encoding(name, each)
                if each not in (choices := CHOICES.get(action.dest, (each,))):
                    expected = ", ".join(choices)
                    raise UserError(f"{name} {shorten(each)}: expected one of {expected}.")
            elif isinstance(each, int | float) and not isinstance(each, bool):
                check_number(name, each, interval or "(-inf, inf)")


def check_numbers(place: str, fields: dict[str, Any]) -> None:
    """`check_number` for each number in a JSON object and the objects in it."""
    for name, value in fields.items():
        if isinstance(value, dict):
            check_numbers(f"{place}: {name}", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            check_number(f"{place}: {name}", value, BOUNDS.get(name, "(-inf, inf)"))
        elif name in BOUNDS and value is not None:
            raise UserError(f"{place}: {name} {shorten(value)}: expected a number.")


def check_number(name: str, value: float, interval: str) -> None:
    """Raise UserError for a number outside an interval such as "[0, 1)"; NaN and infinity are in
    none."""
    low, high = (float(MOST if end == "most" else end) for end in interval[1:-1].split(", "))
    is_above = value >= low if interval[0] == "[" else value > low
    is_below = value <= high if interval[-1] == "]" else value < high
    # Without bounds too: an integer beyond 2**63 fits in no tensor, database or other tool's JSON.
    is_usual = math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63
    if is_above and is_below and is_usual:
        return
    brackets = interval[0]
    if math.isfinite(high) and (high != MOST or not is_below):
        brackets += interval[-1]
    expected = "a finite number"
    if math.isfinite(low):
        expected = EXPECTED[brackets].format(f"{low:,.10g}", f"{high:,.10g}")
    raise UserError(f"{name} {shorten(value)}: expected {expected}.")


def shorten(value: Any) -> str:
    """A value for a message; a long one as its beginning and length."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:20]}... ({len(text):,} characters)"


def check_text(name: str, text: str) -> None:
    """Raise UserError for a text that can be neither a name nor a path; a prompt may be empty."""
    if name not in ("--prompt", "--system", "--columns", "--unread_columns") and not text.strip():
        raise UserError(f"{name}: found an empty text. Give a value, or leave the option out.")
    if "\0" in text:
        raise UserError(
            f"{name}: found a NUL character, which no name or path can have. Remove it."
        )


def check_encoding(name: str, path: str) -> None:
    """Raise UserError for a path that is not UTF-8: tokenizers and safetensors cannot open it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name} {path}: found a name that is not UTF-8, perhaps from a Windows archive. Rename"
            " it."
        ) from None


def seconds_of(name: str, text: str) -> float | None:
    """The seconds of a duration such as 90s, 30m, 1.5h or 1h30m; None for "none".

    A number alone is refused: it is seconds to one reader and minutes to another.

    Raises:
        UserError: it is something else, no time at all, or more than a year.
    """
    if text.strip().lower() == "none":
        return None
    match = DURATION.fullmatch(text.strip().lower().replace(" ", ""))
    counts = match.groups(default="0") if match else ()
    seconds = sum(float(n) * size for n, size in zip(counts, UNITS.values(), strict=bool(match)))
    if 0 < seconds <= LONGEST:
        return seconds
    raise UserError(
        f"{name} {shorten(text)}: expected a duration with its unit, of a year at most, such as"
        " 90s, 30m, 2h or 1h30m; none for no limit."
    )


def check_object(name: str, text: str) -> None:
    """Raise UserError for keyword arguments that are not a JSON object."""
    try:
        if isinstance(value := json.loads(text), dict):
            return check_numbers(name, value)
    except (ValueError, RecursionError):
        pass
    raise UserError(
        f"""{name} {shorten(text)}: expected a JSON object, such as '{{"name": 0.1}}'."""
    )
