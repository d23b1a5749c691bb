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

    from minimind.generation import decode, load_for_generation

    reward = load_reward_model(args)
    model, tokenizer = load_for_generation(args.directory)
    set_seed(args.seed)
    ids = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False).input_ids.long()
    if not ids.numel():  # an empty prompt starts a new document, as after the end of another
        ids = torch.tensor([[tokenizer.eos_token_id]])
    print(printable(args.prompt), end="", flush=True)
    if reward:  # it reads the prompt as the user's message
        messages = [{"role": "user", "content": args.prompt}]
        write_best(model, tokenizer, reward, ids[0].tolist(), messages, args)
        return
    decode(model, tokenizer, ids, args.max_new_tokens, args.temperature, args.top_p)
