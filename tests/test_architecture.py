"""The structure of the code: what docs/architecture.md promises beside the import contract."""

import ast
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from minimind.stages import STAGES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minimind"
FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_class_name_exists_once():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    names = Counter(
        node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_our_own_modules_are_imported_inside_functions_by_the_commands_alone():
    """They have to answer `--help` without loading torch."""
    allowed = {PACKAGE / "cli.py", PACKAGE / "__init__.py", *(PACKAGE / "commands").glob("*.py")}
    lazy = []
    for file in set(FILES) - allowed:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        inner = [node for node in inner if node not in tree.body]
        lazy += [f"{file.name}:{node.lineno}" for node in inner if "minimind" in str(node.module)]
    assert lazy == []


@pytest.mark.parametrize("guide", ["architecture.md", "architecture_zh.md"])
def test_the_guide_lists_the_rooms_in_the_order_of_the_import_contract(guide):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = [[name.strip() for name in layer.split("|")] for layer in layers]
    rows = (ROOT / "docs" / guide).read_text(encoding="utf-8").splitlines()
    listed = [
        row.split("|")[1].replace("`", "").replace(",", " ").split()
        for row in rows
        if row.startswith("| `")
    ]
    assert listed[: len(rooms)] == rooms


def test_every_stage_has_its_script_and_its_recipes():
    for name, spec in STAGES.items():
        assert (ROOT / spec.script).is_file()
        assert list((ROOT / "configs" / name).glob("*.yaml"))
