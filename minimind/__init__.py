"""MiniMind on the HuggingFace stack. After `import minimind`, AutoConfig and AutoModel... know the
model.

The import takes milliseconds: torch and transformers are loaded with the model, when it is asked
for by its name here or by transformers' Auto classes. For these the model is announced as
transformers' own are, by the name of its class, which is looked up in its module on first use.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

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


def __getattr__(name: str):
    """A class of the model, which is loaded and registered with the first one."""
    if name not in __all__:
        raise AttributeError(f"module 'minimind' has no attribute {name!r}")
    return getattr(importlib.import_module("minimind.model"), name)


def _announce(auto_config) -> None:
    """Let the mapping of `AutoConfig` find MiniMindConfig in this package, by the mapping's own
    lazy look-up."""
    auto_config.CONFIG_MAPPING._mapping["minimind"] = "MiniMindConfig"
    auto_config.CONFIG_MAPPING._modules["minimind"] = sys.modules[__name__]


class _Announcer(MetaPathFinder):
    """Waits for transformers' `AutoConfig` to be imported, to announce the model, and then is gone.

    It only enters a name: the model itself cannot be imported here, in the middle of transformers'
    own imports.
    """

    def find_spec(self, name, path=None, target=None):
        """The spec of `AutoConfig`'s module, whose execution ends with the announcement; None for
        all others."""
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
