"""`minimind <command>`: everything that is not a training stage."""

import argparse
import os
import sys
from contextlib import redirect_stdout

from minimind.common.bounds import check_options
from minimind.common.errors import UserError, reports_user_errors
from minimind.common.files import check_output, write_bytes, write_text
from minimind.common.language import say
from minimind.common.options import HelpAll, OptionFormatter, Version, option_names, suggestion
from minimind.common.streams import json_text, printable


class Parser(argparse.ArgumentParser):
    """argparse, except: a mistake is one `UserError` message."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=OptionFormatter, **options)
        self.add_argument("--help_all", action=HelpAll)
        self.set_defaults(parser=self)

    def error(self, message: str):
        """Called by argparse where the arguments do not fit."""
        raise UserError(f"{message}. See {self.prog} --help.")

    def print_all_help(self, namespace: argparse.Namespace) -> None:
        """The help, and where a command takes a stage's options those of --stage, of pretraining by
        default."""
        self.print_help()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    print(f"\n{command.format_help()}", end="")
        if self.get_default("run") in TAKE_STAGE_OPTIONS:
            from minimind.planning.planned_runs import STAGES, StageParser

            script, types = STAGES[getattr(namespace, "stage", None) or "pretrain"]
            print(f"\nand all options of {script}:\n")
            StageParser(types).print_all_help()


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options; each sets `run`, the function that gets the parsed
    arguments."""
    parser = Parser(prog="minimind", description="Train, talk to and measure small chat models.")
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    tokenizer_commands(commands)

    inspect_command(commands)

    doctor_commands(commands)

    def decoding_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("directory", help="a stage directory; adapters included")
        command.add_argument(
            "--max_new_tokens", type=int, default=256, help="tokens of one answer at most"
        )
        command.add_argument(
            "--temperature", type=float, default=0.7, help="0 takes the likeliest token each time"
        )
        command.add_argument(
            "--top_p", type=float, default=0.9, help="nucleus that tokens are drawn from"
        )
        command.add_argument("--seed", type=int, default=42, help="seed of the drawing")

    chat = commands.add_parser("chat", help="talk to a chat model in the terminal")
    decoding_options(chat)
    chat.add_argument("--system", help="system prompt")
    chat.add_argument(
        "--no_history", action="store_true", help="do not keep what is typed for the next chat"
    )
    chat.set_defaults(run=run_chat)

    generate = commands.add_parser("generate", help="continue a text")
    decoding_options(generate)
    generate.add_argument("--prompt", required=True, help="the beginning of the text")
    generate.set_defaults(run=run_generate)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure held-out files: loss, bits per byte, exact answers",
        description=(
            "Prints one JSON object: the loss of the trained replies of conversations, or of"
            " documents; of conversations also how many last replies the model gives word for word."
        ),
    )
    evaluate.add_argument("directory", help="a stage directory; adapters included")
    evaluate.add_argument(
        "files", nargs="+", help="files, directories or globs of conversations or documents"
    )
    evaluate.add_argument(
        "--stage", choices=("sft", "pretrain"), help="default: recognised from the first rows"
    )
    evaluate.add_argument(
        "--on_bad_rows",
        choices=("error", "skip"),
        help="default: leave out at most 0.1 %% of the rows",
    )
    evaluate.add_argument(
        "--max_length",
        type=int,
        default=1024,
        help="tokens of a row: longer documents are cut into several",
    )
    evaluate.add_argument(
        "--max_new_tokens",
        type=int,
        default=64,
        help="tokens of one answer at most; 0 asks nothing: the loss alone",
    )
    evaluate.add_argument("--batch_size", type=int, default=64, help="rows at a time, at most")
    column_options(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    export = commands.add_parser(
        "export", help="write a model as vLLM, llama.cpp, ollama and transformers read it"
    )
    export.add_argument("directory", help="a stage directory; adapters are merged")
    export.add_argument("out", help="directory to write; must not hold anything")
    export.add_argument(
        "--format",
        required=True,
        choices=("qwen3", "qwen3-moe", "llama", "minimind", "gguf"),
        help=(
            "qwen3 (qk_norm), qwen3-moe or llama (no qk_norm) for stock tools, minimind with its"
            " own code, gguf for llama.cpp and ollama"
        ),
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "q8_0"),
        help="default: that of the saved weights; q8_0 is for gguf",
    )
    export.set_defaults(run=run_export)

    merge = commands.add_parser("merge", help="merge an adapter into its base")
    merge.add_argument("adapter", help="the stage directory of an adapter")
    merge.add_argument("out", help="stage directory to write; must not hold anything")
    merge.set_defaults(run=run_merge)

    importing = commands.add_parser(
        "import", help="read a published MiniMind, Llama or Qwen3 checkpoint"
    )
    importing.add_argument(
        "source", help="a HuggingFace folder, or a state dict (.pth, .bin, .safetensors)"
    )
    importing.add_argument("destination", help="directory to write")
    importing.add_argument(
        "--config", help="JSON with fields of the model, ours or theirs; default: the source's"
    )
    importing.add_argument("--tokenizer", help="directory with tokenizer.json; default: the source")
    importing.add_argument(
        "--num_attention_heads", type=int, help="query heads; a .pth does not tell"
    )
    importing.add_argument("--rope_theta", type=float, help="base of RoPE; a .pth does not tell")
    importing.set_defaults(run=run_import)

    clean = commands.add_parser(
        "clean", help="clean, filter and deduplicate data, with a report of each step"
    )
    clean.add_argument(
        "files", nargs="+", metavar="SRC", help="files, directories or globs of rows of any kind"
    )
    clean.add_argument(
        "destination", metavar="DST", help="directory to write: shards, report.json, report.html"
    )
    clean.add_argument(
        "--recipe",
        required=True,
        help="YAML file with the steps, such as configs/data/pretrain.yaml",
    )
    clean.add_argument(
        "--num_proc", type=int, help="processes; default: all cores. The result is the same"
    )
    clean.add_argument(
        "--on_bad_rows",
        choices=("error", "skip"),
        help="default: leave out at most 0.1 %% of the rows",
    )
    clean.add_argument(
        "--text_unit",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what one row of a txt file is (default: the whole file)",
    )
    clean.add_argument("--json", action="store_true", help="print the report as one JSON object")
    column_options(clean, unread=False)
    clean.set_defaults(run=run_clean)

    prepare = commands.add_parser(
        "prepare",
        help="tokenise and pack a corpus ahead of pretraining",
        description=(
            "Takes the options of pretrain.py, --config included, and does what that does before it"
            " trains. --help_all shows them."
        ),
    )
    prepare.set_defaults(run=run_prepare)

    plan = commands.add_parser(
        "plan",
        help="tokens, FLOPs, memory, hours and cost of runs before they start",
        description=(
            "Takes the options of the recipes' scripts too, after the recipes, and then plans with"
            " those. --stage STAGE --help_all shows them."
        ),
    )
    plan.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="YAML recipes, of one stage or a whole pipeline",
    )
    plan.add_argument(
        "--device",
        type=device,
        help=(
            "a card (4090, 4090d, 3060, 3080, 3090, t4, v100, a10, a100, a800, l20, h20, h100,"
            " h800, h200), cpu, or measured: five real steps on this machine; default: what this"
            " machine has"
        ),
    )
    plan.add_argument("--processes", type=int, default=1, help="devices that train together")
    plan.add_argument(
        "--price", type=price, help="of one device for an hour: 8/h, $1.50/h, 8 CNY/h, 8元/h"
    )
    plan.add_argument(
        "--tokens", type=float, help="to be pretrained on, in place of the recipe's data: 1e9"
    )
    plan.add_argument(
        "--stage", choices=("pretrain", "sft", "lora", "dpo"), help="default: told from the recipe"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=run_plan)

    world = commands.add_parser("world", help="write the embedded corpus as files")
    world.add_argument("directory", help="directory to write")
    world.set_defaults(run=run_world)
    return parser


