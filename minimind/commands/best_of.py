"""Best-of-n sampling: `--best_of` and `--reward_model` of the commands that generate."""

import sys
from argparse import ArgumentParser, Namespace
from statistics import fmean
from typing import Any

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import say
from minimind.common.streams import printable

BATCH = 64  # replies that are sampled at a time


def add_best_of(parser: ArgumentParser) -> None:
    """The options of best-of-n sampling."""
    add = parser.add_argument
    add("--best_of", type=int, default=1, help="sample so many answers, and show the best one")
    reward = "the reward model that chooses: a stage directory of train_reward.py"
    add("--reward_model", metavar="DIR", help=reward)


def load_reward_model(args: Namespace) -> Any:
    """The reward model that the options name, or None; raises UserError for half of them."""
    if args.best_of == 1 and args.reward_model is None:
        return None
    if args.reward_model is None:
        raise UserError(f"--best_of {args.best_of} needs a judge: give --reward_model DIR.")
    if args.best_of == 1:
        raise UserError("--reward_model chooses among several answers: give --best_of, such as 8.")
    if args.temperature == 0:
        raise UserError(
            f"--best_of {args.best_of} with --temperature 0 samples the same answer each time. Give"
            " a higher temperature."
        )
    from minimind.evaluation import RewardModel

    return RewardModel.load(args.reward_model)


def write_best(model, tokenizer, reward, ids: list[int], messages: list, args: Namespace) -> Any:
    """Sample --best_of replies after the prompt `ids`, and print and return the one to `messages`
    with the highest reward, a `generation.Reply`.

    Raises:
        UserError: see `decode`; or no reply can be scored.
    """
    from minimind.data.messages import reply_message
    from minimind.generation import generate_batch

    room = max(1, min(args.max_new_tokens, model.config.max_position_embeddings - len(ids)))
    replies: list = []
    while (left := args.best_of - len(replies)) > 0:
        batch = [ids] * min(left, BATCH)
        replies += generate_batch(model, tokenizer, batch, room, args.temperature, args.top_p)

    encoded = reward.encode([[*messages, reply_message(reply.text)] for reply in replies])
    fitting = [i for i, each in enumerate(encoded) if not isinstance(each, BadRowError)]
    if not fitting:
        raise UserError(f"the reward model can score none of the answers: {encoded[0]}.")
    rewards = reward.score_ids([encoded[i] for i in fitting])
    best = max(range(len(fitting)), key=rewards.__getitem__)
    reply = replies[fitting[best]]
    print(printable(reply.text), flush=True)
    say(
        f"best of {len(replies)}: reward {rewards[best]:.2f}, mean {fmean(rewards):.2f}",
        file=sys.stderr,
    )
    return reply
