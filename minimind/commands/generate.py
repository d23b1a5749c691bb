"""`minimind generate`."""

from argparse import Namespace

from minimind.commands.best_of import add_best_of, load_reward_model, write_best
from minimind.commands.options import add_decoding
from minimind.common.streams import printable


def add_parser(commands) -> None:
    parser = commands.add_parser("generate", help="continue a text")
    parser.set_defaults(run=run)
    add_decoding(parser)
    add_best_of(parser)
    parser.add_argument("--prompt", required=True, help="the beginning of the text")


def run(args: Namespace) -> None:
    """Print the prompt and its continuation."""
    import torch
    from transformers import set_seed

    from minimind.generation import decode, load_for_generation, text_start

    reward = load_reward_model(args)
    model, tokenizer = load_for_generation(args.directory)
    set_seed(args.seed)
    ids = text_start(tokenizer, args.prompt)
    print(printable(args.prompt), end="", flush=True)
    if reward:  # it reads the prompt as the user's message
        messages = [{"role": "user", "content": args.prompt}]
        write_best(model, tokenizer, reward, ids, messages, args)
        return
    decode(model, tokenizer, torch.tensor([ids]), args.max_new_tokens, args.temperature, args.top_p)
