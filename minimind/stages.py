"""The table of stages: what each one is and what it trains on. Whatever runs, plans or checks a
stage reads it here.

A new stage is its root script, one row of this table, its data module and its tests.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.data.chat_arguments import ChatArguments, PreferenceArguments, TemplateArguments
from minimind.data.chats import load_conversations, load_preferences, load_rated
from minimind.data.documents import load_blocks
from minimind.data.packing import BlockCollator, PackedCollator
from minimind.data.preference_batches import PreferenceCollator
from minimind.data.template_choice import set_chat_template
from minimind.inspection import Inspection, has_roles, inspect_blocks, inspect_chats
from minimind.stage_directory import check_same_tokenizer
from minimind.tokenizer import load_tokenizer
from minimind.training.adapters import fit_virtual_tokens
from minimind.training.arguments import (
    DPOStageConfig,
    KTOStageConfig,
    PretrainConfig,
    RewardStageConfig,
    SFTStageConfig,
)
from minimind.training.data_arguments import DataArguments
from minimind.training.model_arguments import ModelArguments, PretrainModelArguments
from minimind.training.starting_point import check_length, new_model, starting_point


@dataclass(frozen=True)
class StageSpec:
    """One row of the table.

    name: what runs, recipes' folders, plans and reports call it.
    family: the stage whose rows, rates and records it shares; its own name unless it is a variant.
    script: the root script that runs it.
    arguments: the dataclasses of its options, in the order in which `parse` returns them.
    parent: the stage directory it starts from by default; None: from random weights.
    corpus: its part of the embedded corpus.
    length_options: the options of length; their sum is the tokens of its longest row.
    load: (data_args, tokenizer, options, chat_args) -> its rows; of `options` only attributes are
        read, so that a plan can pass options that never became training arguments.
    collate: (tokenizer, options) -> the collator of its batches.
    pairs: whether a row is a preference pair, two sequences to compute.
    shared_prompts: whether both are computed in one row, with their prompt once.
    scores: whether its model scores replies (a reward model), or writes them.
    """

    name: str
    family: str
    script: str
    arguments: tuple[type, ...]
    parent: str | None
    corpus: str
    length_options: tuple[str, ...]
    load: Callable[..., Any]
    collate: Callable[..., Callable]
    pairs: bool = False
    shared_prompts: bool = False
    scores: bool = False

    @property
    def chat_arguments(self) -> type | None:
        """The dataclass of how its conversations or pairs become rows; None for documents."""
        return next((each for each in self.arguments if issubclass(each, TemplateArguments)), None)

    @property
    def reads_documents(self) -> bool:
        """Whether its rows are documents, without chat arguments and template."""
        return self.chat_arguments is None

    def lengths(self, *options: Any) -> dict[str, int]:
        """The options of length with their values, each from the one of `options` that has it."""
        values = {name: value for each in options if each for name, value in vars(each).items()}
        return {name: values[name] for name in self.length_options}


class Inputs(NamedTuple):
    """What a stage trains: see `load_inputs`. `parent` is None for random weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    parent: Path | None
    rows: Any


def _load_documents(data_args, tokenizer, options, chat_args=None):
    packing = {
        name: getattr(options, name) for name in ("block_size", "packing_strategy", "document_mask")
    }
    return load_blocks(data_args, tokenizer, **packing, seed=options.seed)


def _load_conversations(data_args, tokenizer, options, chat_args):
    roles = not has_roles(tokenizer)
    length, seed = options.max_length, options.seed
    return load_conversations(data_args, tokenizer, length, chat_args, roles=roles, seed=seed)


def _load_preferences(data_args, tokenizer, options, chat_args):
    return load_preferences(data_args, tokenizer, chat_args, options.seed)


def _load_rated(data_args, tokenizer, options, chat_args):
    roles = not has_roles(tokenizer)
    return load_rated(data_args, tokenizer, options.max_length, chat_args, roles, options.seed)


