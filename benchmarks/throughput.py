"""Useful tokens per second, share of the matmul peak, memory and start-up of each stage, beside the
peers.

    # 26m, the precisions this machine is fast in; about 30 minutes on 2 cores
    python benchmarks/throughput.py --data DIRECTORY --minimind PATH
    # tiny, under 3 minutes
    python benchmarks/throughput.py --data DIRECTORY --minimind PATH --quick
    # as on a processor without bf16
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/throughput.py ...

DIRECTORY holds pretrain_zh.jsonl, sft_zh.jsonl and dpo_zh_derived.jsonl, or what --texts, --chats
and --pairs name. PATH is a clone of minimind; without it that row is missing.

Every alternative is its own script in a process of its own (turns.py), with empty caches. They run
in turn, a micro-batch each, on rows of the same files and a model of the same shape; times are
medians over the rounds, and ratios those of the round. `useful` tokens are not padding, `trained`
ones have a loss. `peak` is the share of the fastest matrix product in this precision that the
machine did in between; counted are the FLOPs that the mathematics needs for useful tokens, for DPO
those of the policy alone. `other` is the share of a step outside forward, backward and optimizer.
`memory` is the peak of the tensors in a step. `start` is from typing the command to the end of the
first step, data from the files included. `saving` is the share of a run that checkpoints take if it
writes one every 20 steps.

The loss of SFT is that of the same conversations before training, packed or padded; that of DPO is
the last round's, where all have trained on the same pairs. minimind has fp32 alone on a CPU.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from side_by_side import DEVICE, device_name
from transformers import AutoTokenizer
from turns import PROBE, Program, start_all, take_turns
from twins import library_twin, read_size

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common.errors import reports_user_errors
from minimind.common.launch import bf16_is_fast
from minimind.costs.flops import flops
from minimind.costs.step import Step
from minimind.costs.this_machine import matmul_peak
from minimind.data.chat_arguments import PreferenceArguments
from minimind.data.chats import load_conversations, load_preferences
from minimind.tokenizer import DEFAULT_TOKENIZER
from minimind.training.data_arguments import DataArguments

ROOT = Path(__file__).parents[1]
LENGTH = {"pretrain": 512, "sft": 1024, "dpo": 1024}  # tokens of a row at most
QUICK_LENGTH = {"pretrain": 256, "sft": 512, "dpo": 512}
STEPS = 1000  # that each run believes to have before it
SAVE_EVERY = 20  # steps, for the share that saving takes
# What the peers have not: evaluation, samples. All run with the same values of these.
QUIET = ["--eval_ratio", 0, "--sample_steps", -1]
COMMON = ["--report_to", "none", "--max_steps", STEPS, "--logging_steps", 10]
DPO = ["--learning_rate", 3e-5, "--lr_scheduler_type", "constant", "--warmup_steps", 0]
DPO += ["--beta", 0.2, "--weight_decay", 0.01, "--adam_beta2", 0.95]
OWN = {"sft": [], "dpo": DPO}


class Setting(NamedTuple):
    """What every command needs: files, precision, and a directory for what it writes."""

    args: argparse.Namespace
    stage: str
    precision: str
    directory: Path

    @property
    def files(self) -> Path:
        """The stage's data."""
        return self.shared / f"{self.stage}.jsonl"

    @property
    def length(self) -> int:
        """Tokens of a row at most."""
        return self.args.length[self.stage]

    @property
    def shared(self) -> Path:
        """The directory of the data and the models."""
        return self.directory.parent

    @property
    def options(self) -> list:
        """The options of the libraries' arguments that all share."""
        words = ["--per_device_train_batch_size", self.args.batch_size, *COMMON]
        words += ["--bf16", str(self.precision == "bf16").lower()]
        words += ["--use_cpu", str(DEVICE == "cpu").lower()]
        return [*words, "--output_dir", self.directory / "run"]


def pretrain(setting: Setting) -> list:
    """pretrain.py as a user types it."""
    command = [ROOT / "pretrain.py", "--train_files", setting.files, *QUIET, *setting.options]
    command += ["--model_config", ROOT / f"configs/model/{setting.args.size}.json"]
    command += [
        "--block_size",
        setting.length,
        "--save_steps",
        setting.args.rounds // 2,
    ]
    return command + setting.args.ours.split()


