"""A recipe -> the model, the rows and the steps of the run it describes, without running it."""

import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerFast

from minimind import MiniMindConfig
from minimind.common.errors import UserError
from minimind.common.options import option_names
from minimind.common.recipes import read_deepspeed, read_recipe
from minimind.data.chat_arguments import TemplateArguments
from minimind.data.columns import Columns
from minimind.inspection import recognise_stage
from minimind.planning.counting import RowCounts, count_rows
from minimind.stage_directory import (
    check_kind,
    check_scores,
    load_config,
    require_stage,
    reward_config,
)
from minimind.stages import LORA, PRETRAIN, SFT, STAGES, StageSpec
from minimind.tokenizer import load_tokenizer
from minimind.training.adapters import peft_config
from minimind.training.command_line import parse_options
from minimind.training.data_arguments import DataArguments
from minimind.training.model_arguments import ModelArguments
from minimind.training.parser import StageParser
from minimind.training.starting_point import check_length, new_model


@dataclass
class PlannedRun:
    """The run that a recipe and the options beside it describe.

    stage: a name in the table of stages.
    words: the command line, `--config` first.
    others: the runs planned with it, one of which may write its parent.
    tokens: the tokens of an epoch, where there is no data to count.
    """

    path: Path
    stage: str
    words: list[str]
    others: list["PlannedRun"] = field(default_factory=list, repr=False)
    tokens: float | None = None

    @property
    def spec(self) -> StageSpec:
        """Its row of the table of stages."""
        spec = STAGES[self.stage]
        return LORA if spec is SFT and self.options.use_peft else spec

    @cached_property
    def options(self) -> Namespace:
        """Every option of the stage by its name."""
        return parse_options(*STAGES[self.stage].arguments, argv=self.words)

    def _arguments(self, kind: type):
        names = [each.name for each in dataclasses.fields(kind) if each.init]
        try:
            return kind(**{name: getattr(self.options, name) for name in names})
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error

    @property
    def data_args(self) -> DataArguments:
        """The files it reads; without any, the embedded corpus."""
        return self._arguments(DataArguments).or_embedded(self.spec.corpus)

    @property
    def chat_args(self) -> TemplateArguments | None:
        """How its conversations or pairs become rows; None where it reads documents."""
        kind = self.spec.chat_arguments
        return kind and self._arguments(kind)

    @property
    def adapter(self) -> PeftConfig | None:
        """The adapter it trains, or None."""
        if not getattr(self.options, "use_peft", False):
            return None
        return peft_config(self._arguments(ModelArguments))

    @property
    def parent(self) -> str | None:
        """The stage directory it starts from; None for random weights."""
        path, default = self.options.model_name_or_path, self.spec.parent
        return path or (default if default and Path(default).exists() else None)

    @property
    def length(self) -> int:
        """Tokens of the longest row it allows."""
        return sum(self.spec.lengths(self.options).values())

    def starting_point(self) -> tuple[MiniMindConfig, PreTrainedTokenizerFast, list[str]]:
        """Configuration and tokenizer of the model it trains, and notes on where they come from.

        A parent that does not exist yet is looked for among the recipes: the one that writes it.

        Raises:
            UserError: there is neither the parent nor a recipe that writes it, or the model's file
                is wrong.
        """
        parent, notes = self.parent, []
        writer = self.writer(parent) if parent and not Path(parent).is_dir() else None
        if writer:
            config, tokenizer, notes = writer.starting_point()
            notes = [note for note in notes if "train_files" not in note]
            notes.append(f"{parent} is still to be written; its model is taken from {writer.path}")
        elif parent:
            if not self.spec.scores:
                check_scores(require_stage(parent), scores=False)
            config, tokenizer = load_config(parent), load_tokenizer(parent)
            check_kind(config, parent)
        else:
            path = getattr(self.options, "tokenizer", None)
            if path and not Path(path).exists():
                notes.append(
                    f"{path} does not exist yet; tokens are those of the default tokenizer"
                )
                path = None
            tokenizer = load_tokenizer(path)
            with torch.device("meta"):
                file = getattr(self.options, "model_config", "configs/model/tiny.json")
                config = new_model(file, tokenizer).config
        if not self.options.train_files and not self.tokens:
            hint = "; --tokens 1e9 plans without data" if self.spec is PRETRAIN else ""
            notes.append(f"{self.path} names no train_files: planned for the embedded corpus{hint}")
        if self.spec.scores:
            config = reward_config(config)
        check_length(self.spec.lengths(self.options), config)
        return config, tokenizer, notes

    def writer(self, directory: str) -> "PlannedRun | None":
        """The run that writes a stage directory: one planned with this one, or one whose recipe
        lies in the folders beside this one's."""
        for other in self.others:
            if other is not self and Path(other.options.output_dir) == Path(directory):
                return other
        path = self.path.absolute()
        for file in sorted(path.parent.parent.glob("*/*.yaml")) if self.path.suffix else []:
            output_dir = _keys(file).get("output_dir")
            if file != path and output_dir and Path(output_dir) == Path(directory):
                return PlannedRun(file, stage_of(file, []), ["--config", str(file)], self.others)
        return None

    def rows(self, tokenizer: PreTrainedTokenizerFast) -> RowCounts:
        """The rows it trains on: counted, or of large files estimated from a sample of each; raises
        UserError."""
        if self.tokens:
            rows, tokens, length = ceil(self.tokens / self.length), round(self.tokens), self.length
            return RowCounts(rows, tokens, length, length, "as given", True)
        return count_rows(self.spec, self.data_args, self.chat_args, tokenizer, self.options)


