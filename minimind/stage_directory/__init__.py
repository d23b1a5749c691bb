"""The directory a stage writes, as the next one reads it: checks, record, model.

    config.json  generation_config.json  model.safetensors
    configuration_minimind.py  kernels_minimind.py  modeling_minimind.py
    tokenizer.json  tokenizer_config.json  chat_template.jinja  training_args.bin
    stage.json  run.json  README.md  report.html  train_log.jsonl  samples.jsonl  loss.png
    mask_report.json (sft, dpo, reward)  score_card.json (`minimind card`)

A LoRA stage has adapter_config.json and adapter_model.safetensors instead of configuration, weights
and code; adapter_config.json names its base. `run.json` is written first (see training/resume.py)
and `stage.json` last: a directory that has it is complete.
"""

# ruff: noqa: F401 (the public names of this room)

from minimind.stage_directory.contents import is_adapter, require_stage, shards_of
from minimind.stage_directory.lineage import Ancestor, find_origin, lineage, stage_records
from minimind.stage_directory.loading import (
    GENERATION_FIELDS,
    auto_class,
    check_fit,
    check_kind,
    check_same_tokenizer,
    check_scores,
    check_vocabulary,
    holds_reward_model,
    is_reward_config,
    load_adapter,
    load_config,
    load_for_reading,
    load_model,
    loading_errors,
    reward_config,
    virtual_tokens,
    with_score_head,
)
from minimind.stage_directory.record import library_versions, provenance, read_stage, weights_hash
