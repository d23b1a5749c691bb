"""The parser of the stages, which reads recipes too, and its help: `--help` has our options and
those that people set, `--help_all` all."""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from trl import TrlParser

from minimind.common.bounds import check_options
from minimind.common.errors import UserError
from minimind.common.options import HelpAll, OptionFormatter, Version, option_names, suggestion
from minimind.common.recipes import read_recipe

# Heading -> options that stand under it, in this order. Our own that are not named here stand under
# the heading of their dataclass; of the libraries' only those named here are in the short help.
GROUPS = {
    "data": ("train_files", "eval_files"),
    "model": (
        *("model_name_or_path", "model_config", "tokenizer", "attn_implementation"),
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    ),
    "training": (
        *(
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        ),
        *(
            "block_size",
            "max_length",
            "learning_rate",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
        ),
        *(
            "lr_decay_steps",
            "optim",
            "weight_decay",
            "adam_beta2",
            "max_grad_norm",
            "beta",
            "loss_type",
            "seed",
        ),
        *(
            "bf16",
            "fp16",
            "activation_checkpointing",
            "torch_compile",
            "deepspeed",
            "dataloader_num_workers",
        ),
    ),
    "evaluation": (
        *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "prediction_loss_only"),
        *(
            "metric_for_best_model",
            "load_best_model_at_end",
            "early_stopping_patience",
            "early_stopping_threshold",
        ),
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


class StageParser(TrlParser):
    """TRL's parser, except: a mistake is one `UserError`, an abbreviated option is one too, and the
    help is short."""

    def __init__(self, dataclass_types):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=OptionFormatter)
        self.add_argument("--help_all", action=HelpAll)
        self.add_argument("--version", action=Version)
        hints = {
            name: hint
            for each in self.dataclass_types
            for name, hint in get_type_hints(each).items()
        }
        # Option -> what its value may be, dict and list among others.
        self.kinds = {
            name: {get_origin(each) or each for each in (hint, *get_args(hint))}
            for name, hint in hints.items()
        }

    def parse_known_args(self, args=None, namespace=None):
        """argparse's; raises UserError for values out of their bounds too."""
        options, others = super().parse_known_args(args, namespace)
        check_options(self._actions, options)
        return options, others

    def error(self, message: str):
        """Called by argparse, whose own version prints a usage text of several screens first."""
        raise UserError(f"{message}. See {self.prog} --help.")

    def format_help(self) -> str:
        """The options that people set, under their headings."""
        return self._format_help(every=False)

    def print_all_help(self, namespace: argparse.Namespace | None = None) -> None:
        """The same with every option of the libraries."""
        print(self._format_help(every=True))

    def _format_help(self, every: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(f"{self.prog} [--config RECIPE.yaml] [--OPTION VALUE ...]", [], [])
        formatter.add_text(
            "These are the keys of a recipe too; options override it. --no_NAME is --NAME false."
        )
        for heading, actions in grouped(self, every).items():
            formatter.start_section(heading)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def read_options(parser: StageParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line and its `--config`; raises UserError for those that are unknown
    or wrong."""
    options, others = parser.parse_known_args(with_recipe(parser, argv))
    if others:
        raise _unknown_options(parser, [word for word in others if word.startswith("--")] or others)
    return options


def with_recipe(parser: StageParser, argv: Sequence[str]) -> list[str]:
    """A command line with the words of its `--config` in front; raises UserError."""
    argv = [
        word
        for each in argv
        for word in (each.split("=", 1) if each.startswith("--config=") else [each])
    ]
    while "--config" in argv:
        position = argv.index("--config")
        if position + 1 == len(argv):
            raise UserError("--config needs the path of a YAML recipe.")
        path = Path(argv[position + 1])
        recipe = _recipe_words(path, parser)
        try:
            parser.parse_known_args(recipe)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        argv = recipe + argv[:position] + argv[position + 2 :]
    return argv


def _unknown_options(parser: StageParser, unknown: Sequence[str]) -> UserError:
    return UserError(
        f"unknown option {', '.join(unknown)}.{suggestion(unknown, option_names(parser), '--')}"
    )


def _recipe_words(path: Path, parser: StageParser) -> list[str]:
    """A YAML mapping -> the same as command-line words."""
    recipe = read_recipe(path)
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected 'name: value' lines, found {type(recipe).__name__}.")
    known = option_names(parser)
    unknown = [str(key) for key in recipe if key not in known]
    if unknown:
        raise UserError(f"{path}: unknown key {', '.join(unknown)}.{suggestion(unknown, known)}")
    actions = {action.dest: action for action in reversed(parser._actions)}  # --NAME, not --no_NAME
    words = []
    for key, value in recipe.items():
        if value is not None:
            words += _words(f"{path}: {key}", actions[key], parser, value)
    return words


def _words(place: str, action: argparse.Action, parser: StageParser, value: Any) -> list[str]:
    """One key of a recipe as command-line words; raises UserError where its value is of a shape it
    does not take."""
    option = f"--{action.dest}"
    if isinstance(value, dict):
        if dict not in parser.kinds[action.dest]:
            raise UserError(f"{place}: found 'name: value' lines, expected one value.")
        return [f"{option}={json.dumps(value, default=str)}"]
    if (
        isinstance(value, list)
        and list in parser.kinds[action.dest]
        and action.nargs != "+"
        and len(value) == 1
    ):
        value = value[0]  # the library takes several, its command line one
    if not isinstance(value, list):
        # YAML reads an unquoted no as false.
        return [f"{option}={'no' if value is False and 'no' in (action.choices or ()) else value}"]
    if action.nargs != "+":
        raise UserError(f"{place}: found a list, expected one value.")
    if any(isinstance(each, dict | list | None) or str(each).startswith("--") for each in value):
        raise UserError(f"{place}: found {str(value)[:80]}, expected a list of names or numbers.")
    return [option, *map(str, value)]


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
    """The options of a parser of dataclasses by heading; without `every` the libraries' are
    described briefly."""
    # --NAME, which is added before --no_NAME
    actions = {each.dest: each for each in reversed(parser._actions)}
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
