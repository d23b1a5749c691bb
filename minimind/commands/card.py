"""`minimind card`."""

from argparse import Namespace

from minimind.common.errors import UserError
from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "card",
        help="write the model card of a stage directory or an export: README.md for the Hub",
        description=(
            "A finished stage and an export have a card already; this writes it again, with what"
            " only you know. What you leave out stays as the card has it. See docs/share.md."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("directory", help="a stage directory or an export")
    licence = "the licence as the Hub spells it: apache-2.0, mit, cc-by-4.0, other ..."
    add("--license", metavar="ID", help=licence)
    language = "the languages (ISO 639), instead of those found in the training rows: zh en"
    add("--language", nargs="+", metavar="CODE", help=language)
    base = "the repository of an adapter's base on the Hub"
    add("--base_model", metavar="OWNER/NAME", help=base)
    score_card = "add the scores of this card.json, which minimind evaluate --output wrote"
    add("--score_card", metavar="FILE", help=score_card)
    overwrite = "write over a README.md that you wrote or edited"
    add("--overwrite", action="store_true", help=overwrite)


def run(args: Namespace) -> None:
    """Write the card."""
    from minimind.sharing import CARD, Choices, check_name, write_model_card

    if args.base_model:
        check_name("--base_model", args.base_model)
    choices = Choices(args.license, args.language, args.base_model)
    if not write_model_card(args.directory, choices, args.overwrite, args.score_card):
        raise UserError(
            f"{args.directory}/{CARD} was edited, and is kept as it is. --overwrite writes the card"
            " anew; to keep your changes, edit the file itself."
        )
    say(f"model card: {args.directory}/{CARD}")
