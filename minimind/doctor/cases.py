"""A recipe -> what the checks examine, with all of the run that can be loaded."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import align_special_tokens
from trl import pack_dataset

from minimind.common.errors import UserError
from minimind.common.recipes import read_deepspeed
from minimind.data.chat_encoder import set_chat_template
from minimind.data.chats import load_conversations, load_preferences
from minimind.data.documents import load_blocks
from minimind.data.packing import BlockCollator, PackedCollator
from minimind.doctor.registry import Case
from minimind.inspection import data_paths, has_roles
from minimind.planning.planned_runs import STAGES, Recipe, stage_of
from minimind.stage_directory import require_stage
from minimind.tokenizer import load_tokenizer
from minimind.training.arguments import parse
from minimind.training.parser import StageParser, with_recipe
from minimind.training.starting_point import (
    check_attention,
    check_length,
    new_model,
    starting_point,
)
from minimind.training.trainers import PreferenceCollator


def read_case(
    recipe: str, options: Sequence[str] = (), stage: str | None = None, world: int = 1
) -> Case:
    """A recipe and further options -> the case, with all that can be loaded.

    Raises:
        UserError: what a run would be refused for.
    """
    if world < 1:
        raise UserError(f"--processes {world}: expected at least 1.")
    stage = stage or stage_of(Path(recipe), options)
    case = Case("sft" if stage == "lora" else stage, world=world)
    types = STAGES[stage][1]
    case.recipe = Recipe(Path(recipe), stage, ["--config", str(recipe), *options])
    words = with_recipe(StageParser(types), case.recipe.words)
    # With --deepspeed the arguments would open a process group.
    file, words = take_option(words, "deepspeed")
    if file:
        case.deepspeed = read_deepspeed(file)
    data_args, *others, case.args = parse(*types, argv=words)
    case.args.report_to = case.args.report_to or []
    model_args, case.chat_args = others[-1], others[0] if len(others) > 1 else None
    corpus = case.stage
    if case.stage != "pretrain" and model_args.use_peft:
        case.lora, corpus = model_args, "lora"
    case.data_args = data_args.or_embedded(corpus)
    load_model_of(case, model_args)
    if case.model is not None:
        name = "block_size" if case.stage == "pretrain" else "max_length"
        check_length(name, getattr(case.args, name), case.base.config)
    load_rows_of(case)
    return case


def take_option(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name value` or `--name=value` out of the words; returns the last value and the other
    words."""
    value, others, words = None, [], list(words)
    while words:
        word = words.pop(0)
        if word == f"--{name}" and words:
            value = words.pop(0)
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        else:
            others.append(word)
    return value, others


def load_model_of(case: Case, model_args) -> None:
    """Model and tokenizer, as the stage's script has them; for a directory that is not there what
    stands in for it."""
    given = model_args.model_name_or_path
    tokenizer = getattr(model_args, "tokenizer", None)
    absent = [path for path in (given, tokenizer) if path and not Path(path).exists()]
    case.missing += absent
    if given in absent:
        load_stand_in(case, given, model_args.attn_implementation)
    elif case.stage == "pretrain" and not given:
        if absent:
            case.notes.append("tokens are those of the default tokenizer")
        case.tokenizer = load_tokenizer(None if absent else tokenizer)
        case.model = new_model(
            model_args.model_config, case.tokenizer, model_args.attn_implementation
        )
    else:
        default = {"pretrain": None, "dpo": "runs/sft"}.get(
            case.stage, "runs/sft" if case.lora else "runs/pretrain"
        )
        case.model, case.tokenizer, case.parent = starting_point(
            given, model_args.attn_implementation, default
        )
    if case.parent is not None:
        require_stage(case.parent)


def load_stand_in(case: Case, parent: str, attn_implementation: str | None) -> None:
    """For a parent that is still to be written: a model of its shape and its tokenizer, as the
    recipe that writes it tells them; else the default tokenizer alone."""
    writer = case.recipe.writer(parent)
    if writer is None:
        case.tokenizer = load_tokenizer()
        case.notes.append("no recipe writes it: tokens are those of the default tokenizer")
        return
    check_attention(attn_implementation)
    config, case.tokenizer, _ = writer.starting_point()
    with torch.device("meta"):
        case.model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation
        )
    case.stand_in = True
    case.notes.append(f"its shape and tokenizer are taken from {os.path.relpath(writer.path)}")


def load_rows_of(case: Case) -> None:
    """The rows of the stage; files that are not there are only noted."""
    given = [*data_paths(case.data_args.train_files), *(case.data_args.eval_files or [])]
    absent = [
        path for path in given if isinstance(path, str) and Path(path).suffix and _absent(path)
    ]
    case.missing += absent
    if absent:
        return
    tokenizer, args = case.tokenizer, case.args
    if case.stage == "pretrain":
        rows = load_blocks(case.data_args, tokenizer, **args.packing)
        case.collator = BlockCollator(
            tokenizer.pad_token_id, tokenizer.eos_token_id, args.document_mask
        )
        case.train = rows.train
    else:
        set_chat_template(tokenizer, case.chat_args.chat_template)
        if case.model is not None:
            align_special_tokens(case.model, tokenizer)  # as a run does
        load = load_preferences if case.stage == "dpo" else load_conversations
        options = {} if case.stage == "dpo" else {"roles": not has_roles(tokenizer)}
        rows = load(
            case.data_args, tokenizer, args.max_length, case.chat_args, seed=args.seed, **options
        )
        case.train = rows.train
        if case.stage == "dpo":
            case.collator = PreferenceCollator(tokenizer.pad_token_id)
        else:
            case.collator = PackedCollator(tokenizer.pad_token_id)
            if args.packing:
                case.train = pack_dataset(rows.train, args.max_length, "bfd", {"batch_size": None})
    case.facts, case.rows = rows.facts, rows


def _absent(path: str) -> bool:
    return not any(mark in path for mark in "*?[") and "://" not in path and not Path(path).exists()
