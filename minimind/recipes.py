"""Recipes: YAML files, of the training stages and of cleaning alike."""

from pathlib import Path
from typing import Any

import yaml

from minimind.errors import UserError


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