PRETRAIN = StageSpec(
    name="pretrain",
    family="pretrain",
    script="pretrain.py",
    arguments=(DataArguments, PretrainModelArguments, PretrainConfig),
    parent=None,
    corpus="pretrain",
    length_options=("block_size",),
    load=_load_documents,
    collate=lambda tokenizer, options: BlockCollator(
        tokenizer.pad_token_id, tokenizer.eos_token_id, options.document_mask
    ),
)
SFT = StageSpec(
    name="sft",
    family="sft",
    script="finetune_sft.py",
    arguments=(DataArguments, ChatArguments, ModelArguments, SFTStageConfig),
    parent="runs/pretrain",
    corpus="sft",
    length_options=("max_length",),
    load=_load_conversations,
    collate=lambda tokenizer, options: PackedCollator(tokenizer.pad_token_id),
)
LORA = replace(SFT, name="lora", parent="runs/sft", corpus="lora")
DPO = StageSpec(
    name="dpo",
    family="dpo",
    script="train_dpo.py",
    arguments=(DataArguments, PreferenceArguments, ModelArguments, DPOStageConfig),
    pairs=True,
    shared_prompts=True,
    parent="runs/sft",
    corpus="dpo",
    length_options=("max_prompt_length", "max_completion_length"),
    load=_load_preferences,
    collate=lambda tokenizer, options: PreferenceCollator(tokenizer.pad_token_id),
)
KTO = StageSpec(
    name="kto",
    family="kto",
    script="train_kto.py",
    arguments=(DataArguments, ChatArguments, ModelArguments, KTOStageConfig),
    parent="runs/sft",
    corpus="dpo",
    length_options=("max_length",),
    load=_load_rated,
    collate=lambda tokenizer, options: PackedCollator(tokenizer.pad_token_id),
)
REWARD = replace(
    DPO,
    name="reward",
    family="reward",
    script="train_reward.py",
    arguments=(DataArguments, PreferenceArguments, ModelArguments, RewardStageConfig),
    scores=True,
)
STAGES = {spec.name: spec for spec in (PRETRAIN, SFT, LORA, DPO, KTO, REWARD)}


def load_inputs(spec: StageSpec, training_args, data_args, model_args, chat_args=None) -> Inputs:
    """The model, the tokenizer and the rows that the arguments of a stage describe, from its seed
    on.

    Raises:
        UserError: a file is missing or wrong, or the options do not fit the model.
    """
    set_seed(training_args.seed)
    model, tokenizer, parent = load_start(spec, model_args)
    lengths = spec.lengths(training_args, chat_args)
    check_length(lengths, model.config)
    notice = fit_virtual_tokens(model_args, training_args, lengths, model.config)
    if notice and is_main_process():
        say(notice)
    rows = load_rows(spec, data_args, tokenizer, training_args, chat_args)
    return Inputs(model, tokenizer, parent, rows)


def load_start(
    spec: StageSpec, model_args
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Path | None]:
    """Model, tokenizer and parent directory that a stage starts from; raises UserError."""
    path, attention = model_args.model_name_or_path, model_args.attn_implementation
    if spec.parent is None and not path:
        tokenizer = load_tokenizer(model_args.tokenizer)
        return new_model(model_args.model_config, tokenizer, attention), tokenizer, None

    model, tokenizer, parent = starting_point(path, attention, spec.parent, spec.scores)
    if spec.parent is None:
        check_same_tokenizer(model_args.tokenizer, tokenizer)
    return model, tokenizer, parent


def load_rows(spec: StageSpec, data_args, tokenizer, options, chat_args=None) -> Any:
    """The rows of a stage; without files those of the embedded corpus. Sets the chat template of
    `tokenizer`. Raises UserError."""
    if chat_args is not None:
        set_chat_template(tokenizer, chat_args.chat_template)
    return spec.load(data_args.or_embedded(spec.corpus), tokenizer, options, chat_args)


def inspect_training_rows(
    spec: StageSpec, rows, tokenizer, data_args, chat_args=None
) -> Inspection:
    """The report on the rows of a stage: tokens, masks, lengths, findings."""
    if spec.reads_documents:
        return inspect_blocks(rows, tokenizer, data_args.or_embedded(spec.corpus))
    if spec.pairs:
        return inspect_chats("dpo", rows, tokenizer, data_args.on_bad_rows)
    every_reply = chat_args.train_turns == "all" and spec.family != "kto"
    return inspect_chats("sft", rows, tokenizer, data_args.on_bad_rows, every_reply)