def classic(setting: Setting) -> list:
    """The classic recipe."""
    command = [ROOT / "benchmarks/classic_recipe.py", "--train_file", setting.files]
    command += [
        "--tokenizer",
        DEFAULT_TOKENIZER,
        "--model",
        setting.shared / "twin/config.json",
    ]
    command += ["--output_dir", setting.directory / "run", "--max_steps", STEPS]
    command += [
        "--batch_size",
        setting.args.batch_size,
        "--block_size",
        setting.length,
    ]
    command += ["--bf16", str(setting.precision == "bf16").lower()]
    return [*command, "--save_steps", setting.args.save_steps]


def minimind(setting: Setting) -> list:
    """minimind's own script. It looks for ../model and writes to ../checkpoints."""
    (setting.directory / "model").symlink_to(setting.args.minimind.resolve() / "model")
    (setting.directory / "trainer").mkdir()
    config = setting.args.config
    command = [setting.args.minimind.resolve() / "trainer/train_pretrain.py"]
    command += ["--data_path", setting.files, "--save_dir", setting.directory / "out"]
    command += ["--hidden_size", config.hidden_size]
    command += ["--num_hidden_layers", config.num_hidden_layers]
    return [
        *command,
        "--max_seq_len",
        setting.length,
        "--batch_size",
        setting.args.batch_size,
    ]


def ours(setting: Setting) -> list:
    """finetune_sft.py or train_dpo.py as a user types it."""
    script = {"sft": "finetune_sft.py", "dpo": "train_dpo.py"}[setting.stage]
    command = [ROOT / script, "--train_files", setting.files, *QUIET, *setting.options]
    command += ["--model_name_or_path", setting.shared / "parent"]
    command += ["--save_strategy", "no", "--on_bad_rows", "skip", "--on_findings", "warn"]
    if setting.stage == "sft":
        return [*command, "--max_length", setting.length]
    half = setting.length // 2
    lengths = ["--max_prompt_length", half, "--max_completion_length", half]
    return [*command, *lengths, *DPO]


def trl(setting: Setting, *options: str) -> list:
    """TRL's trainer with these options."""
    command = [ROOT / "benchmarks/trl_recipe.py", setting.stage, "--train_files", setting.files]
    command += ["--model_path", setting.shared / "twin", *setting.options]
    command += ["--save_strategy", "no", "--max_length", setting.length]
    return [*command, *OWN[setting.stage], *options]


NO_CHECKPOINTING = ("--gradient_checkpointing", "false")
PRECOMPUTED = ("--precompute_ref_log_probs", "true")
STAGES: dict[str, dict[str, Callable[[Setting], list]]] = {
    "pretrain": {"ours": pretrain, "classic recipe": classic, "minimind": minimind},
    "sft": {
        "ours": ours,
        "TRL": trl,
        "TRL, no checkpointing": lambda s: trl(s, *NO_CHECKPOINTING),
        "TRL, packed, padding-free": lambda s: trl(s, *NO_CHECKPOINTING, "--packing", "true"),
    },
    "dpo": {
        "ours": ours,
        "TRL": trl,
        "TRL, precomputed": lambda s: trl(s, *PRECOMPUTED),
        "TRL, precomputed, no checkpointing": lambda s: trl(s, *PRECOMPUTED, *NO_CHECKPOINTING),
    },
}
MEASURE = {"pretrain": "tokens", "sft": "trained", "dpo": "rows"}


