"""`minimind merge`: an adapter and its base as one stage directory, compared with both before it
appears."""

import sys
from pathlib import Path

from minimind.common.directories import new_directory
from minimind.common.errors import UserError
from minimind.common.files import write_json
from minimind.export.verification import check_model, make_probes
from minimind.sharing import write_model_card
from minimind.stage_directory import (
    check_vocabulary,
    holds_reward_model,
    is_adapter,
    library_versions,
    load_adapter,
    load_model,
    loading_errors,
    provenance,
    read_stage,
    require_stage,
    weights_hash,
)
from minimind.tokenizer import load_tokenizer, tokenizer_hash


def merge(adapter: str | Path, out: str | Path) -> dict:
    """Write an adapter merged into its base as a stage directory in fp32; returns its `stage.json`.

    Raises:
        UserError: `adapter` is not an adapter, or the merged model differs from adapter and base.
    """
    path = require_stage(adapter)
    if not is_adapter(path):
        raise UserError(f"{path} is a complete model, not an adapter: there is nothing to merge.")
    tokenizer = load_tokenizer(path)
    model = load_adapter(path).eval()
    check_vocabulary(model, tokenizer, path)
    probes = make_probes(model, tokenizer)
    with new_directory(out) as partial:
        with loading_errors(path):
            merged = model.merge_and_unload()
        merged.config.use_cache = True
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        compared = check_model(probes, load_model(partial, scores=holds_reward_model(path)).eval())
        record = {
            "stage": "merge",
            "parent": provenance(path),
            "pipeline": read_stage(path).get("pipeline") or path.name,
            "weights": weights_hash(partial),
            "tokenizer": tokenizer_hash(tokenizer),
            "verification": compared,
            "command": " ".join(sys.argv),
            "python": sys.version.split()[0],
            "libraries": library_versions(),
        }
        write_json(partial / "stage.json", record)
        write_model_card(partial)
    return record
