"""The parser of the stages and its help: `--help` has our options and those that users set,
`--help_all` has all."""

import argparse
import re
from collections.abc import Iterable
from copy import copy
from typing import get_args, get_origin, get_type_hints

from trl import TrlParser

from minimind.common.bounds import check_options
from minimind.common.errors import UserError
from minimind.common.options import HelpAll, OptionFormatter, Version

# The options under each heading, in this order. Our own that are not named here are under the
# heading of their dataclass; of the libraries' only those named here are in the short help.
NAMES = {
    "data": "train_files eval_files",
    "model": (
        "model_name_or_path model_config tokenizer attn_implementation use_peft peft_type lora_r "
        "lora_alpha lora_dropout lora_target_modules num_virtual_tokens"
    ),
    "training": (
        "num_train_epochs max_steps time_budget per_device_train_batch_size "
        "gradient_accumulation_steps "
        "block_size max_length learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "lr_decay_steps optim weight_decay adam_beta2 max_grad_norm beta loss_type seed bf16 fp16 "
        "activation_checkpointing torch_compile deepspeed dataloader_num_workers"
    ),
    "evaluation": (
        "eval_strategy eval_steps per_device_eval_batch_size prediction_loss_only "
        "metric_for_best_model load_best_model_at_end early_stopping_patience "
        "early_stopping_threshold eval_pairs max_eval_pairs sample_steps sample_prompts "
        "sample_tokens"
    ),
    "saving": (
        "output_dir overwrite_output_dir save_strategy save_steps save_total_limit "
        "resume_from_checkpoint allow_changed_recipe"
    ),
    "tracking": (
        "report_to run_name logging_steps logging_first_step logging_nan_inf_filter "
        "include_num_input_tokens_seen disable_tqdm"
    ),
}
GROUPS = {heading: names.split() for heading, names in NAMES.items()}
HEADINGS = dict.fromkeys(
    ("DataArguments", "TemplateArguments", "ChatArguments", "PreferenceArguments"), "data"
)
HEADINGS |= {"PretrainModelArguments": "model", "ModelArguments": "model"}
REST = "everything else, of transformers and TRL"
LENGTH = 130  # characters of a library's description in the short help


class StageParser(TrlParser):
    """Identical to TRL's parser except: a mistake, such as an abbreviated option, raises one
    `UserError`, and the help is short."""

    def __init__(self, dataclass_types):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=OptionFormatter)
        self.add_argument("--help_all", action=HelpAll)
        self.add_argument("--version", action=Version)
        # Option -> the types of its value, such as dict and list
        self.kinds = {
            name: {get_origin(each) or each for each in (hint, *get_args(hint))}
            for dataclass_type in self.dataclass_types
            for name, hint in get_type_hints(dataclass_type).items()
        }

    def parse_known_args(self, args=None, namespace=None):
        """Identical to argparse's except: raises UserError for values out of bounds."""
        options, others = super().parse_known_args(args, namespace)
        check_options(self._actions, options)
        return options, others

    def error(self, message: str):
        """Called by argparse, whose own version first prints several screens of usage."""
        raise UserError(f"{message}. See {self.prog} --help.")

    def format_help(self) -> str:
        """The options that users set, under their headings."""
        return self._format_help(every=False)

    def print_all_help(self, namespace: argparse.Namespace | None = None) -> None:
        """Print the same with every option of the libraries."""
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


def own_options(dataclass_types: Iterable[type]) -> dict[str, str]:
    """The options that this package declares, each with the heading of its dataclass."""
    return {
        name: HEADINGS.get(each.__name__, "training")
        for chosen in dataclass_types
        for each in chosen.__mro__
        if each.__module__.startswith("minimind.")
        for name in each.__annotations__
    }


def grouped(parser: argparse.ArgumentParser, every: bool) -> dict[str, list[argparse.Action]]:
    """The options of a parser by heading; without `every`, with brief texts of the libraries'."""
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
