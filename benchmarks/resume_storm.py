"""Kills a run again and again, starts the same command each time, and compares its end with an
undisturbed run's.

    python benchmarks/resume_storm.py [--kills 20] [--stage STAGE]
                                      [--launcher plain|torchrun|deepspeed] [--processes 2]

Every kill is SIGKILL to all processes at once, at a random step or while a checkpoint is being
written (its directory is there and its manifest is not; looked at again after the kill). Prints one
line per kill: when it came, how far the run was, and from where the next start went on; then
whether weights and log are those of the undisturbed run, bit for bit. Exit code 1 if they are not,
or if the run did not survive.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import psutil
from tqdm import tqdm

from minimind.data.world import write_world
from minimind.stage_directory import read_stage, weights_hash
from minimind.training.checkpoints import MANIFEST
from minimind.training.output_directory import checkpoints
from minimind.training.progress import reproducible

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "pretrain": "pretrain.py",
    "sft": "finetune_sft.py",
    "lora": "finetune_sft.py",
    "dpo": "train_dpo.py",
    "reward": "train_reward.py",
}
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.1,
}
PATIENCE = 600  # seconds without a step


class Storm:
    """Data, a model and the command of the stage to be killed, in a directory of its own."""

    def __init__(self, directory: Path, args: argparse.Namespace):
        self.directory, self.args = directory, args
        (directory / "model.json").write_text(json.dumps(MODEL))
        for name, path in write_world(directory / "world").items():
            # Little data, so that the run passes several epochs
            with path.open(encoding="utf-8") as file:
                (directory / f"{name}.jsonl").write_text(
                    "".join(islice(file, args.rows)), encoding="utf-8"
                )
        if args.stage != "pretrain":
            self.run(self.command("pretrain", directory / "base", max_steps=2, save_strategy="no"))

    def command(
        self, stage: str, output_dir: Path, argv: Sequence[str] = (), **options
    ) -> list[str]:
        """A stage of `max_steps` short steps that saves every third and logs each."""
        options = {
            "output_dir": output_dir,
            "train_files": self.directory / f"{'dpo' if stage == 'reward' else stage}.jsonl",
            "eval_ratio": 0.1,
            "max_steps": self.args.steps,
            "save_strategy": "steps",
            "save_steps": 3,
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "dataloader_num_workers": self.args.workers,
            "report_to": "none",
            "bf16": False,
        } | options
        if stage == "pretrain":
            options |= {"block_size": 128, "model_config": self.directory / "model.json"}
        else:
            length = "max_completion_length" if stage in ("dpo", "reward") else "max_length"
            options |= {length: 128, "model_name_or_path": self.directory / "base"}
        words = [SCRIPTS[stage], *(f"--{key}={value}" for key, value in options.items()), *argv]
        words += {"lora": ["--use_peft", "--lora_r=4", "--lora_dropout=0.1"]}.get(stage, [])
        return words

    def start(self, words: Sequence[str], said) -> subprocess.Popen:
        """The command under the launcher, its output appended to an open file."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = str(self.args.processes)
        launcher = {
            "plain": [sys.executable],
            "torchrun": ["torchrun", "--nproc_per_node", processes, "--master_port", str(port)],
            "deepspeed": ["deepspeed", "--num_accelerators", processes, "--master_port", str(port)],
        }[self.args.launcher]
        engine = (
            ["--deepspeed", "ds_config_zero2.json"] if self.args.launcher == "deepspeed" else []
        )
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "MINIMIND_CACHE": str(self.directory / "cache")}
        return subprocess.Popen(
            [*launcher, *map(str, words), *engine],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )

    def run(self, words: Sequence[str]) -> None:
        """The command to its end, undisturbed."""
        with tempfile.TemporaryFile() as said:
            if self.start(words, said).wait():
                said.seek(0)
                sys.exit(
                    f"{' '.join(map(str, words))}"
                    f" failed:\n{said.read().decode(errors='replace')[-3000:]}"
                )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all below it: those that could start others first are stopped before
    they can."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def step_of(output_dir: Path) -> int:
    """The last step in the log."""
    log = output_dir / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def being_written(output_dir: Path) -> tuple[str, int] | None:
    """The newest checkpoint, if its directory is there and its manifest is not, and when that last
    changed (ns)."""
    try:
        for path in checkpoints(output_dir)[:1]:
            if not (path / MANIFEST).exists():
                return path.name, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return None


