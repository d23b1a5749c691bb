"""A recipe -> the case that the checks look at, with all of the run that is there to be loaded."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.trainer_utils import align_special_tokens
from trl import pack_dataset

from minimind.common.errors import UserError
from minimind.common.recipes import read_deepspeed
from minimind.doctor.registry import Case
from minimind.inspection import data_paths
from minimind.planning.planned_runs import PlannedRun, stage_of
from minimind.stage_directory import auto_class, require_stage, reward_config
from minimind.stages import StageSpec, load_rows, load_start
from minimind.tokenizer import load_tokenizer
from minimind.training.adapters import fit_virtual_tokens
from minimind.training.command_line import parse, with_recipe
from minimind.training.parser import StageParser
from minimind.training.starting_point import check_attention, check_length


def read_case(
    recipe: str, options: Sequence[str] = (), stage: str | None = None, world: int = 1
) -> Case:
    """A recipe and further options -> the case, with all that is there to be loaded.

    Raises:
        UserError: what a run would be refused for.
    """
    if world < 1:
        raise UserError(f"--processes {world}: expected at least 1.")
    run = PlannedRun(
        Path(recipe), stage or stage_of(Path(recipe), options), ["--config", str(recipe), *options]
    )
    spec = run.spec
    case = Case(spec.family, recipe=run, world=world)

    # With --deepspeed the arguments would open a process group.
    words = with_recipe(StageParser(spec.arguments), run.words)
    file, words = take_option(words, "deepspeed")
    if file:
        case.deepspeed = read_deepspeed(file)
    data_args, *others, case.args = parse(*spec.arguments, argv=words)
    case.args.report_to = case.args.report_to or []
    *chat_args, model_args = others
    case.chat_args = chat_args[0] if chat_args else None
    case.lora = model_args if getattr(model_args, "use_peft", False) else None

    case.data_args = data_args.or_embedded(spec.corpus)
    load_model_of(case, spec, model_args)
    if case.model is not None:
        lengths = spec.lengths(case.args, case.chat_args)
        check_length(lengths, case.base.config)
        fit_virtual_tokens(model_args, case.args, lengths, case.base.config)
    load_rows_of(case, spec)
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


def load_model_of(case: Case, spec: StageSpec, model_args) -> None:
    """Load model and tokenizer as the stage does, or what stands in for a missing directory."""
    parent, tokenizer = model_args.model_name_or_path, getattr(model_args, "tokenizer", None)
    missing = [path for path in (parent, tokenizer) if path and not Path(path).exists()]
    case.missing += missing
    if parent in missing:
        load_stand_in(case, parent, model_args.attn_implementation)
        return
    if missing:
        case.notes.append("tokens are those of the default tokenizer")
        model_args = replace(model_args, tokenizer=None)
    case.model, case.tokenizer, case.parent = load_start(spec, model_args)
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
    if case.spec.scores:
        config = reward_config(config)
    with torch.device("meta"):
        case.model = auto_class(config).from_config(config, attn_implementation=attn_implementation)
    case.stand_in = True
    case.notes.append(f"its shape and tokenizer are taken from {os.path.relpath(writer.path)}")


def load_rows_of(case: Case, spec: StageSpec) -> None:
    """Load the rows of the stage; files that are missing are only noted."""
    paths = [*data_paths(case.data_args.train_files), *(case.data_args.eval_files or [])]
    missing = [
        path for path in paths if isinstance(path, str) and Path(path).suffix and _is_missing(path)
    ]
    case.missing += missing
    if missing:
        return
    tokenizer, args = case.tokenizer, case.args
    case.rows = load_rows(spec, case.data_args, tokenizer, args, case.chat_args)
    case.train, case.facts = case.rows.train, case.rows.facts
    case.collator = spec.collate(tokenizer, args)
    if case.model is not None:
        align_special_tokens(case.model, tokenizer)  # as a run does
    if not spec.reads_documents and getattr(args, "packing", False):
        case.train = pack_dataset(case.train, args.max_length, "bfd", {"batch_size": None})


def _is_missing(path: str) -> bool:
    return not any(mark in path for mark in "*?[") and "://" not in path and not Path(path).exists()
