"""`minimind plan`."""

from argparse import Namespace

from minimind.commands.options import add_json, select
from minimind.common.options import STAGE_NAMES
from minimind.common.recipes import read_recipe


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="tokens, FLOPs, memory, hours and cost of runs before they start",
        description=(
            "Also takes the options of the recipes' scripts, after the recipes, and plans with"
            " them. --stage STAGE --help_all shows them."
        ),
    )
    parser.set_defaults(run=run, takes_stage_options=True)
    add = parser.add_argument
    recipes = "YAML recipes, of one stage or a whole pipeline"
    add("recipes", nargs="+", metavar="RECIPE", help=recipes)
    add(
        "--device",
        type=device,
        help=(
            "a card (4090, 4090d, 3060, 3080, 3090, t4, v100, a10, a100, a800, l20, h20, h100,"
            " h800, h200), cpu, or measured: five real steps on this machine; default: what this"
            " machine has"
        ),
    )
    add("--processes", type=int, default=1, help="devices that train together")
    add("--price", type=price, help="of one device for an hour: 8/h, $1.50/h, 8 CNY/h, 8元/h")
    tokens = "to pretrain on in place of the recipe's data: 1e9"
    add("--tokens", type=float, help=tokens)
    add("--stage", choices=STAGE_NAMES, help="default: recognised from the recipe")
    add_json(parser, "print one JSON object")


def device(name: str) -> str:
    """The name of a device that `minimind plan` knows."""
    from minimind.costs.devices import device_name

    return device_name(name)


def price(text: str):
    """A device's price for an hour."""
    from minimind.costs.prices import parse_price

    return parse_price(text)


def run(args: Namespace) -> None:
    """Plan the runs of the recipes."""
    for recipe in args.recipes:  # read again with its stage's options, which takes torch: seconds
        read_recipe(recipe)

    from minimind.planning.plans import run

    options = select(args, "device", "processes", "price", "stage", "tokens")
    run(args.recipes, args.options, as_json=args.json, **options)
