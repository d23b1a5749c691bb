"""Recipes: the YAML files of training stages and of cleaning, and the DeepSpeed JSON they name."""

import json
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from minimind.common.errors import UserError
from minimind.common.files import read_json, require_fields

DEEPSPEED_BLOCKS = dict.fromkeys(
    ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16"), dict | None
)
OFFLOADING = dict.fromkeys(("offload_optimizer", "offload_param"), dict | None)

# Limits of one recipe; an alias counts as often as it is used
MOST_BYTES, MOST_DEPTH, MOST_VALUES = 2**20, 50, 10_000


# libyaml's parser takes a tenth of the time; a PyYAML that was built without it has only its own
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RecipeLoader(SafeLoader):
    """Loads YAML's plain values; a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Called for each mapping."""
        keys = (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in Counter(keys).items():
            if count > 1 and name != "<<":
                problem = f"the key {name} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path) -> Any:
    """The content of a YAML file; raises UserError if it cannot be read, or is not YAML."""
    try:
        if Path(path).is_fifo() and not str(path).startswith("/dev/fd/"):  # of a shell: <(...)
            raise UserError(
                f"{path}: found a pipe, expected a YAML file. Perhaps nothing ever writes to it."
            )
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # a device would never end
        if len(content) > MOST_BYTES:
            raise UserError(
                f"{path}: found more than {MOST_BYTES:,} bytes, expected a short YAML file."
            )
        text = content.decode("utf-8-sig")
        _check_depth(path, text)
        recipe = yaml.load(text, RecipeLoader)
        _check_size(path, recipe)
        return recipe
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        message = f"{path}: cannot be read ({reason}). The recipes are in configs/."
        raise UserError(message) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: found bytes that are not UTF-8, expected a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or error
        raise UserError(f"{place}: not YAML ({problem}). Fix the file.") from None
    except ValueError as error:  # an impossible date; a path with NUL
        raise UserError(f"{path}: not YAML ({error}). Fix the file.") from None


def _check_depth(path: str | Path, text: str) -> None:
    """Raise UserError for deeply nested lists and mappings, which would take the loader minutes."""
    depth = 0
    for event in yaml.parse(text, SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise UserError(
                f"{path}: found lists or mappings more than {MOST_DEPTH} deep. Simplify it."
            )


def _check_size(path: str | Path, recipe: Any) -> None:
    """Raise UserError if a recipe, with its aliases, has more values than anyone can mean."""
    pending, count = [recipe], 0
    while pending:
        value, count = pending.pop(), count + 1
        if count > MOST_VALUES:
            raise UserError(
                f"{path}: found more than {MOST_VALUES:,} values, perhaps by aliases. Simplify it."
            )
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value


def read_deepspeed(value: str | Path | dict) -> dict:
    """The DeepSpeed configuration from `--deepspeed`: a JSON file, JSON text, or a parsed object.

    Raises:
        UserError: it cannot be read, or a block of it is not an object.
    """
    where, remedy = "--deepspeed", "--deepspeed expects a DeepSpeed JSON, as ds_config_zero2.json."
    config = value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            config = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--deepspeed {value[:80]} is not JSON: {error}. {remedy}") from error
    elif not isinstance(value, dict):
        where, config = f"--deepspeed {value}", read_json(value, remedy)
    require_fields(where, config, DEEPSPEED_BLOCKS, remedy)
    require_fields(where, config.get("zero_optimization") or {}, OFFLOADING, remedy)
    return config
