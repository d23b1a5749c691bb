"""Stage directories from the reader's side: is this one, what does its record say, load its model.

    config.json  generation_config.json  model.safetensors  configuration_minimind.py  modeling_minimind.py
    tokenizer.json  tokenizer_config.json  chat_template.jinja  training_args.bin
    stage.json  run.json  report.html  train_log.jsonl  samples.jsonl  loss.png  mask_report.json (sft, dpo)

A LoRA stage has adapter_config.json and adapter_model.safetensors in place of config and weights; its base is found
through adapter_config.json. `run.json` is written first (see training/resume.py) and `stage.json` last: a directory
that has it is complete.
"""

import importlib.metadata
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_utils import align_special_tokens

from minimind.data.files import content_hash
from minimind.errors import UserError
from minimind.tokenizer import load_tokenizer, tokenizer_hash

transformers.utils.logging.disable_progress_bar()  # "Loading weights", gone before it can be read at these sizes
# An old name that peft 0.21 still asks transformers for, nothing a user could mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "gguf", "minimind-hf")
# Initialisations of LoRA that take something out of the base's weights by chance, data or quantisation: nothing
# warrants that it is the same again when the adapter is loaded. PiSSA by full SVD and OLoRA are computed again.
UNREPEATABLE_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A hidden directory beside `path` to write into, which becomes `path` at the end, or nothing where that failed.

    Raises:
        UserError: `path` exists and is not an empty directory, or cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty. Give a directory that does not exist yet, or remove it.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_stage(path: str | Path) -> Path:
    """Return `path` if it is a stage directory that can be loaded.

    Raises:
        UserError: naming what is missing, and for an adapter also its base.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Expected a stage directory, the output of an earlier stage.")
    names = {file.name for file in path.iterdir()}
    adapter = "adapter_config.json" in names
    needed = ["adapter_config.json" if adapter else "config.json", "tokenizer.json"]
    missing = [name for name in needed if name not in names]
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    if weights not in names and f"{weights}.index.json" not in names:
        missing.append(weights)
    if missing:
        raise UserError(
            f"{path} is not a complete stage directory: {', '.join(missing)} not found. "
            "Expected the output of pretrain.py, finetune_sft.py or train_dpo.py."
        )
    if adapter:
        base = adapter_base(path)
        if not base.is_dir():
            raise UserError(
                f"{path} is an adapter, and its base {base} is gone. Move the base back, or put its new path into "
                f"base_model_name_or_path in {path / 'adapter_config.json'}."
            )
        require_stage(base)
    return path


def adapter_base(path: Path) -> Path:
    """The stage directory that an adapter was trained on; a relative path is relative to the adapter."""
    base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path") or "?"
    return path / base if not Path(base).is_absolute() else Path(base)


def load_model(path: str | Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load the causal LM of a stage directory in fp32; an adapter is merged into its base.

    Raises:
        UserError: the directory is not a stage directory, or its files cannot be read.
    """
    path = require_stage(path)
    try:
        if (path / "adapter_config.json").exists():
            model = load_adapter(path, attn_implementation).merge_and_unload()
            model.requires_grad_(True)  # peft had frozen the base, and a merged model is trained like any other
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation=attn_implementation
            )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise UserError(f"the model in {path} cannot be loaded: {error}") from error
    return model


def load_adapter(path: Path, attn_implementation: str | None = None) -> PeftModel:
    """Load an adapter on its base, both in fp32 and not merged.

    Raises:
        UserError: it is of a kind that cannot be merged, or its base as it was trained on cannot be had again.
    """
    config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        raise UserError(
            f"{path} holds {config.peft_type.value.lower().replace('_', ' ')}: tokens in front of the text, which no "
            "weights can express, so it can be neither merged, exported nor trained on. Use it through peft "
            "(docs/export.md), or train a LoRA adapter."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(UNREPEATABLE_INITS):
        raise UserError(
            f"{path} was started with init_lora_weights={init!r}, which changes the base's weights, and nothing "
            "warrants that loading it changes them in the same way. Give peft's save_pretrained "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA adapter of it, or train with "
            "init_lora_weights='pissa'."
        )
    base = load_model(adapter_base(path), attn_implementation)
    align_special_tokens(base, load_tokenizer(path))  # a chat template's end token may not be the base's
    model = PeftModel.from_pretrained(base, path, config=config)
    layers = {name for name in ("embed_tokens", "lm_head") for key in model.state_dict() if f"{name}.lora_" in key}
    if base.config.tie_word_embeddings and layers:
        raise UserError(
            f"{path} adapts {' and '.join(sorted(layers))}, but embedding and output layer are one matrix in this "
            "model, and peft merges such an adapter wrongly. Train with --lora_modules_to_save embed_tokens instead, "
            "which gives the two layers weights of their own."
        )
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    """Raises UserError where the tokenizer has ids that the model has not, other special tokens, or was exchanged."""
    vocab_size = model.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer):,} tokens, the model {vocab_size:,}. They do not belong "
            "together; give the stage directory that holds both."
        )
    ends = model.config.eos_token_id if isinstance(model.config.eos_token_id, list) else [model.config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        raise UserError(
            f"{path}: the tokenizer ends text with id {tokenizer.eos_token_id} ({tokenizer.eos_token!r}), the model "
            f"with {ends}. They do not belong together."
        )
    if read_stage(path).get("tokenizer", tokenizer_hash(tokenizer)) != tokenizer_hash(tokenizer):
        raise UserError(
            f"{path}: the tokenizer is not the one this stage was trained with (stage.json has another hash). Put the "
            "stage's own tokenizer files back."
        )


def check_same_tokenizer(given: str | None, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError where --tokenizer names another tokenizer than the one a model was trained with."""
    if given and tokenizer_hash(load_tokenizer(given)) != tokenizer_hash(tokenizer):
        raise UserError(
            f"--tokenizer {given} is not the tokenizer of the model to go on from. Leave it out: a stage directory "
            "brings its own."
        )


def read_stage(path: str | Path) -> dict:
    """The record of a stage directory; empty for a checkpoint that other tools wrote."""
    file = Path(path) / "stage.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def weights_hash(path: str | Path) -> str:
    """A hash of the weight files of a stage directory."""
    return content_hash(sorted(Path(path).glob("*.safetensors")))


def provenance(path: Path) -> dict:
    """A stage directory as records name it: where it is, which stage, which weights; of an adapter also its base."""
    found = {"directory": str(path), "stage": read_stage(path).get("stage"), "weights": weights_hash(path)}
    if (path / "adapter_config.json").exists():
        found["base"] = provenance(adapter_base(path))
    return found


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide what a run computes."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
