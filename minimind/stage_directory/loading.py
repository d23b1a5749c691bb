"""Load the configuration and model of a stage directory, or say what does not fit."""

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers.dynamic_module_utils
from peft import PeftConfig, PeftModel, PeftType, TaskType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import align_special_tokens

from minimind.common.errors import UserError, reason
from minimind.common.files import read_json
from minimind.stage_directory.contents import (
    adapter_base,
    base_of,
    count_tensors,
    is_adapter,
    require_stage,
)
from minimind.stage_directory.record import check_unchanged, read_stage
from minimind.tokenizer import load_tokenizer, tokenizer_hash
from minimind.tokenizer.loading import COPY

# A directory that wants its code to be run is an error, not a question on standard input.
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
# "Loading weights", gone before it can be read at these sizes
transformers.utils.logging.disable_progress_bar()
# An old name for which peft 0.21 still asks transformers; nothing that a user could fix
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

# Peft gives a model with virtual tokens the positions that it computes itself
warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)

# Initialisations of LoRA that change the base's weights by chance, data or quantisation, so that
# loading the adapter may not repeat them. PiSSA by full SVD and OLoRA are repeatable.
UNREPEATABLE_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")

# The fields of a configuration that are checked, and their types. With `transformers_weights` the
# library would load other weights than those beside the file.
CONFIG_FIELDS = {"model_type": str, "architectures": list | None, "dtype": str | None}
CONFIG_FIELDS |= {"transformers_weights": type(None)}
# Likewise for generation settings
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "num_beams", "length_penalty")
NUMBERS += ("repetition_penalty", "no_repeat_ngram_size", "max_length", "max_new_tokens")
NUMBERS += ("min_length", "min_new_tokens")
FLAGS = ("do_sample", "output_attentions", "output_hidden_states")
GENERATION_FIELDS = dict.fromkeys(NUMBERS, int | float | None) | dict.fromkeys(FLAGS, bool | None)
GENERATION_FIELDS |= {"pad_token_id": int | None, "bos_token_id": int | None}
GENERATION_FIELDS |= {"eos_token_id": int | list | None}


def load_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a stage directory's model, or of an adapter's base.

    Raises:
        UserError: it cannot be read, or has more layers than the weights.
    """
    path = base_of(require_stage(path))
    file = path / "config.json"
    read_json(file, COPY, fields=CONFIG_FIELDS)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library's classes raise anything for values of other types
        words = reason(error)
        remedy = "See docs/security.md." if "never run" in words else COPY
        raise UserError(f"{file} is no configuration of a model: {words}. {remedy}") from error
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > (tensors := count_tensors(path, "model.safetensors")):  # may exceed the memory
        raise UserError(
            f"{file}: num_hidden_layers is {layers:,}, and the weights have {tensors} tensors."
            f" {COPY}"
        )
    return config


def load_model(
    path: str | Path, attn_implementation: str | None = None, scores: bool = False
) -> PreTrainedModel:
    """Load the causal LM of a stage directory in fp32, or the reward model if it `scores` replies;
    an adapter is merged into its base.

    Raises:
        UserError: the directory is not a stage directory, holds the other kind of model, or its
            files cannot be read or do not belong together.
    """
    path = require_stage(path)
    check_scores(path, scores)
    if is_adapter(path):
        model = load_adapter(path, attn_implementation)
        with loading_errors(path):
            model = model.merge_and_unload()
        # Peft froze the base, and a merged model is trained like any other
        model.requires_grad_(True)
        # An adapter that is trained on it has this directory as its base
        model.config._name_or_path = str(path)
        return model

    check_generation_config(path)
    check_unchanged(path)
    with loading_errors(path):
        model, report = auto_class(load_config(path)).from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_fit(path, report["missing_keys"], report["unexpected_keys"])
    return model


def load_for_reading(path: str | Path) -> PreTrainedModel | PeftModel:
    """Load what a stage directory generates with and is measured by: as `load_model` does, but with
    the virtual tokens of prompt and prefix tuning in front of the text, which cannot be merged."""
    path = require_stage(path)
    if is_adapter(path):
        with loading_errors(path):
            is_virtual = PeftConfig.from_pretrained(path).is_prompt_learning
        if is_virtual:
            return load_adapter(path, to_merge=False)
    return load_model(path)


def virtual_tokens(model: torch.nn.Module, embedded: bool = False) -> int:
    """The number of virtual tokens in front of a model's text; `embedded`: only of those that it
    computes like tokens, with logits of their own (prompt tuning), not of keys and values."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    config = model.active_peft_config
    is_counted = not embedded or config.peft_type != PeftType.PREFIX_TUNING
    return config.num_virtual_tokens * is_counted


