"""The common model tests of transformers, which only its source distribution holds."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from minimind.common.cache import cache_directory
from minimind.common.errors import UserError

# What the common tests import and the distribution leaves out. Generation and export are thereby
# not tested here, and the values that a configuration has to accept are ours.
STAND_INS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin: ...",
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
    "utils/test_configuration_utils.py": (
        """config_common_kwargs = {
        "chunk_size_feed_forward": 5,
        "dtype": "float16",
        "output_hidden_states": True,
        "problem_type": "regression",
        "return_dict": False,
    }"""
    ),
}


def download() -> Path:
    """The source distribution of the installed transformers, downloaded once into the cache.

    Raises:
        UserError: pip cannot download it: the package index does not answer, or does not have it.
    """
    requirement = f"transformers=={version('transformers')}"
    archive = cache_directory() / "conformance" / f"{requirement.replace('==', '-')}.tar.gz"
    if archive.exists():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".partial-") as partial:
        # pip checks the hash, and has setuptools tell the distribution's metadata: the installed
        # one, so that this downloads nothing else. It builds nothing.
        options = [
            "--no-deps",
            "--no-binary=transformers",
            "--no-build-isolation",
            "--retries=1",
            "--timeout=30",
        ]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *options,
            f"--dest={partial}",
            requirement,
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise UserError(
                "pip could not download the source distribution of"
                f" {requirement}:\n{run.stderr.strip()}"
            )
        (Path(partial) / archive.name).replace(archive)
    return archive


def unpack(archive: Path, directory: Path) -> None:
    """Write the distribution's package `tests` into `directory`, stand-ins for what it imports and
    lacks included."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(f"{root}/tests/"):
                tar.extract(
                    member.replace(name=member.name.removeprefix(f"{root}/")),
                    directory,
                    filter="data",
                )
    for name, source in STAND_INS.items():
        path = directory / "tests" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(source, encoding="utf-8")
