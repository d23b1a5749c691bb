"""The model and tokenizer that a stage starts from, and whether the options fit them."""

import copy
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from peft import PeftConfig, TaskType
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import ModelConfig

from minimind import MiniMindConfig
from minimind.common.errors import UserError, reason
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.costs.parameters import empty_model
from minimind.stage_directory import (
    check_kind,
    check_vocabulary,
    holds_reward_model,
    is_reward_config,
    load_model,
    require_stage,
    with_score_head,
)
from minimind.tokenizer import load_tokenizer
from minimind.training.adapters import peft_config
from minimind.training.model_arguments import load_model_config_file


def new_model(
    config_file: str, tokenizer: PreTrainedTokenizerFast, attn_implementation: str | None = None
):
    """A MiniMind with random weights and the tokenizer's vocabulary and special ids.

    Raises:
        UserError: the file is wrong, or its vocabulary is too small for the tokenizer.
    """
    check_attention(attn_implementation)
    fields = load_model_config_file(config_file)
    fields.setdefault("vocab_size", len(tokenizer))
    try:
        config = MiniMindConfig(
            **fields,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        check_memory(config, config_file)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    except Exception as error:  # values may be of any type and size
        raise UserError(f"{config_file}: {reason(error)}") from error
    check_vocabulary(model, tokenizer, config_file)
    return model


def check_memory(config: MiniMindConfig, config_file: str) -> None:
    """Raise UserError where the weights alone exceed this machine's memory, unless they take none
    (on the device meta)."""
    if torch.get_default_device().type == "meta":
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    if weights > (memory := psutil.virtual_memory().total):
        raise UserError(
            f"{config_file}: the model's weights take {weights / 2**30:,.0f} GiB, and this machine"
            f" has {memory / 2**30:,.0f}. Make it smaller; the sizes are in configs/model/."
        )


def starting_point(
    directory: str | None,
    attn_implementation: str | None = None,
    default: str | None = None,
    scores: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Path | None]:
    """The model, tokenizer and directory of the stage that the next one starts from.

    Without a `directory` it is `default`; if that does not exist either, a tiny model with
    random weights and the default tokenizer, so that every script runs on its own. A model that
    `scores` replies gets a new score head, unless the stage was one of reward models.
    """
    if directory is None and not (default and (Path(default) / "stage.json").exists()):
        if is_main_process():
            say(
                f"no stage at {default}: starting from a tiny model with RANDOM weights"
                " (--model_name_or_path)"
            )
        tokenizer = load_tokenizer()
        model = new_model("configs/model/tiny.json", tokenizer, attn_implementation)
        return with_score_head(model) if scores else model, tokenizer, None
    path = require_stage(directory or default)
    check_attention(attn_implementation)
    tokenizer = load_tokenizer(path)
    model = load_model(path, attn_implementation, scores and holds_reward_model(path))
    check_kind(model.config, path)
    check_vocabulary(model, tokenizer, path)
    return with_score_head(model) if scores else model, tokenizer, path


def check_attention(attn_implementation: str | None) -> None:
    """Raise UserError for a back-end that cannot train here; the libraries report it in the first
    backward pass at best."""
    if attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise UserError(
            "--attn_implementation flex_attention has no backward without a GPU. Leave it out: sdpa"
            " is the default."
        )


def reference_model(model: PreTrainedModel, options, args: ModelConfig) -> PreTrainedModel | None:
    """The frozen copy that DPO's `options` ask for, or None: mostly its log-probabilities are
    computed before training, and with an adapter it is the model without it.

    TRL would load a copy from the path in the config, which a merged or random model lacks.

    Raises:
        UserError: an option is about the copy, and there is none with an adapter.
    """
    for name in ("sync_ref_model", "ref_model_on_cpu"):
        if args.use_peft and getattr(options, name, False):
            raise UserError(
                f"--{name} is about a second model, and with --use_peft the reference is the model"
                " itself without its adapter. Leave it out."
            )
    if options.precompute_ref_log_probs or args.use_peft:
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def adapter_config(args: ModelConfig, model: PreTrainedModel) -> PeftConfig | None:
    """The adapter that the options configure, or None; raises UserError where it does not fit the
    model."""
    config = peft_config(args)
    if config is not None:
        if is_reward_config(model.config):
            config.task_type = TaskType.SEQ_CLS  # the score head is trained and saved too
        empty_model(copy.deepcopy(model.config), config)
    return config


def check_length(lengths: Mapping[str, int], config: MiniMindConfig) -> None:
    """Raise UserError for rows longer than the model has positions, or too short to predict
    anything. `lengths`: the options of which the sum is the length of a row."""
    name, length = " + --".join(lengths), sum(lengths.values())
    if length > config.max_position_embeddings:
        raise UserError(
            f"--{name} {length:,} is beyond the model's max_position_embeddings"
            f" ({config.max_position_embeddings:,}). Lower it, or train a model with more"
            " positions."
        )
    if length < 2:
        raise UserError(
            f"--{name} is {length}, expected at least 2: a row predicts each token from those"
            " before it."
        )
