"""The definition of a run: everything that decides its result, as JSON, and how two runs differ."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from minimind.common.recipes import read_deepspeed
from minimind.stage_directory import library_versions, weights_hash
from minimind.tokenizer import tokenizer_hash

# Arguments that may change: where a run is written, what it reports and how data reaches it, not
# what it computes.
HARMLESS_NAMES = """
    output_dir overwrite_output_dir resume_from_checkpoint allow_changed_recipe run_name
    report_to project trackio_bucket_id trackio_space_id trackio_static_space_id push_to_hub
    hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    disable_tqdm log_level log_level_replica log_on_each_node logging_strategy
    logging_first_step logging_steps logging_nan_inf_filter include_num_input_tokens_seen
    save_strategy save_steps save_total_limit save_on_each_node save_only_model
    enable_jit_checkpoint local_rank on_findings do_train do_eval do_predict eval_strategy
    eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object per_device_eval_batch_size prediction_loss_only batch_eval_metrics
    include_for_metrics skip_memory_metrics dataloader_num_workers dataloader_prefetch_factor
    dataloader_pin_memory dataloader_persistent_workers dataloader_multiprocessing_context
    dataset_num_proc ddp_timeout restore_callback_states_from_checkpoint torch_empty_cache_steps
    debug eval_pairs max_eval_pairs sample_steps sample_prompts sample_tokens model_config tokenizer
    model_name_or_path trust_remote_code model_revision
"""
HARMLESS = frozenset(HARMLESS_NAMES.split())
# Evaluations do matter where they stop the run or choose its weights.
EVALUATIONS = {"eval_strategy", "eval_steps", "eval_delay", "eval_pairs"}
# Without these the files of a checkpoint fit neither the model nor the optimizer.
DECISIVE = (
    *("stage", "model", "tokenizer", "optim", "deepspeed", "use_peft", "peft_type"),
    *("num_virtual_tokens", "lora_r"),
    *("lora_target_modules", "lora_target_parameters", "modules_to_save", "use_dora"),
)
INFORMATION = ("libraries", "device", "threads")  # may change the last bits: reported, not refused
LENGTH = ("max_steps", "num_train_epochs", "time_budget")
WORLD = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")


def definition_of(
    name: str, args, data, model, tokenizer, parent: Path | None, options: Iterable
) -> dict:
    """Everything that decides the result of a stage, as JSON: arguments, data, model, tokenizer,
    first weights and the number of processes; for information also the versions of the libraries,
    the device and its threads."""
    definition: dict[str, Any] = {}

    # The arguments that matter
    early_stopping = getattr(args, "early_stopping_patience", None) is not None
    ignored = HARMLESS - EVALUATIONS if args.load_best_model_at_end or early_stopping else HARMLESS
    for source in (args, *options):
        names = [field.name for field in dataclasses.fields(source) if field.name not in ignored]
        definition |= {name: getattr(source, name) for name in names}
    if getattr(args, "use_muon", False):
        definition["optim"] = "muon"
    if isinstance(args.deepspeed, str):
        definition["deepspeed"] = read_deepspeed(args.deepspeed)

    if definition.get("eval_pairs"):  # their content: the file may be elsewhere today
        texts = [[each[:3] for each in pairs] for pairs in args.held_out_pairs().values()]
        definition["eval_pairs"] = xxhash.xxh3_64_hexdigest(repr(texts).encode())

    # The model, without what the library adds to its configuration
    config = model.config.to_dict()
    for key in ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"):
        config.pop(key, None)

    parts = {part: facts for part, facts in data.facts.items() if isinstance(facts, dict)}
    definition |= {
        "stage": name,
        "data": _without_files(parts),
        "model": config,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": xxhash.xxh3_64_hexdigest((tokenizer.chat_template or "").encode()),
        "starts_from": weights_hash(parent) if parent else None,
        "processes": args.world_size,
        "libraries": library_versions(),
        "device": args.device.type,
        "threads": torch.get_num_threads() if args.device.type == "cpu" else None,
    }
    text = json.dumps(definition, default=lambda value: getattr(value, "value", None) or str(value))
    return json.loads(text)


def _without_files(facts: Any) -> Any:
    """Counts and hashes of the data, without paths: the same content may be elsewhere today."""
    if isinstance(facts, dict):
        return {key: _without_files(value) for key, value in facts.items() if key != "files"}
    return [_without_files(value) for value in facts] if isinstance(facts, list) else facts


def differences(saved: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ (nested ones as a.b) with both values, None where one is
    missing."""
    old, new = dict(flat(saved)), dict(flat(now))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def flat(value: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested JSON object as ("a.b", value)."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def changed(saved: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """The differences that make it another run.

    Another number of processes alone does not, as long as the command sets the same rows per step,
    or leaves the batch as it was: elastic.py then shares the rows out again.
    """
    changes, ignored = differences(saved, now), INFORMATION
    if "processes" in changes:
        old, new = ([each.get(key) or 1 for key in WORLD] for each in (saved, now))
        if old[1:] == new[1:] or math.prod(old) == math.prod(new):
            ignored += WORLD
    return {key: values for key, values in changes.items() if not is_about(key, ignored)}


def is_about(key: str, names: Iterable[str]) -> bool:
    """Whether a key of `differences` is one of the names, or inside one."""
    return key.split(".")[0] in names


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """Changed keys as aligned lines: name, old value -> new value."""
    width, lines = max(map(len, changes)), []
    for key, values in changes.items():
        old, new = (json.dumps(value, ensure_ascii=False)[:80] for value in values)
        lines.append(f"  {key:<{width}}  {old} -> {new}")
    return "\n".join(lines)