def read_recipes(
    paths: Sequence[str],
    overrides: Sequence[str],
    stage: str | None = None,
    tokens: float | None = None,
) -> list[PlannedRun]:
    """The runs of some recipes, each with the same options beside it; `tokens` are those of
    pretraining.

    Raises:
        UserError: a recipe that is missing or whose stage is ambiguous, or an unknown option.
    """
    runs = [
        PlannedRun(
            Path(path), stage or stage_of(Path(path), overrides), ["--config", path, *overrides]
        )
        for path in map(str, paths)
    ]
    for run in runs:
        run.others = runs
        run.tokens = tokens if run.stage == PRETRAIN.name else None
    if tokens is not None and (tokens < 1 or not any(run.tokens for run in runs)):
        raise UserError(
            f"--tokens {tokens:g}: expected a number above 0, and a recipe of pretraining among"
            " those given."
        )
    return runs


def stage_of(path: Path, overrides: Sequence[str]) -> str:
    """The stage of a recipe: by its folder, else by its keys, else by its data; raises
    UserError."""
    recipe = _keys(path)
    if path.parent.name in STAGES:
        return path.parent.name

    # The stages that know most of the options.
    names = {word.removeprefix("--").split("=")[0] for word in overrides if word.startswith("--")}
    names |= recipe.keys()
    unknown = {
        spec.name: len(names - option_names(StageParser(spec.arguments)))
        for spec in STAGES.values()
        if spec is not LORA
    }
    fitting = [name for name, count in unknown.items() if count == min(unknown.values())]

    if len(fitting) > 1 and (files := recipe.get("train_files")):
        columns = Columns(recipe.get("columns"))
        fitting = [recognise_stage(files if isinstance(files, list) else [files], columns)]
    if fitting == ["dpo", "kto"]:  # the same options, and no data that would tell
        fitting = ["dpo"]
    if len(fitting) > 1:
        raise UserError(
            f"{path} could be a recipe of {' or '.join(fitting)}. Say which with --stage"
            f" {'|'.join(STAGES)}, or put it into a folder of that name."
        )
    return LORA.name if fitting[0] == SFT.name and "use_peft" in names else fitting[0]


def _keys(path: Path) -> dict:
    """A recipe's mapping; a file that is none is refused where it is parsed."""
    recipe = read_recipe(path)
    return recipe if isinstance(recipe, dict) else {}


def deepspeed_of(options: Namespace) -> tuple[int | None, bool, bool]:
    """The ZeRO stage of `--deepspeed` (None without it), and whether optimizer and weights are
    offloaded.

    Raises:
        UserError: it cannot be read.
    """
    if not options.deepspeed:
        return None, False, False
    zero = read_deepspeed(options.deepspeed).get("zero_optimization") or {}

    def offloaded(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    return zero.get("stage", 0), offloaded("offload_optimizer"), offloaded("offload_param")
