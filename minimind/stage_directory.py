"""Stage directories from the reader's side: is this one, what does its record say, load its model.

    config.json  generation_config.json  model.safetensors  configuration_minimind.py  modeling_minimind.py
    tokenizer.json  tokenizer_config.json  chat_template.jinja  training_args.bin
    stage.json  run.json  report.html  train_log.jsonl  samples.jsonl  loss.png  mask_report.json (sft, dpo)

A LoRA stage has adapter_config.json and adapter_model.safetensors in place of config and weights;
its base is found through adapter_config.json. `run.json` is written first (see training/resume.py)
and `stage.json` last: a directory that has it is complete.
"""

import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers.dynamic_module_utils
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import align_special_tokens

from minimind.common.cache import content_hash
from minimind.common.errors import UserError, reason
from minimind.common.files import read_json, sibling_path, sync_files
from minimind.common.locks import lock, unlock
from minimind.tokenizer import load_tokenizer, tokenizer_hash
from minimind.tokenizer.loading import COPY

# What would run code of a directory is an error, and no question on standard input.
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
# "Loading weights", gone before it can be read at these sizes
transformers.utils.logging.disable_progress_bar()
# An old name that peft 0.21 still asks transformers for, nothing a user could mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "deepspeed",
    "gguf",
    "minimind-hf",
)
# Initialisations of LoRA that take something out of the base's weights by chance, data or
# quantisation: nothing warrants that it is the same again when the adapter is loaded. PiSSA by full
# SVD and OLoRA are computed again.
UNREPEATABLE_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")
FLOATS = (
    "F64",
    "F32",
    "F16",
    "BF16",
)  # of weights in a safetensors file; others would be taken for numbers they are not
# What is read of a stage's record and of generation settings, by name; other entries may be
# anything.
RECORD = (
    {"stage": str}
    | dict.fromkeys(("pipeline", "weights", "tokenizer"), str | None)
    | {"steps": int | None}
)
RECORD |= dict.fromkeys(("parent", "data", "metrics", "options", "libraries"), dict | None)
NUMBERS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "num_beams",
)
NUMBERS += ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size")
SETTINGS = dict.fromkeys(NUMBERS, int | float | None) | dict.fromkeys(
    ("pad_token_id", "bos_token_id"), int | None
)
SETTINGS |= dict.fromkeys(("do_sample", "output_attentions", "output_hidden_states"), bool | None)
SETTINGS |= {"eos_token_id": int | list | None}


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A hidden directory beside `path` to write into, which becomes `path` at the end, or nothing
    where that failed.

    Raises:
        UserError: `path` exists and is not an empty directory, or cannot be written.
    """
    path = Path(path).absolute()
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".{path.name}.partial")
    mark = ".minimind"  # the file by which what a killed process left is known for ours
    held = None
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"{path} exists and is not empty. Give a directory that does not exist yet, or"
                " remove it."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(path.with_name(f".{path.name}.lock"), str(path))
        if os.path.lexists(partial) and not is_leftover(partial, mark):
            raise UserError(
                f"{partial} is in the way, and not of ours. Move it away, or give another"
                " directory."
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / mark).touch()
    except OSError as error:
        unlock(held)
        raise UserError(f"{path} cannot be written: {error}") from error
    except UserError:
        unlock(held)
        raise
    try:
        yield partial
        sync_files(partial)
        partial.replace(path)
        (path / mark).unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        unlock(held)


def is_leftover(partial: Path, mark: str) -> bool:
    """Whether a directory holds our mark, the first thing written into it, or nothing yet."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return os.path.lexists(partial / mark) or not any(partial.iterdir())


