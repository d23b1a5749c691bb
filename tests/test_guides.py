"""The guides: their commands run, in a short form, and are the same in both languages."""

import json
import re
import shutil
import sys
from contextlib import ExitStack

import pytest
import yaml
from guides import (
    LANGUAGES,
    PROGRAMS,
    ROOT,
    SHELL,
    blocks,
    check_options,
    commands,
    guides,
    why_only_checked,
)
from sandbox import Sandbox
from serving import serving

from minimind.serving.app import Endpoint, build_app
from minimind.serving.models import Served

SERVER = "http://127.0.0.1:8000"
GUIDES = guides()
WITH_BLOCKS = [guide for guide in GUIDES if blocks(guide)]


def in_chinese(guide):
    return guide.removesuffix(".md") + "_zh.md"


def code(block):
    """What has to be equal in both languages: a comment or a value of a row may be translated."""
    if block.language == "json":
        return [sorted(row) for row in rows_of(block)]
    lines = (re.sub(r"(^| +)#.*", "", line) for line in block.text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line] if block.language else []


def rows_of(block):
    """The JSON values of a block: one a line, or one in all."""
    try:
        return [json.loads(line) for line in block.text.splitlines()]
    except ValueError:
        return [json.loads(block.text)]


@pytest.mark.parametrize("guide", GUIDES)
def test_both_languages_have_the_same_code_at_the_same_lines(guide):
    here, there = blocks(guide), blocks(in_chinese(guide))
    assert [block[1:4] for block in here] == [block[1:4] for block in there]
    for block, other in zip(here, there, strict=True):
        if block.language != "text":
            assert code(block) == code(other), block.place


@pytest.mark.parametrize("guide", WITH_BLOCKS)
def test_a_rule_covers_each_block(guide):
    for block in blocks(guide):
        assert block.language in LANGUAGES, f"{block.place}: say in tests/guides.py how to test it"
        if block.language == "json":
            assert rows_of(block)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text)
        elif block.language == "python":
            compile(block.text, block.place, "exec")
        elif block.language == "bash":
            for words in commands(block.text):
                assert words[0] in (*PROGRAMS, *SHELL), (
                    f"{block.place}: `{words[0]}` is not known. Add it to PROGRAMS in"
                    " tests/guides.py, where it is run in a short form or, with a reason in"
                    " ONLY_CHECKED, is not run; or to SHELL, where the shell runs it."
                )


@pytest.mark.parametrize("guide", WITH_BLOCKS)
def test_options_and_files_that_a_command_names_exist(guide):
    for block in blocks(guide):
        for words in commands(block.text) if block.language == "bash" else ():
            if words[0] == "minimind":
                check_options(words[1:])
            for word in words:
                if re.fullmatch(r"(configs|scripts|benchmarks)/[\w./-]+|\w+\.py|ds_[\w.]+", word):
                    assert (ROOT / word).is_file(), f"{block.place}: {word}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_dir):
    sandbox = Sandbox(tmp_path_factory.mktemp("guides"))
    sandbox.fill()
    process = sandbox.start()
    try:
        sandbox.run("bash scripts/quickstart.sh", "README.md")
        sandbox.write_stages()
        sandbox.write_data()
        sandbox.write_published(tokenizer_dir)
        shutil.copytree(sandbox.root, sandbox.prepared, symlinks=True)
        yield sandbox
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def sandbox(prepared):
    prepared.reset()
    return prepared


@pytest.mark.slow
@pytest.mark.parametrize("guide", WITH_BLOCKS)
def test_the_commands_of_a_guide_run_and_print_what_it_shows(sandbox, guide):
    found = blocks(guide)
    for block in found:
        if block.title:
            sandbox.write(block.title, [block.text])
    printed = None  # by the block before, if it was run
    for block in found:
        if block.language in ("bash", "python") and not block.title:
            printed = run_block(sandbox, block)
            if block.language == "bash" and all(map(why_only_checked, commands(block.text))):
                printed = None
            continue
        if block.language in ("text", ""):
            shown = block.text
            if block.printed_by and not why_only_checked(next(commands(block.printed_by))):
                refused = 2 * shown.startswith("error: ")
                printed = sandbox.run(block.printed_by, block.guide, block.line, status=refused)
            elif not block.follows:
                printed = None
            if printed is not None:
                assert share_of_words(shown, printed) > 0.75, f"{block.place}: {printed}"
        printed = None


def run_block(sandbox, block):
    """Run a block, beside a server if it calls one; returns what it printed."""
    text, line = block.text, block.line
    with ExitStack() as cleanup:
        if SERVER in text:
            served = Served(str(sandbox.root / "runs/quickstart/dpo"), "dpo", 8)
            address = cleanup.enter_context(serving(build_app(Endpoint([served], 16))))
            text = text.replace(SERVER, address)
        if block.language == "python":
            sandbox.write("block.py", ["\n" * line + text])
            # Processes that a block starts itself import it as their main module, so it must be one
            own = "__main__" in text
            text = f"{sys.executable if own else 'python'} block.py"
        return sandbox.run(text, block.guide, line)


def share_of_words(shown, printed):
    """How many of the words that a guide shows were printed, names of numbers and columns alike."""
    shown, printed = (set(re.findall(r"[A-Za-z_]{3,}", text)) for text in (shown, printed))
    return len(shown & printed) / len(shown)
