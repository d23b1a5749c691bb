"""Libraries that only cleaning needs: the extra `data`."""

import importlib
from importlib import metadata
from types import ModuleType

from minimind.common.errors import UserError, install


def require(module: str, extra: str = "data") -> ModuleType:
    """Import a library of an extra; raises UserError naming the extra if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"found no usable {module} ({error}), expected the libraries that clean data. "
            f"Install them: {install(extra)}"
        ) from None


def version(package: str) -> str:
    """The version of an installed distribution; raises UserError if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        require(package.replace("-", "_"))
        raise
