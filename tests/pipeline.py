"""Runs root scripts and commands as a user would, in this process, on data and a model of
seconds."""

import importlib
import json
import socket
import sys
import time
from pathlib import Path

from minimind.cli import main as cli

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NAMES = ("fox", "dog", "cat", "owl", "bee", "ant", "cow", "hen")
# Seconds that a test waits for what must happen, however slow and busy the machine is.
PATIENCE = 600
PORT_OPTIONS = {
    "deepspeed": "--master_port",
    "torchrun": "--master_port",
    "accelerate": "--main_process_port",
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def result(content):
    return {"role": "tool", "content": content}


def document_rows():
    return [
        {"text": f"the {name} runs home and the {name} sleeps 狐狸跑回家"} for name in NAMES * 8
    ]


def chat_rows():
    return [
        {
            "conversations": [
                {"role": "user", "content": f"who runs? {i}"},
                {"role": "assistant", "content": f"the {name}"},
            ]
        }
        for i, name in enumerate(NAMES * 2)
    ]


PAIR_LENGTHS = {"max_prompt_length": 64, "max_completion_length": 64}


def pair_rows():
    return [
        {"prompt": f"who runs? {i}", "chosen": f"the {name} runs", "rejected": name}
        for i, name in enumerate(NAMES * 2)
    ]


def minimal_pair_rows():
    """Eight pairs of two paradigms."""
    return [
        {
            "sentence_good": f"the {name} runs home",
            "sentence_bad": f"the {name} {bad}",
            "UID": paradigm,
            "pairID": str(index),
        }
        for paradigm, bad in (("order", "home runs"), ("article", "runs the"))
        for index, name in enumerate(NAMES[:4])
    ]


def run_script(monkeypatch, name, *argv):
    """Call `main` of a root script with a command line; raises SystemExit where the script would
    exit."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    importlib.import_module(name).main()


def failure(capsys, call, *args):
    """The message of a call that must end with exit code 2, one `error:` line at the start of it
    and no traceback."""
    try:
        call(*args)
    except SystemExit as stop:
        said = capsys.readouterr()
        assert stop.code == 2, said
        assert said.err.count("error: ") == 1, said
        assert "Traceback" not in said.err + said.out
        return said.err.split("error: ")[1].strip()
    raise AssertionError("the call succeeded, and should have been refused")


def run_cli(*argv):
    cli([str(word) for word in argv])


def wait_until(condition, said=str):
    """Wait for what must happen; where it does not, fail with the end of what `said` returns."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, said()[-3000:]
        time.sleep(0.05)


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def at_free_port(*command):
    """A launcher's command, with a port that nothing else on this machine uses; other commands as
    they are."""
    option = PORT_OPTIONS.get(Path(command[0]).name)
    if option is None or option in command:
        return command
    script = next(index for index, word in enumerate(command) if str(word).endswith(".py"))
    return (*command[:script], option, free_port(), *command[script:])


def short_run(output_dir, **options):
    """Options of a run of two steps that reports to no tracker and saves no checkpoint; None leaves
    one out."""
    common = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "bf16": False}
    given = {
        key: value
        for key, value in (common | {"save_strategy": "no"} | options).items()
        if value is not None
    }
    return [
        "--output_dir",
        str(output_dir),
        *(word for key, value in given.items() for word in (f"--{key}", value)),
    ]


def write_model(path):
    path.write_text(json.dumps(MODEL))
    return str(path)
