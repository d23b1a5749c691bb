"""Runs a command of a guide in its short form. As a script: the process whose forks do so."""

import argparse
import gc
import importlib
import io
import os
import re
import runpy
import shlex
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path

from guides import ROOT, check_options, why_only_checked

# Words of a command -> what is given in their place
INSTEAD = {
    r"--max_steps 100000": "--max_steps 12",
    r"--max_steps 11000 --lr_decay_steps 1000": "--max_steps 11 --lr_decay_steps 1",
    r"--max_steps (\d)000": r"--max_steps \1",
    r"--save_steps 1000": "--save_steps 1",
    r"checkpoint-10000": "checkpoint-10",
    r"--num_train_epochs \d+": "--num_train_epochs 1 --per_device_train_batch_size 64",
    r"--max_new_tokens (64|128)": "--max_new_tokens 12",
    r"(python .*)--time_budget \w+": r"\1--max_steps 2",  # a start on a busy machine takes long
    r"\(Glad.to.help[^\0]*": "o",  # an untrained model never says it
}

# Options that are added to a command, unless it has them. Pattern -> options.
STAGE = r"python (?!.*--(max_steps|time_budget|num_train_epochs))"
ADDED = {
    r"python \w+\.py": (
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1"
        " --max_eval_rows 4 --report_to none"
    ),
    r"python (?!.*--(allow_changed|resume_from))\w+\.py": "--overwrite_output_dir true",
    r"python finetune_sft\.py": "--max_length 128",
    r"python (pretrain|finetune_sft|train_dpo)\.py": "--sample_tokens 4",
    r"python pretrain\.py": (
        "--model_config configs/model/short.json --block_size 64 --eval_ratio 0.2"
    ),
    r"python .*language\.yaml": "--time_budget none --max_steps 2",  # the recipe has a budget
    rf"{STAGE}finetune_sft\.py": "--max_steps 40 --learning_rate 5e-3",  # its replies end
    rf"{STAGE}\w+\.py": "--max_steps 2",
    r"minimind plan .*measured": "--model_config configs/model/short.json --block_size 64",
    r"minimind (chat|generate|evaluate|pairs|compare) ": "--max_new_tokens 12",
    r"minimind (serve|web) ": "--port 0",
}

# What nearly every command imports; a fork begins with it
IMPORTED = ["matplotlib.pyplot", "minimind.cli", "minimind.doctor", "minimind.training.run"]
IMPORTED += [f"minimind.{room}" for room in ("export", "importing", "pairs", "score_card")]
IMPORTED += ["minimind.planning.plans", "minimind.serving.app", "minimind.cleaning"]


def run(words):
    """Run a command in this process, in its short form; raises SystemExit as it would."""
    if why_only_checked(words):
        check(words)
        return
    words = in_short_form(without_launcher(words))
    program, *argv = words
    if program == "bash":
        os.execv("/bin/bash", words)
    elif program == "minimind":
        run_minimind(argv)
    elif argv[:1] == ["-P"] or argv[0] == "-c":
        code = argv[argv.index("-c") + 1]
        sys.argv = ["-c"]
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        if argv[1] == "minimind.quickstart":  # reads the stages' commands
            lines = map(shlex.split, sys.stdin)
            texts = (shlex.join([*line[:2], *in_short_form(line[2:])]) for line in lines)
            sys.stdin = io.StringIO("\n".join(texts))
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")


def in_short_form(words):
    """The words of a command with those of `INSTEAD` and `ADDED`."""
    text = "\0".join(words)
    for pattern, instead in INSTEAD.items():
        text = re.sub(pattern.replace(" ", "\0"), instead.replace(" ", "\0"), text)
    words = text.split("\0")
    for pattern, options in ADDED.items():
        if re.match(pattern, " ".join(words)):
            pairs = re.findall(r"(--\w+) (\S+)", options)
            words += [word for pair in pairs if pair[0] not in words for word in pair]
    return words


def without_launcher(words):
    """What one process of a launcher runs, by the launcher's own reading of its options."""
    program, *argv = words
    if program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        args = parse_args(argv)
        return ["python", args.user_script, *args.user_args]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(argv)
        return ["python", args.training_script, *args.training_script_args]
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(argv[1:])
        return ["python", args.training_script, *args.training_script_args]
    if program == "sbatch":  # as the script does
        script = next(index for index, word in enumerate(argv) if word.endswith(".sbatch"))
        assert Path(argv[script]).is_file()
        return ["python", "pretrain.py", "--deepspeed", "ds_config_zero2.json", *argv[script + 1 :]]
    return words


def run_minimind(argv):
    """Run a command of minimind: a chat has one message, a server ends once it has answered."""
    from minimind.cli import main

    if argv[0] == "chat":
        reading, writing = os.pipe()
        os.write(writing, b"hello\n")
        os.close(writing)
        os.dup2(reading, 0)
    elif argv[0] in ("serve", "web"):
        from minimind.serving import server

        listen = server.listen

        def listening(host, port):
            socket = listen(host, port)
            port = socket.getsockname()[1]
            threading.Thread(target=interrupt_after_health, args=[port], daemon=True).start()
            return socket

        server.listen = listening
    main(argv)


def interrupt_after_health(port):
    """Wait until the server of this process says that it works, and press Ctrl-C."""
    while True:
        time.sleep(0.1)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:
            continue
        os.kill(os.getpid(), signal.SIGINT)
        return


def check(words):
    """Check as much of a command as can be known without running it."""
    program, *argv = without_launcher(words)
    if program == "minimind":
        check_options(argv)
    elif program == "pip":
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\.\[(.*)\]", " ".join(argv)))):
            assert re.search(rf"^{extra} = \[", text, re.MULTILINE), f"no extra {extra}"
    elif argv[0].startswith(("benchmarks/", "scripts/")):
        parse_alone(argv)
    elif program == "python" and argv[0] != "-m":
        check_stage_options(argv)


def check_stage_options(argv):
    """Parse the options of a stage's script, and its recipe; raises UserError."""
    from minimind.stages import STAGES
    from minimind.training.command_line import parse_options

    spec = next(spec for spec in STAGES.values() if spec.script == argv[0])
    parse_options(*spec.arguments, argv=argv[1:])


def parse_alone(argv):
    """Run a script until it has parsed its options."""
    if argv[0].endswith(".sh"):
        assert Path(argv[0]).is_file()
        return
    parser = argparse.ArgumentParser
    methods = {name: getattr(parser, name) for name in ("parse_args", "parse_known_args")}

    def parse_and_end(name):
        def parse(*args, **options):
            for each, method in methods.items():  # one of them calls the other
                setattr(parser, each, method)
            methods[name](*args, **options)
            sys.exit(0)

        return parse

    for name in methods:
        setattr(parser, name, parse_and_end(name))
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")
    raise AssertionError(f"{argv[0]} parses no options")


if __name__ == "__main__":  # the process that test_guides.py starts
    from command_server import serve

    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # each fork would collect the garbage of all imports
    # Charts take half of the time of a short run; test_report.py draws them
    sys.modules["minimind.training.plots"].line_chart = lambda *args: "<svg></svg>"
    sys.modules["minimind.training.report"].bar_chart = lambda *args: "<svg></svg>"
    sys.modules["minimind.training.run"].plot_loss = lambda log, path, *args: path.touch()
    serve(sys.argv[1], run)
