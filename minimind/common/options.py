"""What the parsers of commands and stages share. Loads neither torch nor transformers."""

import argparse
import difflib
import platform
from collections.abc import Iterable

# The stages in the order of a pipeline, for parsers that answer without loading torch
STAGE_NAMES = ("pretrain", "sft", "lora", "dpo", "kto", "reward")

# Our options, and their names in other tools and in MiniMind's first scripts.
OTHER_NAMES = {
    "bf16": {"dtype", "precision"},
    "chat_template": {"template", "prompt_template"},
    "dataloader_num_workers": {"num_workers", "workers"},
    "directory": {"model", "model_path"},
    "eval_files": {"eval_data", "validation_file"},
    "eval_steps": {"eval_interval"},
    "eval_strategy": {"evaluation_strategy"},
    "files": {"data", "data_path", "dataset"},
    "gradient_accumulation_steps": {"accumulation_steps", "grad_accum", "gradient_accumulation"},
    "learning_rate": {"lr"},
    "logging_steps": {"log_interval"},
    "lora_r": {"lora_rank", "rank"},
    "lr_scheduler_type": {"lr_scheduler", "scheduler"},
    "max_grad_norm": {"grad_clip", "max_norm"},
    "max_completion_length": {"cutoff_len", "max_length", "max_seq_len", "max_target_length"},
    "max_length": {"cutoff_len", "max_seq_len", "max_seq_length", "seq_len"},
    "max_prompt_length": {"cutoff_len", "max_length", "max_seq_len", "max_prompt_len"},
    "block_size": {"context_length", "max_seq_len", "max_seq_length", "seq_len"},
    "max_new_tokens": {"max_tokens"},
    "max_steps": {"iters", "max_iters", "steps"},
    "model_name_or_path": {"from_weight", "model", "model_path"},
    "num_train_epochs": {"epoch", "epochs", "num_epochs"},
    "optim": {"optimizer"},
    "output_dir": {"out", "out_dir", "output", "save_dir"},
    "per_device_eval_batch_size": {"eval_batch_size"},
    "per_device_train_batch_size": {"batch_size", "micro_batch_size"},
    "report_to": {"use_wandb", "wandb"},
    "resume_from_checkpoint": {"from_resume", "resume"},
    "save_steps": {"save_interval"},
    "time_budget": {"max_time", "max_train_time", "time_limit"},
    "train_files": {"data", "data_path", "dataset", "train_data", "train_file"},
    "use_peft": {"finetuning_type", "lora", "use_lora"},
    "warmup_steps": {"warmup", "warmup_iters", "warmup_ratio"},
    "weight_decay": {"wd"},
}


def suggestion(unknown: Iterable[str], known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about unknown names: the known ones that may be meant, if any."""
    known, candidates = set(known), set()
    for word in unknown:
        name = word.lstrip("-").replace("-", "_")
        synonyms = {each for each in known if name in OTHER_NAMES.get(each, ())}
        if len(name) > 2:  # abbreviations, which argparse accepts by default
            synonyms |= {each for each in known if each.startswith(name)}
        candidates |= synonyms or set(difflib.get_close_matches(name, known, n=1, cutoff=0.75))
    names = ", ".join(prefix + name for name in sorted(candidates))
    return f" Did you mean {names}?" if names else ""


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """The names of a parser's options, without those that only print, such as --help."""
    options = (each for each in parser._actions if each.option_strings)
    return {each.dest for each in options if each.default != argparse.SUPPRESS}


class OptionFormatter(argparse.HelpFormatter):
    """Shows one spelling of each option, its values, and a default that the description omits."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "VALUE"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        option = next(each for each in action.option_strings if each.startswith("--"))
        return f"{option} {_value_format(action)}".strip()

    def _expand_help(self, action: argparse.Action) -> str:
        text, default = description(action), default_text(action)
        return f"{text} (default: {default})" if default else text


def description(action: argparse.Action) -> str:
    """What an option's help says of it. Descriptions of dataclasses are plain text: unlike
    argparse's they may hold a percent sign."""
    return (action.help or "").replace("%%", "%")


def default_text(action: argparse.Action) -> str:
    """An option's default in words; empty if it has none, or its description names it."""
    default = action.default
    is_unset = default in (None, [], argparse.SUPPRESS) or default is False
    if is_unset or not action.option_strings or "default" in description(action).lower():
        return ""
    values = default if isinstance(default, list) else [default]
    return " ".join(str(getattr(value, "value", value)) for value in values)


def _value_format(action: argparse.Action) -> str:
    """The words after an option in its help: its choices if they are few."""
    if action.nargs in (0, "?"):
        return ""
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = action.metavar or (choices if 2 < len(choices) <= 40 else "VALUE")
    return f"{value} ..." if action.nargs == "+" else value


class PrintAndExit(argparse.Action):
    """An option that prints something and exits."""

    def __init__(self, option_strings, dest):
        super().__init__(option_strings, dest, 0, default=argparse.SUPPRESS, help=self.description)


class Version(PrintAndExit):
    """`--version`: the versions of the package and its libraries, from their metadata."""

    description = "show the versions and exit"

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import PackageNotFoundError, version

        print(f"python {platform.python_version()}")
        for package in ("minimind-hf", "torch", "transformers", "trl", "deepspeed"):
            try:
                print(f"{package} {version(package)}")
            except PackageNotFoundError:
                print(f"{package} not installed")
        parser.exit()


class HelpAll(PrintAndExit):
    """`--help_all`: calls the parser's `print_all_help`."""

    description = "show every option there is and exit"

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_all_help(namespace)
        parser.exit()