def require_stage(path: str | Path) -> Path:
    """Return `path` if it is a stage directory with all that loading needs, each file of its kind.

    Raises:
        UserError: naming the file that is missing or does not read, and for an adapter also those
        of its base.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such directory. Expected a stage directory, the output of an earlier"
            " stage."
        )
    try:
        names = {file.name for file in path.iterdir()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
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
    check_weights(path, weights)
    if adapter:
        base_of(path)
        base = adapter_base(path)
        if not base.is_dir():
            raise UserError(
                f"{path} is an adapter, and its base {base} is gone. Move the base back, or put its"
                f" new path into base_model_name_or_path in {path / 'adapter_config.json'}."
            )
        require_stage(base)
    return path


def check_weights(path: Path, name: str) -> int:
    """How many tensors the safetensors file `name` of a directory has, or the shards that stand in
    its index.

    Raises:
        UserError: one of these files does not read, or holds other things than weights.
    """
    files, count = [path / name], 0
    if not os.path.lexists(path / name):
        files = [path / shard for shard in shards_of(path, name)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file, or not a regular one. {COPY}")
        try:
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in names}
        except Exception as error:  # of safetensors or the system
            raise UserError(
                f"{file}: not a safetensors file, or cut off ({error}). {COPY}"
            ) from error
        if other := {key: dtype for key, dtype in dtypes.items() if dtype not in FLOATS}:
            key, dtype = next(iter(other.items()))
            raise UserError(
                f"{file}: {key} is of type {dtype}, expected weights as {', '.join(FLOATS)}. {COPY}"
            )
        count += len(dtypes)
    return count


def shards_of(path: Path, name: str) -> list[str]:
    """The names of the files that the index of `name` lists; raises UserError where one would lie
    elsewhere."""
    index = path / f"{name}.index.json"
    shards = read_json(index, COPY, fields={"weight_map": dict})["weight_map"].values()
    if not shards:
        raise UserError(f"{index}: found no shard, expected the names of files beside it. {COPY}")
    return sorted({sibling_path(index, shard).name for shard in shards})


def is_adapter(path: Path) -> bool:
    """Whether a directory says that it is an adapter."""
    return os.path.lexists(path / "adapter_config.json")


def adapter_base(path: Path) -> Path:
    """The stage directory that an adapter was trained on; a relative path is relative to the
    adapter."""
    fields = {"base_model_name_or_path": str | None, "peft_type": str}
    base = (
        read_json(path / "adapter_config.json", COPY, fields=fields).get("base_model_name_or_path")
        or "?"
    )
    return path / base if not Path(base).is_absolute() else Path(base)


def base_of(path: Path) -> Path:
    """The directory of the whole model under an adapter, which may be trained on another one;
    raises UserError."""
    seen: set[Path] = set()
    while is_adapter(path):
        if path.resolve() in seen:
            raise UserError(
                f"{path} is an adapter whose base leads back to itself. Put the path of the model"
                " it was trained on into base_model_name_or_path in"
                f" {path / 'adapter_config.json'}."
            )
        seen.add(path.resolve())
        path = adapter_base(path)
    return path


def load_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a stage directory's model, of an adapter that of its base; raises
    UserError."""
    path = base_of(require_stage(path))
    file = path / "config.json"
    # The library would take other weights than those beside the file, by the last of these names.
    fields = {
        "model_type": str,
        "architectures": list | None,
        "dtype": str | None,
        "transformers_weights": type(None),
    }
    read_json(file, COPY, fields=fields)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library's classes raise anything for values of other types
        words = reason(error)
        remedy = "See docs/security.md." if "never run" in words else COPY
        raise UserError(f"{file} is no configuration of a model: {words}. {remedy}") from error
    layers, tensors = (
        getattr(config, "num_hidden_layers", 0),
        check_weights(path, "model.safetensors"),
    )
    if layers > tensors:  # building them all might take the whole memory
        raise UserError(
            f"{file}: num_hidden_layers is {layers:,}, and the weights have {tensors} tensors."
            f" {COPY}"
        )
    return config


def check_generation_config(path: Path) -> None:
    """Raises UserError for generation settings that do not read: the library goes without them, or
    fails later."""
    file = path / "generation_config.json"
    if not os.path.lexists(file):
        return
    settings = read_json(file, COPY, fields=SETTINGS)
    try:
        torch.tensor(settings.get("eos_token_id") or 0, dtype=torch.long)
        GenerationConfig.from_dict(settings)
    except Exception as error:
        raise UserError(f"{file} holds no generation settings: {reason(error)}. {COPY}") from error


def check_kind(config: PreTrainedConfig, path: str | Path) -> None:
    """Raises UserError where a model is of another kind than the stages train."""
    if config.model_type != "minimind":
        raise UserError(
            f"{path} holds a model of the kind {config.model_type!r}, and the stages train"
            " MiniMind's. Where it fits, 'minimind import' makes one of it."
        )


