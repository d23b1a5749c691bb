"""`minimind doctor`."""

import sys
from argparse import Namespace
from contextlib import redirect_stdout

from minimind.commands.options import add_json
from minimind.common.options import STAGE_NAMES
from minimind.common.streams import json_text


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="look for what would go wrong in a run, before it runs",
        description=(
            "Checks a recipe, its data, model and DeepSpeed JSON, with a fix for each fault."
            " Further options are the stage's own and override the recipe (--stage STAGE --help_all"
            " shows them). Exit code 1 if a finding is an error."
        ),
    )
    parser.set_defaults(run=run, takes_stage_options=True)
    add = parser.add_argument
    add("recipe", help="a YAML recipe, such as configs/sft/26m.yaml")
    add("--stage", choices=STAGE_NAMES, help="default: recognised from the recipe")
    add("--processes", type=int, default=1, help="how many processes the run will have (default 1)")
    quick = "only the checks that every run makes when it starts"
    add("--quick", action="store_true", help=quick)
    add_json(parser)


def run(args: Namespace) -> None:
    """Check the recipe; exits with code 1 if a finding is an error."""
    from minimind.doctor import doctor, print_report

    with redirect_stdout(sys.stderr):  # stdout is the report's alone
        report = doctor(args.recipe, args.options, args.stage, args.processes, args.quick)
    if args.json:
        print(json_text(report))
    else:
        print_report(report)
    if report["errors"]:
        sys.exit(1)
