"""`minimind prepare`."""

from argparse import Namespace

from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tokenise and pack a corpus ahead of pretraining",
        description=(
            "Takes the options of pretrain.py, --config included, and does what that does before"
            " training. --help_all shows them."
        ),
    )
    parser.set_defaults(run=run, takes_stage_options=True)


def run(args: Namespace) -> None:
    """Prepare the blocks of a pretraining run, where it will find them."""
    from minimind.common.cache import cache_directory
    from minimind.stages import PRETRAIN, load_rows
    from minimind.tokenizer import load_tokenizer
    from minimind.training.command_line import parse

    data_args, model_args, training_args = parse(*PRETRAIN.arguments, argv=args.options)
    directory = cache_directory("blocks", permanent=True)
    tokenizer = load_tokenizer(model_args.model_name_or_path or model_args.tokenizer)
    facts = load_rows(PRETRAIN, data_args, tokenizer, training_args).facts
    for part, counts in facts.items():
        numbers = {name: number for name, number in counts.items() if isinstance(number, int)}
        words = (f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items())
        say(f"{part:<6} {', '.join(words)}")
    say(
        f"kept in {directory}; pretrain.py with the same data, tokenizer and packing finds it there"
    )
