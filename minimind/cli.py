"""`minimind <command>`: everything that is not a training stage.

The modules of the commands load torch and their rooms when they run, so that `minimind --help`
answers at once.
"""

import argparse
import os
import sys
from contextlib import redirect_stdout

from minimind.commands import (
    card,
    chat,
    clean,
    compare,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    merge,
    pairs,
    plan,
    prepare,
    push,
    replay,
    score,
    serve,
    tokenizer,
    web,
    world,
)
from minimind.common.bounds import check_options
from minimind.common.errors import UserError, reports_user_errors
from minimind.common.options import HelpAll, OptionFormatter, Version, option_names, suggestion

# In the order of the help
COMMANDS = (tokenizer, inspect, doctor, replay, chat, generate, evaluate, compare, score, pairs)
COMMANDS += (web, serve, export, merge, import_, card, push, clean, prepare, plan, world)


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
        if self.get_default("takes_stage_options"):
            from minimind.stages import STAGES
            from minimind.training.parser import StageParser

            spec = STAGES[getattr(namespace, "stage", None) or "pretrain"]
            print(f"\nand all options of {spec.script}:\n")
            StageParser(spec.arguments).print_all_help()


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options; each sets `run`, the function that gets the parsed
    arguments."""
    parser = Parser(prog="minimind", description="Train, talk to and measure small chat models.")
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


@reports_user_errors
def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    args, others = build_parser().parse_known_args(argv)
    command = args.parser
    check_options(command._actions, args, command.prog.split()[-1])
    if getattr(args, "takes_stage_options", False):
        args.options = others
    elif others:
        options = [word.split("=")[0] for word in others if word.startswith("--")]
        guess = suggestion(options, option_names(command), "--")
        raise UserError(
            f"unrecognized arguments: {' '.join(others)}.{guess} See {command.prog} --help."
        )
    in_pipes = getattr(args, "json_in_pipes", False) and not sys.stdout.isatty()
    if (in_pipes or getattr(args, "json", False)) and os.environ.get("WANDB_MODE") == "offline":
        # transformers 5.23 prints a line on this variable when it is imported; stdout is the
        # report's alone.
        with redirect_stdout(sys.stderr):
            import transformers.integrations.integration_utils  # noqa: F401
    args.run(args)


if __name__ == "__main__":
    main()
