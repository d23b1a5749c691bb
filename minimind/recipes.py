"""Recipes: YAML files, of the training stages and of cleaning alike; and the DeepSpeed JSON that they name."""

import json
from pathlib import Path
from typing import Any

import yaml

from minimind.errors import UserError
from minimind.records import read_json, require_fields

DEEPSPEED_BLOCKS = dict.fromkeys(("zero_optimization", "optimizer", "scheduler", "fp16", "bf16"), dict | None)
OFFLOADING = dict.fromkeys(("offload_optimizer", "offload_param"), dict | None)


def read_recipe(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror.lower()}). The recipes are in configs/.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: found bytes that are not UTF-8, expected a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not YAML ({getattr(error, 'problem', None) or error}). Mend the file.") from None


def read_deepspeed(given: str | Path | dict) -> dict:
    """The DeepSpeed configuration of `--deepspeed`: a JSON file, JSON itself, or what was parsed already.

    Raises:
        UserError: it cannot be read, or a block of it is no object.
    """
    where, remedy = "--deepspeed", "Expected a DeepSpeed JSON, as ds_config_zero2.json."
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--deepspeed {given[:80]} is not JSON: {error}. {remedy}") from error
    elif not isinstance(given, dict):
        where, given = f"--deepspeed {given}", read_json(given, remedy)
    require_fields(where, given, DEEPSPEED_BLOCKS, remedy)
    zero = given.get("zero_optimization") or {}
    require_fields(where, zero, OFFLOADING, remedy)
    return given