def doctor_commands(commands) -> None:
    """`minimind doctor` and `minimind replay`."""
    doctor = commands.add_parser(
        "doctor",
        help="look for what would go wrong in a run, before it runs",
        description=(
            "Checks a recipe, its data, model and DeepSpeed JSON, with a fix for each fault."
            " Further options are the stage's own and override the recipe (--stage STAGE --help_all"
            " shows them). Exit code 1 if a finding is an error."
        ),
    )
    doctor.add_argument("recipe", help="a YAML recipe, such as configs/sft/26m.yaml")
    doctor.add_argument(
        "--stage", choices=("pretrain", "sft", "lora", "dpo"), help="default: told from the recipe"
    )
    doctor.add_argument(
        "--processes", type=int, default=1, help="how many the run will have (default 1)"
    )
    doctor.add_argument(
        "--quick", action="store_true", help="only the checks that every run makes when it starts"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")
    doctor.set_defaults(run=run_doctor)

    replay = commands.add_parser(
        "replay", help="compute the loss of a kept batch again: which rows, which layer"
    )
    replay.add_argument("directory", help="the bad_batch-STEP directory of a run")
    replay.add_argument(
        "--model", help="stage directory with the weights; default: those kept with the batch"
    )
    replay.add_argument("--precision", choices=("fp32", "bf16"), help="default: that of the run")
    replay.add_argument("--json", action="store_true", help="print one JSON object instead")
    replay.set_defaults(run=run_replay)


def inspect_command(commands) -> None:
    """`minimind inspect`."""
    inspect = commands.add_parser(
        "inspect",
        help="see what a run would train on: tokens by role, loss mask, lengths, findings",
        description=(
            "Reads and tokenises as the stage does and reports on the finished rows. Exit code 1 if"
            " a finding is an error."
        ),
    )
    inspect.add_argument(
        "files", nargs="+", help="files, directories or globs of conversations, pairs or documents"
    )
    inspect.add_argument(
        "--tokenizer", help="directory of a tokenizer or a stage; default: the package's"
    )
    inspect.add_argument(
        "--stage",
        choices=("sft", "dpo", "pretrain"),
        help="default: recognised from the first rows",
    )
    inspect.add_argument("--eval_files", nargs="+", help="held-out files, compared with the others")
    inspect.add_argument(
        "--max_length",
        type=int,
        default=512,
        help="tokens per row, as the stage has it; for pretrain the block size",
    )
    inspect.add_argument(
        "--boundary_markers",
        choices=("split", "keep", "error"),
        default="split",
        help="as pretrain.py has it",
    )
    inspect.add_argument(
        "--chat_template", help="as the stage has it: the name of a template, or a .jinja file"
    )
    inspect.add_argument("--long_conversations", default="keep_last", help="as the stage has it")
    inspect.add_argument("--train_turns", default="all", help="as the stage has it")
    inspect.add_argument("--weighted_loss", choices=("true", "false"), help="as the stage has it")
    inspect.add_argument(
        "--on_bad_rows",
        choices=("error", "skip"),
        help="what a run would do with bad rows, which are findings here",
    )
    column_options(inspect)
    inspect.add_argument(
        "--rows",
        type=int,
        help="how many rows are shown; default: 3 in the terminal, 100 on the page, all in --json",
    )
    inspect.add_argument(
        "--row", metavar="FILE:LINE", help="show this row instead of the first ones"
    )
    inspect.add_argument("--html", metavar="FILE", help="also write the report as one HTML page")
    inspect.add_argument(
        "--png", metavar="FILE", help="also write the length histogram as a picture"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead")
    inspect.set_defaults(run=run_inspect)


def column_options(command: argparse.ArgumentParser, unread: bool = True) -> None:
    """`--columns`, and `--unread_columns` for commands that look for text nobody reads."""
    command.add_argument(
        "--columns",
        nargs="+",
        metavar="MEANING=COLUMN",
        help="what columns with names of their own mean, such as prompt=问题 response=回答",
    )
    if unread:
        command.add_argument(
            "--unread_columns",
            nargs="+",
            help="columns to leave out, or ignore: all that nothing reads",
        )


def tokenizer_commands(commands) -> None:
    """`minimind tokenizer train|evaluate|compare`."""
    tokenizer = commands.add_parser("tokenizer", help="train and judge tokenizers").add_subparsers(
        required=True, metavar="train|evaluate|compare"
    )
    train = tokenizer.add_parser(
        "train", help="train a byte-level BPE tokenizer with ChatML on documents or chats"
    )
    train.add_argument(
        "files", nargs="+", help="files, directories or globs of documents and conversations"
    )
    train.add_argument(
        "--vocab_size", type=int, default=6400, help="tokens, 256 bytes and 3 specials included"
    )
    train.add_argument(
        "--pre_tokenizer",
        default="qwen2",
        help="llama.cpp's name of the rule that splits text before merging",
    )
    train.add_argument("--min_frequency", type=int, default=0, help="merge no pair that is rarer")
    train.add_argument(
        "--weights",
        nargs="+",
        default=[],
        type=domain_weight,
        metavar="DOMAIN=WEIGHT",
        help=(
            "how often the texts of a domain count (a row's 'source', else the name of its file):"
            " 0.25 takes every fourth, 0 none; others count once"
        ),
    )
    train.add_argument("--output_dir", required=True, help="directory to write")
    train.set_defaults(run=run_tokenizer_train)

    evaluate = tokenizer.add_parser("evaluate", help="measure what a tokenizer makes of texts")
    evaluate.add_argument("directory", help="a directory with tokenizer.json, or 'default'")
    evaluate.add_argument(
        "files", nargs="+", help="documents and conversations, best held-out ones"
    )
    evaluate.set_defaults(run=run_tokenizer_evaluate)

    compare = tokenizer.add_parser(
        "compare", help="measure tokenizers side by side on the same texts"
    )
    compare.add_argument(
        "directories", nargs="+", help="directories with tokenizer.json, or 'default'; at least two"
    )
    compare.add_argument(
        "--files", nargs="+", required=True, help="documents and conversations, best held-out ones"
    )
    compare.set_defaults(run=run_tokenizer_compare)

    for name, command in {"evaluate": evaluate, "compare": compare}.items():
        command.set_defaults(command=name)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.add_argument(
            "--save", metavar="FILE", help="also write the report: .svg, .html or .txt"
        )
    for command in (train, evaluate, compare):
        column_options(command, unread=False)
        command.add_argument(
            "--on_bad_rows",
            choices=("error", "skip"),
            help="default: leave out at most 0.1 %% of the rows",
        )


def domain_weight(text: str) -> tuple[str, float]:
    """A domain and its weight, from "domain=weight"."""
    domain, _, weight = text.rpartition("=")
    if not domain:
        raise ValueError(text)
    return domain, float(weight)


def device(name: str) -> str:
    """The name of a device that `minimind plan` knows."""
    from minimind.costs.devices import device_name

    return device_name(name)


def price(text: str):
    """A device's price for an hour."""
    from minimind.costs.prices import parse_price

    return parse_price(text)


@reports_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    check_options(args.parser._actions, args, args.parser.prog.split()[-1])
    if args.run in TAKE_STAGE_OPTIONS:
        args.options = others
    elif others:
        words = [word.split("=")[0] for word in others if word.startswith("--")]
        guess = suggestion(words, option_names(args.parser), "--")
        raise UserError(
            f"unrecognized arguments: {' '.join(others)}.{guess} See {args.parser.prog} --help."
        )
    if (
        getattr(args, "json", args.run is run_evaluate)
        and os.environ.get("WANDB_MODE") == "offline"
    ):
        # transformers 5.23 prints a line on this variable when it is imported; stdout is the
        # report's alone.
        with redirect_stdout(sys.stderr):
            import transformers.integrations.integration_utils  # noqa: F401
    args.run(args)


# The imports below stand inside the functions, so that `minimind --help` answers without loading
# torch.


def run_tokenizer_train(args: argparse.Namespace) -> None:
    """`minimind tokenizer train`."""
    import time
    from pathlib import Path

    from minimind.tokenizer import check_destination, save_tokenizer, train_tokenizer
    from minimind.tokenizer.cutting import Cutter
    from minimind.tokenizer.training import untrained
    from minimind.tokenizer_evaluation.texts import read_texts, weighted

    check_output(args.output_dir, directory=True)
    check_destination(Path(args.output_dir))
    say(f"training a tokenizer of {args.vocab_size:,} tokens on {' '.join(args.files)}")
    began = time.perf_counter()
    check = Cutter(untrained(args.pre_tokenizer)).check
    found = read_texts(args.files, args.on_bad_rows, columns=args.columns, check=check)
    texts = weighted(found, dict(args.weights))
    tokenizer = train_tokenizer(
        (text.text for text in texts), args.vocab_size, args.pre_tokenizer, args.min_frequency
    )
    save_tokenizer(tokenizer, Path(args.output_dir))
    fewer = " (the text has no more pairs to merge)" if len(tokenizer) < args.vocab_size else ""
    say(
        f"{len(tokenizer):,} tokens{fewer} in {time.perf_counter() - began:.0f} s ->"
        f" {args.output_dir}"
    )


def run_tokenizer_evaluate(args: argparse.Namespace) -> None:
    """`minimind tokenizer evaluate`."""
    from minimind.tokenizer_evaluation import comparison as judging
    from minimind.tokenizer_evaluation import report
    from minimind.tokenizer_evaluation.texts import read_texts

    report.check_save(args.save)
    directory = tokenizer_directory(args.directory)
    check = judging.check_of([directory])
    result = judging.evaluate(
        directory, read_texts(args.files, args.on_bad_rows, "tokenising", args.columns, check)
    )
    print_report(args, result, report.evaluation_tables)


def run_tokenizer_compare(args: argparse.Namespace) -> None:
    """`minimind tokenizer compare`."""
    from minimind.tokenizer_evaluation import comparison as judging
    from minimind.tokenizer_evaluation import report
    from minimind.tokenizer_evaluation.texts import read_texts

    if len(args.directories) < 2:
        raise UserError(
            "compare: found one directory, expected at least two: compare DIR DIR --files FILE."
        )
    report.check_save(args.save)
    directories = [tokenizer_directory(directory) for directory in args.directories]
    check = judging.check_of(directories)
    result = judging.compare(
        directories, read_texts(args.files, args.on_bad_rows, "tokenising", args.columns, check)
    )
    print_report(args, result, report.comparison_tables)


def tokenizer_directory(name: str) -> str:
    """A tokenizer's directory as given; "default" is the one that ships with the package."""
    from pathlib import Path

    from minimind.tokenizer import DEFAULT_TOKENIZER

    return str(DEFAULT_TOKENIZER) if name == "default" and not Path(name).exists() else name


def print_report(args: argparse.Namespace, result: dict, tables) -> None:
    """Print a result as JSON or as tables."""

    from minimind.tokenizer_evaluation.report import show

    if args.json:
        print(json_text(result, indent=2))
    if args.save or not args.json:
        show(tables(result), f"minimind tokenizer {args.command}", args.save, quiet=args.json)


def run_chat(args: argparse.Namespace) -> None:
    """`minimind chat`."""
    from minimind.chat import chat

    history = not args.no_history
    chat(
        args.directory,
        args.system,
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.seed,
        history,
    )


def run_generate(args: argparse.Namespace) -> None:
    """`minimind generate`."""
    from minimind.chat import generate

    generate(
        args.directory, args.prompt, args.max_new_tokens, args.temperature, args.top_p, args.seed
    )


def run_evaluate(args: argparse.Namespace) -> None:
    """`minimind evaluate`."""
    from contextlib import redirect_stdout

    from minimind.data.columns import Columns
    from minimind.evaluation import evaluate
    from minimind.generation import load_for_generation

    columns = Columns(args.columns, args.unread_columns)
    with redirect_stdout(sys.stderr):  # what the loaders say is not the report
        model, tokenizer = load_for_generation(args.directory)
        options = {
            name: getattr(args, name) for name in ("max_length", "max_new_tokens", "batch_size")
        }
        result = evaluate(
            model, tokenizer, args.files, args.stage, args.on_bad_rows, columns, **options
        )
    print(json_text(result, indent=2))


def run_inspect(args: argparse.Namespace) -> None:
    """`minimind inspect`."""
    from contextlib import redirect_stdout
    from pathlib import Path

    from minimind import inspection
    from minimind.data.chats import ChatArguments
    from minimind.inspection import display
    from minimind.tokenizer import load_tokenizer
    from minimind.training.arguments import DataArguments

    for file in filter(None, (args.html, args.png)):
        check_output(file)
    weighted = None if args.weighted_loss is None else args.weighted_loss == "true"
    try:
        chat_args = ChatArguments(
            args.chat_template, args.long_conversations, args.train_turns, weighted_loss=weighted
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error
    data_args = DataArguments(
        args.files,
        args.eval_files,
        eval_ratio=0.0,
        on_bad_rows=args.on_bad_rows,
        columns=args.columns,
        unread_columns=args.unread_columns,
        boundary_markers=args.boundary_markers,
    )
    with redirect_stdout(sys.stderr):  # what the loaders say is not the report
        tokenizer = load_tokenizer(args.tokenizer)
        stage = args.stage or inspection.recognise_stage(args.files, data_args.reading())
        inspected = inspection.inspect_files(
            stage, data_args, tokenizer, args.max_length, chat_args
        )
    chosen = inspected.find(args.row) if args.row else range(len(inspected.tokens))

    def shown(default: int) -> list[int]:
        return list(chosen[: default if args.rows is None else args.rows])

    if args.html:
        page = display.page(inspected, shown(100), tokenizer, " ".join(args.files))
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, page)
    if args.png:
        Path(args.png).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(args.png, display.length_png(inspected.report["lengths"]))
    if args.json:
        display.print_json(inspected, shown(len(chosen)))
    else:
        display.print_inspection(inspected, shown(3), tokenizer)
    if inspected.errors():
        sys.exit(1)


def run_doctor(args: argparse.Namespace) -> None:
    """`minimind doctor`."""
    from contextlib import redirect_stdout

    from minimind.doctor import doctor, print_report

    with redirect_stdout(sys.stderr):  # what the loaders say is not the report
        report = doctor(args.recipe, args.options, args.stage, args.processes, args.quick)
    if args.json:
        print(json_text(report))
    else:
        print_report(report)
    if report["errors"]:
        sys.exit(1)


def run_replay(args: argparse.Namespace) -> None:
    """`minimind replay`."""
    from contextlib import redirect_stdout

    from minimind.training.replay import print_replay, replay

    with redirect_stdout(sys.stderr):
        report = replay(args.directory, args.model, args.precision)
    if args.json:
        print(json_text(report))
    else:
        print_replay(report)


def run_export(args: argparse.Namespace) -> None:
    """`minimind export`."""
    from minimind.common.launch import prepare_launch
    from minimind.export import export
    from minimind.export.verification import report

    prepare_launch(uses_deepspeed=False)
    check_output(args.out, directory=True)
    record = export(args.directory, args.out, args.format, args.dtype)
    say(f"{args.directory} -> {args.out} ({record['format']}, {record['dtype']})")
    say(report(record["verification"]))


def run_merge(args: argparse.Namespace) -> None:
    """`minimind merge`."""
    from minimind.common.launch import prepare_launch
    from minimind.export.merging import merge
    from minimind.export.verification import report

    prepare_launch(uses_deepspeed=False)
    check_output(args.out, directory=True)
    record = merge(args.adapter, args.out)
    say(f"{args.adapter} + {record['parent']['base']['directory']} -> {args.out}")
    say(report(record["verification"]))


def run_import(args: argparse.Namespace) -> None:
    """`minimind import`."""
    from minimind.importing import import_checkpoint

    check_output(args.destination, directory=True)
    model, report = import_checkpoint(
        args.source,
        args.destination,
        args.config,
        args.tokenizer,
        num_attention_heads=args.num_attention_heads,
        rope_theta=args.rope_theta,
    )
    say(
        f"{args.source}: {report.layout}, {model.num_parameters() / 1e6:.2f} M parameters,"
        f" {model.dtype}"
    )
    for title, fields in {"from the shapes": report.inferred, "ASSUMED": report.assumed}.items():
        if fields:
            say(f"  {title}: {', '.join(f'{name} {value}' for name, value in fields.items())}")
    for note in report.notes:
        say(f"  note: {note}")
    say(f"-> {args.destination}")


def run_clean(args: argparse.Namespace) -> None:
    """`minimind clean`."""

    from minimind.cleaning import clean
    from minimind.cleaning.report import report_text

    check_output(args.destination, directory=True)
    report = clean(
        args.files,
        args.destination,
        args.recipe,
        args.num_proc,
        args.on_bad_rows,
        args.text_unit,
        args.columns,
    )
    print(json_text(report) if args.json else printable(report_text(report)))


def run_prepare(args: argparse.Namespace) -> None:
    """`minimind prepare`."""
    from minimind.common.cache import cache_directory
    from minimind.data.documents import load_blocks
    from minimind.tokenizer import load_tokenizer
    from minimind.training.arguments import (
        DataArguments,
        PretrainConfig,
        PretrainModelArguments,
        parse,
    )

    data_args, model_args, training_args = parse(
        DataArguments, PretrainModelArguments, PretrainConfig, argv=args.options
    )
    directory = cache_directory("blocks", kept=True)
    tokenizer = load_tokenizer(model_args.model_name_or_path or model_args.tokenizer)
    facts = load_blocks(data_args.or_embedded("pretrain"), tokenizer, **training_args.packing).facts
    for part, counts in facts.items():
        shown = ", ".join(
            f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if isinstance(n, int)
        )
        say(f"{part:<6} {shown}")
    say(
        f"kept in {directory}; pretrain.py with the same data, tokenizer and packing finds it there"
    )


def run_plan(args: argparse.Namespace) -> None:
    """`minimind plan`."""
    from minimind.common.recipes import read_recipe

    for recipe in args.recipes:  # read again with its stage's options, which takes torch: seconds
        read_recipe(recipe)
    from minimind.planning.plans import run

    run(
        args.recipes,
        args.options,
        args.device,
        args.processes,
        args.price,
        args.stage,
        args.tokens,
        args.json,
    )


def run_world(args: argparse.Namespace) -> None:
    """`minimind world`."""
    from pathlib import Path

    from minimind.data.world import write_world

    check_output(args.directory, directory=True)
    for name, path in write_world(Path(args.directory)).items():
        say(f"{name:<14} {path}")


TAKE_STAGE_OPTIONS = (run_prepare, run_plan, run_doctor)


if __name__ == "__main__":
    main()
