"""The READMEs: their commands exist, both languages say the same."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from minimind.cli import build_parser

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_zh.md")


def blocks(name, language="bash"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def commands(name):
    lines = [line.split("#")[0].strip() for block in blocks(name) for line in block.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def test_both_readmes_have_the_same_commands():
    assert commands("README.md") == commands("README_zh.md")
    assert blocks("README.md", "python") != []


@pytest.mark.parametrize("name", READMES)
def test_every_file_that_a_command_names_is_there(name):
    named = {
        word for line in commands(name) for word in line.split() if re.match(r"(configs|scripts)/|\w+\.py$|ds_", word)
    }
    assert len(named) > 10
    assert [word for word in named if not (ROOT / word).exists()] == []


@pytest.mark.parametrize("name", READMES)
def test_every_minimind_command_parses(name):
    lines = [line for line in commands(name) if line.startswith("minimind ")]
    assert len(lines) >= 4
    for line in lines:
        words = re.findall(r'"[^"]*"|\S+', line.removeprefix("minimind "))
        args, others = build_parser().parse_known_args([word.strip('"') for word in words])
        assert args.run
        assert not others or words[0] in ("prepare", "plan", "doctor")  # which take the options of the stages


@pytest.mark.parametrize("name", READMES)
def test_every_picture_and_page_that_is_linked_is_there(name):
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_in_the_readmes_is_that_of_one_quickstart():
    tables = [
        re.search(r"<!-- quickstart:begin -->(.*?)<!-- quickstart:end -->", (ROOT / name).read_text("utf-8"), re.S)
        for name in READMES
    ]
    assert tables[0][1] == tables[1][1]
    assert "held-out questions right" in tables[0][1]


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_valid_and_stops_at_the_first_error(path):
    subprocess.run(["bash", "-n", path], check=True)
    if path.name != "environment.sh":  # which is sourced by the others
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")
        assert os.access(path, os.X_OK)
