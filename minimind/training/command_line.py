"""A command line and its YAML recipe -> typed arguments."""

import argparse
import copy
import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minimind.common.errors import UserError
from minimind.common.launch import prepare_launch
from minimind.common.options import option_names, suggestion
from minimind.common.recipes import read_deepspeed, read_recipe
from minimind.data.bad_rows import shown
from minimind.training.arguments import StageConfig
from minimind.training.output_directory import check_output_directory
from minimind.training.parser import StageParser


def parse(*dataclass_types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill the dataclasses from `--config recipe.yaml`, overridden by the command line.

    The recipe's values are read as words of the command line, so that both pass the same checks.

    Raises:
        UserError: an unknown key or option, a value of the wrong type, or an unreadable recipe.
    """
    parser = StageParser(dataclass_types)
    options = vars(read_options(parser, sys.argv[1:] if argv is None else argv))
    deepspeed = options.get("deepspeed")
    if deepspeed is not None:
        read_deepspeed(deepspeed)  # the library would fail with a traceback
    prepare_launch(uses_deepspeed=deepspeed is not None)
    try:
        parsed = _filled(dataclass_types, options)
    except UserError:
        raise
    except Exception as error:  # the libraries reject a value in many ways
        raise UserError(_misfit(parser, options, error)) from error
    for arguments in parsed:
        if isinstance(arguments, StageConfig):
            check_output_directory(Path(arguments.output_dir))
    return parsed


def _filled(dataclass_types: Iterable[type], options: dict[str, Any]) -> tuple[Any, ...]:
    """The dataclasses with these options; raises what their checks raise."""
    options = copy.deepcopy(options)
    return tuple(
        kind(**{each.name: options[each.name] for each in dataclasses.fields(kind) if each.init})
        for kind in dataclass_types
    )


def _misfit(parser: StageParser, options: dict[str, Any], error: Exception) -> str:
    """Describe why options do not fit together, with the name of the option that is to blame."""
    text = str(error)
    if not (isinstance(error, ValueError) and text):
        text = f"{type(error).__name__}: {error}"
    message = f"the arguments do not fit together: {text}"
    if any(f"--{name}" in text for name in options):
        return message

    # It is the first one whose default value removes the error
    for name, value in options.items():
        if value != (default := parser.get_default(name)):
            with suppress(Exception):
                _filled(parser.dataclass_types, options | {name: default})
                return f"--{name} {shown(value)}: {message}"
    return message


def parse_options(*dataclass_types: type, argv: Sequence[str]) -> Namespace:
    """The same as one namespace, without building the dataclasses: no device is set up, and the
    options are not checked together.

    Raises:
        UserError: an unknown key or option, a value of the wrong type, or an unreadable recipe.
    """
    return read_options(StageParser(dataclass_types), argv)


def read_options(parser: StageParser, argv: Sequence[str]) -> Namespace:
    """The options of a command line and its `--config`; raises UserError for unknown or wrong
    ones."""
    options, others = parser.parse_known_args(with_recipe(parser, argv))
    if others:
        unknown = [word for word in others if word.startswith("--")] or others
        hint = suggestion(unknown, option_names(parser), "--")
        raise UserError(f"unknown option {', '.join(unknown)}.{hint}")
    return options


def with_recipe(parser: StageParser, argv: Sequence[str]) -> list[str]:
    """A command line with the words of its `--config` in front; raises UserError."""
    split = [word.split("=", 1) if word.startswith("--config=") else [word] for word in argv]
    words = [word for each in split for word in each]
    while "--config" in words:
        position = words.index("--config")
        if position + 1 == len(words):
            raise UserError("--config needs the path of a YAML recipe.")
        path = Path(words[position + 1])
        recipe = _recipe_words(path, parser)
        try:
            parser.parse_known_args(recipe)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        words = recipe + words[:position] + words[position + 2 :]
    return words


def _recipe_words(path: Path, parser: StageParser) -> list[str]:
    """The values of a YAML recipe as words of a command line."""
    recipe = read_recipe(path)
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected 'name: value' lines, found {type(recipe).__name__}.")
    known = option_names(parser)
    unknown = [str(key) for key in recipe if key not in known]
    if unknown:
        raise UserError(f"{path}: unknown key {', '.join(unknown)}.{suggestion(unknown, known)}")
    actions = {action.dest: action for action in reversed(parser._actions)}  # --NAME, not --no_NAME
    words = []
    for key, value in recipe.items():
        if value is not None:
            words += _words(f"{path}: {key}", actions[key], parser.kinds[key], value)
    return words


def _words(place: str, action: argparse.Action, kinds: set[type], value: Any) -> list[str]:
    """One key of a recipe as words of a command line; raises UserError where its value has a shape
    that the option does not take."""
    option, several = f"--{action.dest}", action.nargs == "+"
    if isinstance(value, dict):
        if dict not in kinds:
            raise UserError(f"{place}: found 'name: value' lines, expected one value.")
        return [f"{option}={json.dumps(value, default=str)}"]
    if isinstance(value, list) and list in kinds and not several and len(value) == 1:
        value = value[0]  # the library takes several, its command line takes one
    if not isinstance(value, list):
        # YAML reads an unquoted no as false.
        return [f"{option}={'no' if value is False and 'no' in (action.choices or ()) else value}"]
    if not several:
        raise UserError(f"{place}: found a list, expected one value.")
    if any(isinstance(each, dict | list | None) or str(each).startswith("--") for each in value):
        raise UserError(f"{place}: found {str(value)[:80]}, expected a list of names or numbers.")
    return [option, *map(str, value)]