def log_of(output_dir: Path) -> list[dict]:
    """The log without what a clock decides."""
    lines = (output_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [reproducible(json.loads(line)) for line in lines]


def disturb(storm: Storm, words: Sequence[str], output_dir: Path, rng: random.Random) -> list[dict]:
    """Kill and restart until all kills are dealt and the run has come to its end; one record per
    start."""
    lives: list[dict] = []
    said_file = storm.directory / "said.txt"
    kills, steps = storm.args.kills, storm.args.steps
    progress = tqdm(total=kills, desc="kills", disable=None)
    while True:
        left = kills - sum("moment" in life for life in lives)
        began = step_of(output_dir)
        target = began + rng.randint(0, max(1, 2 * (steps - began) // (left + 1)))
        while_writing = left % 2 == 0
        left_over = being_written(output_dir)  # by the last kill
        with said_file.open("wb") as said:
            process = storm.start(words, said)
            fresh_log, moment, deadline = False, None, time.monotonic() + PATIENCE
            old_step = began
            while process.poll() is None and left:
                time.sleep(0.0005)
                # A restarted run cuts the log back before its first step: from then on the log is
                # its own.
                fresh_log = fresh_log or b"resuming from" in said_file.read_bytes() or not began
                step = step_of(output_dir)
                if step != old_step:
                    old_step, deadline = step, time.monotonic() + PATIENCE
                if time.monotonic() > deadline:
                    kill(process)
                    sys.exit(
                        f"no step in {PATIENCE} s:\n{said_file.read_text(errors='replace')[-3000:]}"
                    )
                if not fresh_log or step < min(target, steps - 2):
                    continue
                if while_writing and step < steps:
                    written = being_written(output_dir)
                    if written in (None, left_over):
                        continue
                    moment = f"writing {written[0]}"
                else:
                    time.sleep(rng.random() * 0.05)
                    moment = (
                        "in a step"
                        if re.search(rb"^step ", said_file.read_bytes(), re.M)
                        else "starting"
                    )
                break
            if moment:
                kill(process)
            process.wait()
        text = said_file.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"resuming from .*?(checkpoint-\d+)", text)
        life = {
            "from": found[1] if found else "the beginning",
            "skipped": re.findall(r"skipped .*", text),
        }
        if lives:
            lives[-1]["resumed_from"] = life["from"]
        if not moment:
            if process.returncode:
                sys.exit(
                    f"the run did not survive (exit code {process.returncode}):\n{text[-3000:]}"
                )
            lives.append(life)
            progress.close()
            return lives
        if (
            moment.startswith("writing")
            and (being_written(output_dir) or ("",))[0] != moment.split()[1]
        ):
            moment = f"just after {moment}"
        lives.append({**life, "moment": moment, "step": step_of(output_dir)})
        progress.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stage", choices=SCRIPTS, default="pretrain")
    parser.add_argument("--launcher", choices=("plain", "torchrun", "deepspeed"), default="plain")
    parser.add_argument("--processes", type=int, default=2, help="of torchrun and deepspeed")
    parser.add_argument("--workers", type=int, default=0, help="dataloader workers")
    parser.add_argument("--steps", type=int, help="of the run (default: 6 per kill)")
    parser.add_argument("--rows", type=int, default=150, help="rows of data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of the table"
    )
    args = parser.parse_args()
    args.steps = args.steps or 6 * args.kills + 6
    with tempfile.TemporaryDirectory(prefix="resume_storm_") as scratch:
        storm = Storm(Path(scratch), args)
        undisturbed, disturbed = storm.directory / "undisturbed", storm.directory / "disturbed"
        began = time.monotonic()
        storm.run(storm.command(args.stage, undisturbed))
        undisturbed_seconds = time.monotonic() - began
        lives = disturb(
            storm, storm.command(args.stage, disturbed), disturbed, random.Random(args.seed)
        )
        seconds = time.monotonic() - began - undisturbed_seconds
        same_weights = weights_hash(undisturbed) == weights_hash(disturbed)
        same_log = log_of(undisturbed) == log_of(disturbed)
        steps = read_stage(disturbed)["steps"]
    if args.json:
        result = {"stage": args.stage, "launcher": args.launcher, "steps": steps, "lives": lives}
        print(json.dumps({**result, "same_weights": same_weights, "same_log": same_log}))
    else:
        processes = 1 if args.launcher == "plain" else args.processes
        print(
            f"{args.stage}, {args.launcher} x {processes}, {args.steps} steps, a checkpoint every 3"
        )
        print(f"{'kill':>4}  {'moment':<32}{'step':>6}  {'resumed from':<16}  skipped")
        for number, life in enumerate(lives[:-1], start=1):
            skipped = ", ".join(re.findall(r"checkpoint-\d+", " ".join(lives[number]["skipped"])))
            print(
                f"{number:>4}  {life['moment']:<32}{life['step']:>6}  {life['resumed_from']:<16} "
                f" {skipped}"
            )
        print(
            f"finished after {len(lives)} starts, {seconds:.0f} s (undisturbed:"
            f" {undisturbed_seconds:.0f} s)"
        )
        print(
            f"weights {'bit for bit the same' if same_weights else 'DIFFER'}, log"
            f" {'same' if same_log else 'DIFFERS'}"
        )
    sys.exit(not (same_weights and same_log))


if __name__ == "__main__":
    main()
