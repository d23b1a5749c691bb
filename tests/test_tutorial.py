"""The tutorial, a notebook for each language: equal code, the outputs of one complete run, and
cells that run.

After a change of the code, delete runs/tutorial and refresh the outputs of each with
scripts/docs/execute_notebook.py.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimind.cli import build_parser
from minimind.common.recipes import read_recipe

ROOT = Path(__file__).parent.parent
NAMES = ("tutorial", "tutorial_zh")
STAGES = ("pretrain", "sft", "lora", "dpo", "reward")
# What a reader should not meet: directories of the machine, warnings, progress bars, failures
NOISE = re.compile(
    r"(?<![\w.~:/])/[a-z]+/\w|[Ww]arning:|it/s|\r|Traceback|^error|警告：", re.MULTILINE
)
EXECUTE = ROOT / "scripts" / "docs" / "execute_notebook.py"


def read_cells(name, kind=None):
    notebook = json.loads((ROOT / "docs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def printed(name, id):
    """All text that a code cell has printed."""
    cell = next(cell for cell in read_cells(name) if cell["id"] == id)
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


class WithoutWords(ast.NodeTransformer):
    """Leave out of Python code what is written for the reader: docstrings, and the words of
    printed lines."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            del node.body[0]
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "id", "") == "print":
            parts = [part for arg in node.args for part in getattr(arg, "values", [arg])]
            node.args = [part for part in parts if not isinstance(part, ast.Constant)]
        return node


def code(cell):
    """What a cell does, whatever the language of its words; commands as they are."""
    text = source(cell).replace('["MINIMIND_LANG"] = "zh"', '["MINIMIND_LANG"] = "en"')
    if text.startswith("%%bash"):
        return text
    return ast.dump(WithoutWords().visit(ast.parse(text)))


def test_both_languages_have_the_same_cells_and_the_same_code():
    english, chinese = map(read_cells, NAMES)
    for cell, twin in zip(english, chinese, strict=True):
        assert (cell["id"], cell["cell_type"]) == (twin["id"], twin["cell_type"])
        if cell["cell_type"] == "code":
            assert code(cell) == code(twin), cell["id"]


def test_both_languages_have_the_same_headings_formulas_and_links():
    def marks(cell):
        text = source(cell).replace("_zh", "")
        headings = re.findall(r"^#+ ", text, re.MULTILINE)
        links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "ipynb" not in link]
        return headings, links, text.count("\n| "), text.count("\n- ")

    for cell, twin in zip(*(read_cells(name, "markdown") for name in NAMES), strict=True):
        assert marks(cell) == marks(twin), cell["id"]


@pytest.mark.parametrize("name", NAMES)
def test_every_page_that_is_linked_is_there(name):
    text = "\n".join(map(source, read_cells(name, "markdown")))
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^):]+)\)", text)]
    assert len(links) > 15
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_command_in_the_text_parses(name):
    text = "\n".join(map(source, read_cells(name, "markdown")))
    lines = re.findall(r"`minimind (\w+ [^`]+)`", text)
    assert len(lines) > 4
    for line in lines:
        args, others = build_parser().parse_known_args(line.split())
        assert args.run
        assert not others or args.takes_stage_options


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_those_of_one_complete_run_from_top_to_bottom(name):
    cells = read_cells(name, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell["id"] for cell in cells if not cell["outputs"]] == ["settings"]

    # The last table has the steps of the recipes, not those of the short form
    table = [line.split() for line in printed(name, "summary").splitlines()[1:6]]
    steps = {stage: read_recipe(ROOT / f"configs/{stage}/quickstart.yaml") for stage in STAGES}
    assert {row[0]: int(row[1]) for row in table} == {
        stage: recipe["max_steps"] for stage, recipe in steps.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_small_and_without_noise(name):
    for cell in read_cells(name, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data"), cell["id"]
            text = "".join(output.get("text", []))
            assert output.get("name") != "stderr", text
            assert not NOISE.search(text), (cell["id"], NOISE.search(text))
    assert (ROOT / "docs" / f"{name}.ipynb").stat().st_size < 750_000


@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_by_hand_equals_what_the_commands_say(name):
    tokens, blocks, rest = numbers(printed(name, "blocks"))[:3]
    train = next(line for line in printed(name, "pretrain-run").splitlines() if "8,576" in line)
    assert {tokens, blocks, rest} <= set(numbers(train))

    counted = numbers(printed(name, "mask-counted"))
    assert set(counted) <= set(numbers(printed(name, "inspect-run")))

    evaluated = json.loads(printed(name, "sft-evaluate"))
    assert numbers(printed(name, "sft-loss-shown")) == [
        evaluated["tokens"],
        pytest.approx(evaluated["loss"], abs=2e-6),
    ]
    # Which overlooks a polite ending
    right, polite = numbers(printed(name, "sft-score-shown"))[-1], 100 * evaluated["courteous"]
    assert right + polite >= 100 * evaluated["exact_match"] - 0.1
    assert right <= 100 * evaluated["exact_match"] + 0.1

    by_hand, logged = numbers(printed(name, "dpo-margin"))
    assert by_hand == pytest.approx(logged, rel=0.05)

    well, badly = numbers(printed(name, "packing-shown"))
    assert well < 1e-4 < badly


@pytest.mark.slow
def test_every_cell_runs_in_the_short_form(tmp_path):
    for name in ("configs", *(path.name for path in ROOT.glob("*.py"))):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs" / "tutorial.ipynb"
    copy.write_bytes((ROOT / "docs" / "tutorial.ipynb").read_bytes())

    short = os.environ | {"TUTORIAL_SHORT": "1"}
    done = subprocess.run(
        [sys.executable, EXECUTE, copy], env=short, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "tutorial" / "gguf" / "model.gguf").is_file()
