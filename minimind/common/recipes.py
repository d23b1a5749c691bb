"""Recipes: YAML files, of the training stages and of cleaning alike; and the DeepSpeed JSON that
they name."""

import json
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

# Of one recipe; an alias counts as often as it is used
MOST_BYTES, MOST_DEPTH, MOST_VALUES = 2**20, 50, 10_000


class RecipeLoader(yaml.SafeLoader):
    """YAML's plain values; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Called for each mapping."""
        names = [
            key.value
            for key, _ in node.value
            if isinstance(key, yaml.ScalarNode) and key.value != "<<"
        ]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_recipe(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: the file cannot be read, or is not YAML.
    """
    try:
        if Path(path).is_fifo() and not str(path).startswith("/dev/fd/"):  # of a shell: <(...)
            raise UserError(
                f"{path}: found a pipe, expected a YAML file. Nothing may ever be written to it."
            )
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # a device would never end
        if len(content) > MOST_BYTES:
            raise UserError(
                f"{path}: found more than {MOST_BYTES:,} bytes, expected a YAML file of some lines."
            )
        text = content.decode("utf-8-sig")
        _check_depth(path, text)
        recipe = yaml.load(text, RecipeLoader)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{path}: cannot be read ({reason}). The recipes are in configs/."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: found bytes that are not UTF-8, expected a YAML file.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(
            f"{place}: not YAML ({getattr(error, 'problem', None) or error}). Mend the file."
        ) from None
    except ValueError as error:  # a date that is none; a path with NUL
        raise UserError(f"{path}: not YAML ({error}). Mend the file.") from None
    _check_size(path, recipe)
    return recipe


def _check_depth(path: str | Path, text: str) -> None:
    """Raises UserError for lists and mappings deep within each other, at which the loader takes
    minutes."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
            event, yaml.CollectionEndEvent
        )
        if depth > MOST_DEPTH:
            raise UserError(
                f"{path}: found lists or mappings more than {MOST_DEPTH} deep. Write it plainly."
            )


def _check_size(path: str | Path, recipe: Any) -> None:
    """Raises UserError where a recipe's aliases make more of it than anyone can have meant."""
    waiting, count = [recipe], 0
    while waiting:
        value, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise UserError(
                f"{path}: found more than {MOST_VALUES:,} values, perhaps by aliases. Write it"
                " plainly."
            )
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def read_deepspeed(given: str | Path | dict) -> dict:
    """The DeepSpeed configuration of `--deepspeed`: a JSON file, JSON itself, or what was parsed
    already.

    Raises:
        UserError: it cannot be read, or a block of it is no object.
    """
    where, remedy = "--deepspeed", "--deepspeed expects a DeepSpeed JSON, as ds_config_zero2.json."
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
