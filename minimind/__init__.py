"""MiniMind on the HuggingFace stack. After `import minimind`, the Auto classes know the model.

The import takes milliseconds: torch and transformers are loaded with the model, on the first use of
a class of it, here or through transformers' Auto classes. These know the model as they know
transformers' own: by the name of its configuration class, which they look up on first use.

Settings of the process that must come before torch are made too, see `minimind.common.process`.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

from minimind.common.process import prepare_process

if TYPE_CHECKING:
    from minimind.model import (
        MiniMindConfig,
        MiniMindForCausalLM,
        MiniMindForSequenceClassification,
        MiniMindModel,
    )

__all__ = [
    "MiniMindConfig",
    "MiniMindForCausalLM",
    "MiniMindForSequenceClassification",
    "MiniMindModel",
]

AUTO_CONFIG = "transformers.models.auto.configuration_auto"

prepare_process()


def __getattr__(name: str):
    """A class of the model; the first access loads and registers them all."""
    if name not in __all__:
        raise AttributeError(f"module 'minimind' has no attribute {name!r}")
    return getattr(importlib.import_module("minimind.model"), name)


def _announce(auto_config) -> None:
    """Let `AutoConfig` find MiniMindConfig in this package, by its own lazy look-up."""
    auto_config.CONFIG_MAPPING._mapping["minimind"] = "MiniMindConfig"
    auto_config.CONFIG_MAPPING._modules["minimind"] = sys.modules[__name__]


class _Announcer(MetaPathFinder):
    """Wait until transformers' `AutoConfig` is imported, announce the model, and disappear.

    Only a name is entered: the model itself cannot be imported in the middle of transformers' own
    imports.
    """

    def find_spec(self, name, path=None, target=None):
        """The spec of `AutoConfig`'s module, extended by the announcement; None for others."""
        if name != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_announce(module):
            execute(module)
            _announce(module)

        spec.loader.exec_module = execute_and_announce
        return spec


if AUTO_CONFIG in sys.modules:
    _announce(sys.modules[AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _Announcer())
