"""The guides: their commands run, in a short form, and are the same in both languages."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
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
from judged import PROMPTS
from pipeline import MODEL, minimal_pair_rows, wait_until
from published import Published
from serving import serving

from minimind.serving.app import Endpoint, build_app
from minimind.serving.models import Served

SERVER = "http://127.0.0.1:8000"
TESTS = Path(__file__).parent
GUIDES = guides()
WITH_BLOCKS = [guide for guide in GUIDES if blocks(guide)]
# Files of the embedded corpus -> the names of guides for files of that kind, here of a few rows
DATA = {
    "pretrain": (
        "corpus.jsonl corpus_en.jsonl corpus_zh.jsonl corpus_eval.jsonl held_out.jsonl"
        " corpus/a.jsonl raw/a.jsonl pretrain_zh.jsonl pretrain_en.jsonl"
    ),
    "sft": "chats.jsonl chats_eval.jsonl tools.jsonl replies.jsonl sft_zh.jsonl sft_en.jsonl",
    "dpo": "pairs.jsonl dpo_zh_derived.jsonl",
    "lora": "skill.jsonl",
}
EXAM = [
    "id,Question,A,B,C,D,Answer",
    *(f"{n},谁？,狐狸,狗,猫,牛,{'ABCD'[n % 4]}" for n in range(5)),
]


def rated_rows():
    return [
        {"prompt": f"who? {n}", "completion": f"the fox {n}", "label": n % 2 == 0}
        for n in range(20)
    ]


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


class Sandbox:
    """A directory that looks like a checkout after the quickstart, in which programs are stand-ins
    that run in forks of one process."""

    def __init__(self, root):
        self.root, self.prepared, self.socket = (
            root / "checkout",
            root / "prepared",
            root / "socket",
        )
        programs = root / "bin"
        programs.mkdir()
        for program in PROGRAMS:
            client = f"{sys.executable} -IS {TESTS / 'forking.py'} {self.socket} {program}"
            (programs / program).write_text(f'#!/bin/sh\nexec {client} "$@"\n')
            (programs / program).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": f"{self.root}:{TESTS}",
            "HOME": str(root),
            "LANG": "C.UTF-8",
            "MINIMIND_CACHE": str(root / "cache"),
            "MINIMIND_LANG": "en",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            # Where DeepSpeed's operator is, if an earlier run has compiled it
            "TORCH_EXTENSIONS_DIR": str(Path.home() / ".cache/torch_extensions"),
        }

    def start(self):
        """Start the process that runs the commands."""
        command = [sys.executable, TESTS / "guides.py", self.socket]
        process = subprocess.Popen(command, cwd=self.root.parent, env=self.environment)
        wait_until(lambda: self.socket.exists() or process.poll() is not None)
        return process

    def run(self, text, place="", line=1, status=0):
        """Run a text by bash until a command fails; returns what it printed."""
        trap = f"trap 'echo \"{place}:$LINENO: status $?: $BASH_COMMAND\"' ERR"
        script = f"set -Eeo pipefail; {trap}{chr(10) * line}{text}"
        done = subprocess.run(
            ["/bin/bash", "-c", script],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout[-5000:]
        return done.stdout

    def fill(self):
        """Write what a checkout has that commands need."""
        for name in ("configs", "scripts"):
            shutil.copytree(ROOT / name, self.root / name)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), ROOT / "pyproject.toml"]:
            shutil.copy(path, self.root)
        for name in ("minimind", "benchmarks"):
            (self.root / name).symlink_to(ROOT / name)
        self.write(".venv/bin/activate", [])
        self.write(
            "configs/model/short.json", [json.dumps(MODEL | {"max_position_embeddings": 2048})]
        )

    def write_stages(self):
        """The quickstart's stages under the other names of guides."""
        for stage in ("pretrain", "sft", "lora", "dpo", "reward"):
            for name in (f"runs/26m/{stage}", f"runs/{stage}"):
                shutil.copytree(self.root / "runs/quickstart" / stage, self.root / name)

    def write_data(self):
        """Files of a few rows, under the names of guides."""
        for source, names in DATA.items():
            lines = (self.root / f"runs/quickstart/data/{source}.jsonl").read_text().splitlines()
            for name in names.split():
                self.write(name, lines[:: len(lines) // 40])
        self.write("rated.jsonl", map(json.dumps, rated_rows()))
        for name in ("blimp.jsonl", "zhoblimp.jsonl"):
            self.write(name, map(json.dumps, minimal_pair_rows()))
        for name in ("prompts.txt", "others.txt"):
            self.write(name, PROMPTS)
        for name in ("ceval", "cmmlu"):
            for split in ("val", "dev"):
                self.write(f"{name}/{split}/law_{split}.csv", EXAM)
        self.write(
            "qa.jsonl", ['{"问题": "谁？", "回答": "狐狸", "hint": "a fox", "notes": "b"}'] * 20
        )

    def write_published(self, tokenizer_dir):
        """Checkpoints as MiniMind publishes them."""
        Published("2").folder(self.root / "MiniMind2", tokenizer_dir)
        torch.save(Published("2").tensors, self.root / "full_sft_512.pth")

    def write(self, name, lines):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def reset(self):
        """Leave nothing of the guide before."""
        shutil.rmtree(self.root)
        shutil.copytree(self.prepared, self.root, symlinks=True)


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
            text = "python block.py"
        return sandbox.run(text, block.guide, line)


def share_of_words(shown, printed):
    """How many of the words that a guide shows were printed, names of numbers and columns alike."""
    shown, printed = (set(re.findall(r"[A-Za-z_]{3,}", text)) for text in (shown, printed))
    return len(shown & printed) / len(shown)