def prepare(args: argparse.Namespace, directory: Path) -> None:
    """Write the data, the model of random weights in both layouts, and rows whose loss is
    compared."""
    sources = {"pretrain": args.texts, "sft": args.chats, "dpo": args.pairs}
    for stage in args.stages:
        with (args.data / sources[stage]).open(encoding="utf-8") as lines:
            path = directory / f"{stage}.jsonl"
            path.write_text("".join(islice(lines, args.documents[stage])), encoding="utf-8")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER)
    model, twin = MiniMindForCausalLM(args.config), library_twin(args.config)
    twin.load_state_dict(model.state_dict())
    for name, each in {"parent": model, "twin": twin}.items():
        each.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    if "sft" in args.stages:
        data_args = DataArguments(train_files=[str(directory / "sft.jsonl")], on_bad_rows="skip")
        rows = load_conversations(data_args, tokenizer, args.length["sft"]).train.select(range(8))
        probe = [
            {name: list(map(int, row[name])) for name in ("input_ids", "labels")} for row in rows
        ]
        (directory / "probe.json").write_text(json.dumps(probe))


def flops_per_token(config: MiniMindConfig, length: int) -> float:
    """FLOPs that a useful token of a full row needs, forward and backward."""
    step = Step(1, length, device=DEVICE)
    return flops(MiniMindForCausalLM(config), step)["model"] / step.tokens


def alternatives(
    args: argparse.Namespace, stage: str, precision: str, directory: Path
) -> Iterator[Program]:
    """Start the alternatives of a stage, one after the other."""
    for number, (name, command) in enumerate(STAGES[stage].items()):
        if name in args.without or (name == "minimind" and not args.minimind):
            continue
        where = directory / f"{stage}-{precision}-{number}"
        where.mkdir()
        words = command(Setting(args, stage, precision, where))
        environment = {"MINIMIND_CACHE": str(where / "cache"), "HF_DATASETS_CACHE": str(where)}
        if stage == "sft":
            environment[PROBE] = str(directory / "probe.json")
        cwd = where / "trainer" if name == "minimind" else where
        program = Program(name, words, cwd, environment=environment)
        print(f"{stage} {precision} {name}: {program.startup:.0f} s to the first step", flush=True)
        yield program


