"""The READMEs: links and table; for their commands see test_guides.py. The scripts: which Python
they use."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_zh.md")


@pytest.mark.parametrize("name", READMES)
def test_every_picture_and_page_that_is_linked_is_there(name):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_in_the_readmes_is_that_of_one_quickstart():
    tables = [
        re.search(
            r"<!-- quickstart:begin -->(.*?)<!-- quickstart:end -->",
            (ROOT / name).read_text("utf-8"),
            re.S,
        )
        for name in READMES
    ]
    assert tables[0][1] == tables[1][1]
    assert "held-out questions right" in tables[0][1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name
)
def test_every_script_is_valid_and_stops_at_the_first_error(path):
    subprocess.run(["bash", "-n", path], check=True)
    if path.name != "environment.sh":  # which is sourced by the others
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")
        assert os.access(path, os.X_OK)


@pytest.fixture
def environment_of(tmp_path):
    """Source environment.sh in a checkout whose environments are made, with stand-ins for
    interpreters by version."""
    for name in ("pyproject.toml", "constraints.txt", "scripts/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    pins = subprocess.check_output(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=tmp_path, text=True
    )

    def executable(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    for version in ("3.11", "3.12"):
        executable(f".venv-{version}/bin/python", "exit")
        executable(f".venv-{version}/bin/activate", f"echo .venv-{version}")
        (tmp_path / f".venv-{version}/installed").write_text(pins)
        executable(f"bin/python{version}", f"echo {version}")
    executable("bin/python3.13", "echo 3.13; exit 1")

    def source(python):
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": python,
        }
        script = ["bash", "-c", "set -euo pipefail; source scripts/environment.sh"]
        return subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return source


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_each_requested_python_has_its_own_environment(environment_of, version):
    assert environment_of(f"python{version}").stdout == f".venv-{version}\n"


def test_an_unsupported_or_missing_python_is_one_clear_error(environment_of):
    for python, found in (
        ("python3.13", "Python 3.13"),
        ("no/python", "not an interpreter that starts"),
    ):
        done = environment_of(python)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: PYTHON={python} is {found}; Python 3.11 or 3.12 is needed\n"
