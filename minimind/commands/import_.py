"""`minimind import`."""

from argparse import Namespace

from minimind.commands.options import select
from minimind.common.files import check_output
from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "import", help="read a published MiniMind, Llama or Qwen3 checkpoint"
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("source", help="a HuggingFace folder, or a state dict (.pth, .bin, .safetensors)")
    add("destination", help="directory to write")
    add("--config", help="JSON with fields of the model, ours or theirs; default: the source's")
    add("--tokenizer", help="directory with tokenizer.json; default: the source")
    add("--num_attention_heads", type=int, help="query heads; a .pth does not record them")
    add("--rope_theta", type=float, help="base of RoPE; a .pth does not record it")


def run(args: Namespace) -> None:
    """Import the checkpoint and print what was inferred or assumed."""
    from minimind.importing import import_checkpoint

    check_output(args.destination, directory=True)
    names = ("source", "destination", "config", "tokenizer", "num_attention_heads", "rope_theta")
    model, report = import_checkpoint(**select(args, *names))
    millions = f"{model.num_parameters() / 1e6:.2f}"
    say(f"{args.source}: {report.layout}, {millions} M parameters, {model.dtype}")
    for title, fields in {"from the shapes": report.inferred, "ASSUMED": report.assumed}.items():
        if fields:
            say(f"  {title}: {', '.join(f'{name} {value}' for name, value in fields.items())}")
    for note in report.notes:
        say(f"  note: {note}")
    say(f"-> {args.destination}")