def load_model(path: str | Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load the causal LM of a stage directory in fp32; an adapter is merged into its base.

    Raises:
        UserError: the directory is not a stage directory, its files cannot be read, or do not
        belong together.
    """
    path = require_stage(path)
    if is_adapter(path):
        model = load_adapter(path, attn_implementation)
        with told(path):
            model = model.merge_and_unload()
        # Peft had frozen the base, and a merged model is trained like any other
        model.requires_grad_(True)
        return model
    architectures = load_config(path).architectures or []
    if any("SequenceClassification" in str(name) for name in architectures):
        raise UserError(
            f"{path} holds a reward model, which scores replies and writes none. Give a language"
            " model."
        )
    check_generation_config(path)
    check_unchanged(path)
    with told(path):
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
        )
    check_fit(path, found["missing_keys"], found["unexpected_keys"])
    return model


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Whatever a library raises while it loads the model in `path` becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = reason(error)
        if "ignore_mismatched_sizes" in words:  # the library's, in a table
            words = "its tensors have other shapes than its configuration says, see above"
        raise UserError(f"the model in {path} cannot be loaded: {words}") from error


def check_fit(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises UserError where weights and configuration have other tensors: a library takes random
    ones for those that are missing, and leaves the others out."""
    kinds = {"missing": sorted(missing), "not of this model": sorted(unexpected)}
    found = [
        f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in kinds.items() if names
    ]
    if found:
        raise UserError(
            f"the weights in {path} do not fit its configuration: {'; '.join(found)}. Put back the"
            " files that belong together."
        )


def load_adapter(path: Path, attn_implementation: str | None = None) -> PeftModel:
    """Load an adapter on its base, both in fp32 and not merged.

    Raises:
        UserError: it is of a kind that cannot be merged, or its base as it was trained on cannot be
        had again.
    """
    with told(path):
        config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        raise UserError(
            f"{path} holds {config.peft_type.value.lower().replace('_', ' ')}: tokens in front of"
            " the text, which no weights can express, so it can be neither merged, exported nor"
            " trained on. Use it through peft (docs/export.md), or train a LoRA adapter."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(UNREPEATABLE_INITS):
        raise UserError(
            f"{path} was started with init_lora_weights={init!r}, which changes the base's weights,"
            " and nothing warrants that loading it changes them in the same way. Give peft's"
            " save_pretrained path_initial_model_for_weight_conversion, which makes a plain LoRA"
            " adapter of it, or train with init_lora_weights='pissa'."
        )
    check_unchanged(path)
    base = load_model(adapter_base(path), attn_implementation)
    # A chat template's end token may not be the base's
    align_special_tokens(base, load_tokenizer(path))
    with told(path), warnings.catch_warnings():
        # They are an error below
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(base, path, config=config)
        # Once more: the first time says nothing
        found = model.load_adapter(path, model.active_adapter)
    check_fit(path, found.missing_keys, found.unexpected_keys)
    layers = {
        name
        for name in ("embed_tokens", "lm_head")
        for key in model.state_dict()
        if f"{name}.lora_" in key
    }
    if base.config.tie_word_embeddings and layers:
        raise UserError(
            f"{path} adapts {' and '.join(sorted(layers))}, but embedding and output layer are one"
            " matrix in this model, and peft merges such an adapter wrongly. Train with"
            " --lora_modules_to_save embed_tokens instead, which gives the two layers weights of"
            " their own."
        )
    return model


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: str | Path
) -> None:
    """Raises UserError where the tokenizer has ids that the model has not, other special tokens, or
    was exchanged."""
    vocab_size = model.config.vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer):,} tokens, the model {vocab_size:,}. They"
            " do not belong together; give the stage directory that holds both."
        )
    ends = (
        model.config.eos_token_id
        if isinstance(model.config.eos_token_id, list)
        else [model.config.eos_token_id]
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


def check_same_tokenizer(given: str | None, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError where --tokenizer names another tokenizer than the one a model was trained
    with."""
    if given and tokenizer_hash(load_tokenizer(given)) != tokenizer_hash(tokenizer):
        raise UserError(
            f"--tokenizer {given} is not the tokenizer of the model to go on from. Leave it out: a"
            " stage directory brings its own."
        )


def read_stage(path: str | Path) -> dict:
    """The record of a stage directory; empty for a checkpoint that other tools wrote. Raises
    UserError."""
    file = Path(path) / "stage.json"
    remedy = "The model can be used without this record: copy the file again, or delete it."
    return read_json(file, remedy, fields=RECORD) if os.path.lexists(file) else {}


def weights_hash(path: str | Path) -> str:
    """A hash of the weight files of a stage directory."""
    return content_hash(file for file in sorted(Path(path).glob("*.safetensors")) if file.is_file())


def check_unchanged(path: Path) -> None:
    """Raises UserError where a directory's weights are not those that its stage.json names: what a
    power loss leaves may have the right size and zeros in it."""
    named = read_stage(path).get("weights")
    if named and named != weights_hash(path):
        raise UserError(
            f"{path}: the weights are not those of this stage (stage.json has another hash). Put"
            " the stage's own files back, or delete stage.json to use these all the same."
        )


def provenance(path: Path) -> dict:
    """A stage directory as records name it: where it is, which stage, which weights; of an adapter
    also its base."""
    found = {
        "directory": str(path),
        "stage": read_stage(path).get("stage"),
        "weights": weights_hash(path),
    }
    if is_adapter(path):
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
