"""`--help` of a stage: our own options and those of the libraries that people set. `--help_all`: all of them."""

import argparse
import re
from collections.abc import Iterable
from copy import copy

# Heading -> options that stand under it, in this order. Our own that are not named here stand under the heading of
# their dataclass; of the libraries' only those named here are in the short help.
GROUPS = {
    "data": ("train_files", "eval_files"),
    "model": (
        *("model_name_or_path", "model_config", "tokenizer", "attn_implementation"),
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    ),
    "training": (
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("block_size", "max_length", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("lr_decay_steps", "optim", "weight_decay", "adam_beta2", "max_grad_norm", "beta", "loss_type", "seed"),
        *("bf16", "fp16", "activation_checkpointing", "torch_compile", "deepspeed", "dataloader_num_workers"),
    ),
    "evaluation": (
        *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "prediction_loss_only"),
        *("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience", "early_stopping_threshold"),
        *("sample_steps", "sample_prompts", "sample_tokens"),
    ),
    "saving": (
        *("output_dir", "overwrite_output_dir", "save_strategy", "save_steps", "save_total_limit"),
        *("resume_from_checkpoint", "allow_changed_recipe"),
    ),
    "tracking": (
        *("report_to", "run_name", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
        *("include_num_input_tokens_seen", "disable_tqdm"),
    ),
}
HEADINGS = {
    "DataArguments": "data",
    "ChatArguments": "data",
    "PretrainModelArguments": "model",
    "ModelArguments": "model",
}
REST = "everything else, of transformers and TRL"
LENGTH = 130  # characters of a library's description in the short help


class OptionFormatter(argparse.HelpFormatter):
    """Of each option one spelling, what it takes, and its default if it has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        option = next(each for each in action.option_strings if each.startswith("--"))
        return f"{option} {_values(action)}".strip()

    def _expand_help(self, action: argparse.Action) -> str:
        # Descriptions of dataclasses are plain text: unlike argparse's they may hold a percent sign.
        text = (action.help or "").replace("%%", "%")
        hidden = any(action.default is each for each in (None, False, argparse.SUPPRESS))
        return text if hidden else f"{text} (default: {getattr(action.default, 'value', action.default)})"


def _values(action: argparse.Action) -> str:
    """What stands after an option: its choices if they are few."""
    if action.nargs in (0, "?"):
        return ""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    if 2 < len(choices) <= 40:
        return choices
    return "VALUE ..." if action.nargs == "+" else "VALUE"


def own_options(dataclass_types: Iterable[type]) -> dict[str, str]:
    """Each option that this package declares, and the heading of its dataclass."""
    return {
        name: HEADINGS.get(each.__name__, "training")
        for chosen in dataclass_types
        for each in chosen.__mro__
        if each.__module__.startswith("minimind.")
        for name in each.__annotations__
    }


def grouped(parser: argparse.ArgumentParser, every: bool) -> dict[str, list[argparse.Action]]:
    """The options of a parser of dataclasses by heading; without `every` the libraries' are described briefly."""
    actions = {each.dest: each for each in reversed(parser._actions)}  # --NAME, which is added before --no_NAME
    own = own_options(parser.dataclass_types)
    headings = own | {name: heading for heading, names in GROUPS.items() for name in names}
    first = {name: None for names in GROUPS.values() for name in names}
    groups: dict[str, list[argparse.Action]] = {heading: [] for heading in (*GROUPS, "help", REST)}
    for name in first | own | dict.fromkeys(reversed(actions)):
        if action := actions.get(name):
            heading = "help" if action.default == argparse.SUPPRESS else headings.get(name, REST)
            groups[heading].append(action if every or name in own else _brief(action))
    if not every:
        del groups[REST]
    return groups


def _brief(action: argparse.Action) -> argparse.Action:
    """An option with the first sentences of its description."""
    brief = copy(action)
    first, *others = re.split(r"(?<=\.)\s+", action.help or "")
    for sentence in others:
        if len(first) + len(sentence) > LENGTH:
            break
        first += f" {sentence}"
    brief.help = first
    return brief
