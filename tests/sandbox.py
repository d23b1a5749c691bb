"""A directory in which the commands of the guides are run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from guides import PROGRAMS, ROOT
from judged import PROMPTS
from pipeline import MODEL, minimal_pair_rows, wait_until
from published import Published

TESTS = Path(__file__).parent
# Files of the embedded corpus -> the names of guides for files of that kind, here of a few rows
DATA = {
    "pretrain": (
        "corpus.jsonl corpus_en.jsonl corpus_zh.jsonl corpus_eval.jsonl held_out.jsonl"
        " corpus/a.jsonl raw/a.jsonl pretrain_zh.jsonl pretrain_en.jsonl"
    ),
    "sft": "chats.jsonl chats_eval.jsonl tools.jsonl replies.jsonl sft_zh.jsonl sft_en.jsonl",
    "dpo": "pairs.jsonl pairs_eval.jsonl dpo_zh_derived.jsonl",
    "lora": "skill.jsonl",
}
QUESTION = "哪一种动物在夜里跑过田野，在太阳升起之前回家？"
EXAM = ["Question,A,B,C,D,Answer", *(f"{QUESTION},狐狸,狗,猫,牛,{letter}" for letter in "ABCDAB")]
# Other files -> a row of them
ROWS = {
    "qa.jsonl": {"问题": "谁？", "回答": "狐狸"},
    "hinted.jsonl": {"question": "who?", "answer": "the fox", "hint": "red", "notes": "a tail"},
    "facts.jsonl": {"prompt": "Who?", "contains": "fox", "kind": "fact"},
}


class Sandbox:
    """A directory that looks like a checkout after the quickstart, in which programs are stand-ins
    that run in forks of one process."""

    def __init__(self, root):
        self.root, self.prepared = root / "checkout", root / "prepared"
        self.socket = root / "socket"
        programs = root / "bin"
        programs.mkdir()
        for program in PROGRAMS:
            client = f"{sys.executable} -IS {TESTS / 'command_server.py'} {self.socket} {program}"
            (programs / program).write_text(f'#!/bin/sh\nexec {client} "$@"\n')
            (programs / program).chmod(0o755)
        # The one that compiled DeepSpeed's operator: another one would compile it again
        (programs / "ninja").symlink_to(Path(sys.executable).parent / "ninja")
        self.environment = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PYTHONPATH": f"{self.root}:{TESTS}",
            "HOME": str(Path.home()),  # where DeepSpeed's operator is compiled
            "LANG": "C.UTF-8",
            "MINIMIND_CACHE": str(root / "cache"),
            "MINIMIND_LANG": "en",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self):
        """Start the process that runs the commands."""
        command = [sys.executable, TESTS / "short_forms.py", self.socket]
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
            timeout=900,  # a command that hangs
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
        for path in (self.root / "runs/quickstart/data").iterdir():
            lines = path.read_text().splitlines()
            lines = lines[:: max(1, len(lines) // 40)]
            for name in (path.relative_to(self.root), *DATA.get(path.stem, "").split()):
                self.write(name, lines)
        pairs = [json.dumps(row) for row in minimal_pair_rows()]
        for name in ("blimp.jsonl", "zhoblimp.jsonl", "blimp/order.jsonl"):
            self.write(name, pairs)
        for name in ("prompts.txt", "others.txt"):
            self.write(name, PROMPTS)
        for name in ("ceval/val/law_val", "ceval/dev/law_dev", "cmmlu/test/law", "cmmlu/dev/law"):
            self.write(f"{name}.csv", EXAM)
        for name, row in ROWS.items():
            self.write(name, [json.dumps(row | {"id": number}) for number in range(20)])

    def write_published(self, tokenizer_dir):
        """Checkpoints as MiniMind publishes them."""
        Published("2").folder(self.root / "MiniMind2", tokenizer_dir)
        torch.save(Published("2").tensors, self.root / "full_sft_512.pth")
        self.write("model.json", ['{"num_attention_heads": 8}'])

    def write(self, name, lines):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def reset(self):
        """Leave nothing of the guide before."""
        shutil.rmtree(self.root)
        shutil.copytree(self.prepared, self.root, symlinks=True)