def load_adapter(
    path: Path, attn_implementation: str | None = None, to_merge: bool = True
) -> PeftModel:
    """Load an adapter on its base, both in fp32 and not merged.

    Raises:
        UserError: it cannot be merged, where it is `to_merge`, or the base it was trained on cannot
            be restored.
    """
    with loading_errors(path):
        config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning and to_merge:
        raise UserError(
            f"{path} holds {config.peft_type.value.lower().replace('_', ' ')}: tokens in front of"
            " the text, which no weights can express, so it can be neither merged, exported nor"
            " trained on. Chat and generate with it as it is (docs/adapters.md), or train a LoRA"
            " adapter."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(UNREPEATABLE_INITS):
        raise UserError(
            f"{path} was started with init_lora_weights={init!r}, which changes the base's weights,"
            " and nothing guarantees that loading it changes them in the same way. Call peft's"
            " save_pretrained with path_initial_model_for_weight_conversion, which turns it into a"
            " plain LoRA adapter, or train with init_lora_weights='pissa'."
        )

    check_unchanged(path)
    base_path = adapter_base(path)
    base = load_model(base_path, attn_implementation, holds_reward_model(base_path))
    if holds_reward_model(path):  # the adapter brings its own score head
        base = with_score_head(base)
    # A chat template's end token may not be the base's
    align_special_tokens(base, load_tokenizer(path))
    with loading_errors(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # errors below
        model = PeftModel.from_pretrained(base, path, config=config)
        report = model.load_adapter(path, model.active_adapter)  # again: the first reports nothing
    # Peft reports this one although it has read it
    unexpected = {*report.unexpected_keys} - {"prompt_embeddings" * config.is_prompt_learning}
    check_fit(path, report.missing_keys, unexpected)

    adapted = {
        key.split(".lora_")[0].split(".")[-1] for key in model.state_dict() if ".lora_" in key
    }
    tied = sorted(adapted & {"embed_tokens", "lm_head"})
    if base.config.tie_word_embeddings and tied:
        raise UserError(
            f"{path} adapts {' and '.join(tied)}, but embedding and output layer are one"
            " matrix in this model, and peft merges such an adapter wrongly. Train with"
            " --lora_modules_to_save embed_tokens instead, which gives the two layers weights of"
            " their own."
        )
    return model


# Reward models


def holds_reward_model(path: Path) -> bool:
    """Whether a stage directory holds a model that scores replies, as an adapter or complete;
    raises UserError."""
    if is_adapter(path):
        fields = {"task_type": str | None}
        adapter = read_json(path / "adapter_config.json", COPY, fields=fields)
        return adapter.get("task_type") == TaskType.SEQ_CLS
    return is_reward_config(load_config(path))


def is_reward_config(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a model that scores replies."""
    return any("SequenceClassification" in str(name) for name in config.architectures or ())


def auto_class(config: PreTrainedConfig) -> type:
    """The library's class that builds the model of a configuration."""
    reward = is_reward_config(config)
    return AutoModelForSequenceClassification if reward else AutoModelForCausalLM


def check_scores(path: Path, scores: bool) -> None:
    """Raises UserError unless the model of a stage directory `scores` replies, or writes them."""
    if holds_reward_model(path) and not scores:
        raise UserError(
            f"{path} holds a reward model, which scores replies and writes none. Give a language"
            " model."
        )
    if scores and not holds_reward_model(path):
        raise UserError(
            f"{path} holds a language model, which writes replies and scores none. Give a reward"
            " model, the output of train_reward.py."
        )


def reward_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the reward model on a language model's body; that of a reward model as
    it is."""
    if is_reward_config(config):
        return config
    config = copy.deepcopy(config)
    config.num_labels = 1
    config.architectures = ["MiniMindForSequenceClassification"]
    return config


def with_score_head(model: PreTrainedModel) -> PreTrainedModel:
    """The reward model on a language model's body, with a score head drawn from the normal
    distribution of `initializer_range`; a reward model as it is."""
    if is_reward_config(model.config):
        return model
    with torch.device("meta"):
        reward = AutoModelForSequenceClassification.from_config(
            reward_config(model.config), attn_implementation=model.config._attn_implementation
        )
    reward.model = model.model
    reward.score = torch.nn.Linear(*reward.score.weight.shape[::-1], bias=False)
    torch.nn.init.normal_(reward.score.weight, std=reward.config.initializer_range)
    return reward.to(model.device).train(model.training)


@contextmanager
def loading_errors(path: Path) -> Iterator[None]:
    """Turn whatever a library raises while it loads the model in `path` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = reason(error)
        if "ignore_mismatched_sizes" in words:  # the library has printed them as a table
            words = "its tensors have other shapes than its configuration says, see above"
        raise UserError(f"the model in {path} cannot be loaded: {words}") from error


# Checks


def check_generation_config(path: Path) -> None:
    """Raises UserError for invalid generation settings, which the library would ignore or reject
    only later."""
    file = path / "generation_config.json"
    if not os.path.lexists(file):
        return
    settings = read_json(file, COPY, fields=GENERATION_FIELDS)
    try:
        torch.tensor(settings.get("eos_token_id") or 0, dtype=torch.long)
        GenerationConfig.from_dict(settings)
    except Exception as error:
        raise UserError(f"{file} holds no generation settings: {reason(error)}. {COPY}") from error


def check_fit(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises UserError where weights and configuration have different tensors: a library fills
    missing ones with random numbers, and ignores the others."""
    kinds = {"missing": sorted(missing), "not of this model": sorted(unexpected)}
    differences = [
        f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in kinds.items() if names
    ]
    if differences:
        raise UserError(
            f"the weights in {path} do not fit its configuration: {'; '.join(differences)}. Put"
            " back the files that belong together."
        )


def check_kind(config: PreTrainedConfig, path: str | Path) -> None:
    """Raises UserError for a model of another kind than the stages train."""
    if config.model_type != "minimind":
        raise UserError(
            f"{path} holds a model of type {config.model_type!r}, and the stages train MiniMind"
            " models. 'minimind import' converts it where it can."
        )


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: str | Path
) -> None:
    """Raises UserError where the tokenizer has more ids or another end token than the model, or is
    not the one of the stage's training."""
    vocab_size, ends = model.config.vocab_size, model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer):,} tokens, the model {vocab_size:,}. They"
            " do not belong together; give the stage directory that holds both."
        )
    if tokenizer.eos_token_id not in ends:
        raise UserError(
            f"{path}: the tokenizer ends text with id {tokenizer.eos_token_id}"
            f" ({tokenizer.eos_token!r}), the model with {ends}. They do not belong together."
        )
    if read_stage(path).get("tokenizer", tokenizer_hash(tokenizer)) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{path}: the tokenizer is not the one this stage was trained with (stage.json has"
            " another hash). Put the stage's own tokenizer files back."
        )


def check_same_tokenizer(directory: str | None, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError where --tokenizer names another tokenizer than the one a model was trained
    with."""
    if directory and tokenizer_hash(load_tokenizer(directory)) != tokenizer_hash(tokenizer):
        raise UserError(
            f"--tokenizer {directory} is not the tokenizer of the model to continue from. Leave it"
            " out: a stage directory brings its own."
        )