def run_stage(args: argparse.Namespace, stage: str, precision: str, directory: Path) -> dict:
    """Measure the alternatives of a stage; name -> figures."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peaks: list[float] = []
    programs = start_all(alternatives(args, stage, precision, directory))
    take_turns(programs, args.rounds, lambda: peaks.append(matmul_peak(DEVICE, dtype)))
    needed, peak = flops_per_token(args.config, args.length[stage]), max(peaks)
    lengths = dpo_tokens(args, directory) if stage == "dpo" else 0
    found = {}
    for each in programs:
        if stage == "dpo":  # tokens of both sequences of a pair
            for report in each.reports:
                report["tokens"] = report["rows"] * lengths
        found[each.name] = figures(each, programs[0], MEASURE[stage], needed / peak)
    return {"peak_flops": peak, "flops_per_token": needed, "rows": found}


def dpo_tokens(args: argparse.Namespace, directory: Path) -> float:
    """Tokens of a pair in the mean, the prompt counted with each of its replies."""
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER)
    data_args = DataArguments(
        train_files=[str(directory / "dpo.jsonl")], eval_ratio=0.0, on_bad_rows="skip"
    )
    half = args.length["dpo"] // 2
    rows = load_preferences(data_args, tokenizer, PreferenceArguments(None, half, half)).train
    return statistics.fmean(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )


def figures(program: Program, first: Program, measure: str, seconds_per_token: float) -> dict:
    """What the table and the JSON say of an alternative."""
    reports, speeds = program.reports, program.speeds(measure)
    pairs = zip(first.speeds(measure), speeds, strict=True)
    parts = [name for name in ("forward", "backward", "optimizer") if name in reports[0]]
    median = statistics.median
    result = {
        measure: {"median": median(speeds), "min": min(speeds), "max": max(speeds)},
        "ours_is_faster_by": median(a / b for a, b in pairs),
        "useful": program.speed("tokens"),
        "peak": program.speed("tokens") * seconds_per_token,
        "seconds": [report["seconds"] for report in reports],
        "other": None,
        "memory": program.memory,
        "startup": program.startup,
        "saving": None,
        "loss": program.probe if program.probe is not None else reports[-1].get("loss"),
        "losses": [report.get("loss") for report in reports],
    }
    if parts and DEVICE == "cpu":
        shares = {part: median(r[part] / r["seconds"] for r in reports) for part in parts}
        result |= shares | {"other": 1 - sum(shares.values())}
    saved = [report["saving"] for report in reports if report["saving"]]
    if saved:
        steps = SAVE_EVERY * median(result["seconds"])
        result |= {"save_seconds": median(saved), "saving": median(saved) / (median(saved) + steps)}
    return result


def show(stage: str, precision: str, found: dict, args: argparse.Namespace) -> None:
    """Print the table of a stage."""
    measure = MEASURE[stage]
    title = f"{stage}, {precision}, {args.size}, {args.batch_size} rows,"
    title += f" peak {found['peak_flops'] / 1e9:,.0f} GFLOP/s"
    table = Table(title=title, box=None)
    unit = {"tokens": "useful tokens/s", "trained": "trained tokens/s", "rows": "pairs/s"}[measure]
    columns = [unit, "min", "max", "ours : this", "useful/s", "peak", "other", "saving"]
    for column in ("", *columns, "MiB", "start s", "loss"):
        table.add_column(column, justify="right" if column else "left")

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    for name, row in found["rows"].items():
        values = [row[measure][key] for key in ("median", "min", "max")]
        cells = [f"{value:,.2f}" if measure == "rows" else f"{value:,.0f}" for value in values]
        cells += [f"{row['ours_is_faster_by']:.2f}", f"{row['useful']:,.0f}", share(row["peak"])]
        cells += [share(row["other"]), share(row["saving"])]
        cells += [f"{row['memory'] / 2**20:,.0f}" if row["memory"] else "", f"{row['startup']:.1f}"]
        table.add_row(name, *cells, "" if row["loss"] is None else f"{row['loss']:.5f}")
    Console(highlight=False, width=150).print(table)


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory of the files below")
    parser.add_argument("--texts", default="pretrain_zh.jsonl")
    parser.add_argument("--chats", default="sft_zh.jsonl")
    parser.add_argument("--pairs", default="dpo_zh_derived.jsonl")
    parser.add_argument("--minimind", type=Path, help="a clone of minimind")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    names = [name for rows in STAGES.values() for name in rows]
    parser.add_argument("--without", nargs="+", default=[], choices=names, help="rows to leave out")
    parser.add_argument("--precisions", nargs="+", choices=("bf16", "fp32"))
    parser.add_argument("--size", help="of configs/model; default: 26m, with --quick tiny")
    parser.add_argument("--batch_size", type=int, default=8, help="rows or pairs of a micro-batch")
    parser.add_argument("--length", type=int, help=f"of rows; default: {LENGTH}")
    parser.add_argument("--rounds", type=int, help="default: 7, with --quick 3")
    parser.add_argument("--ours", default="", help="more options of pretrain.py, as one word")
    parser.add_argument("--quick", action="store_true", help="a small model, few rows and rounds")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    args.size = args.size or ("tiny" if args.quick else "26m")
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.save_steps = max(2, args.rounds // 2)  # so that some turns hold a checkpoint
    args.config = read_size(args.size)
    if args.length:
        args.length = dict.fromkeys(LENGTH, args.length)
    else:
        args.length = QUICK_LENGTH if args.quick else LENGTH
    # As many pairs as are trained: precomputing the reference of all takes minutes
    pairs = (args.rounds + 3) * args.batch_size
    few = {"pretrain": 4000, "sft": 1000, "dpo": pairs}
    args.documents = few if args.quick else {"pretrain": None, "sft": None, "dpo": pairs}
    fast = bf16_is_fast()
    precisions = args.precisions or (["bf16", "fp32"] if fast else ["fp32"])
    if args.quick and not args.precisions:
        precisions = precisions[:1]
    print(f"{device_name()}, bf16 is {'fast' if fast else 'emulated'}, torch {torch.__version__}")

    results: dict[str, Any] = {
        "device": device_name(),
        "bf16_is_fast": fast,
        "size": args.size,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(args, directory)
        for precision in precisions:
            for stage in args.stages:
                found = run_stage(args, stage, precision, directory)
                results[f"{stage} {precision}"] = found
                show(stage, precision, found, args)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
