"""Time of the score card's log-probabilities beside the bare forward passes that they need.

    python benchmarks/score_card.py [--quick] [--size 26m] [--questions 1000] [--json FILE]

Questions with four choices, generated with a seed, in two forms: letters (the question with its
choices, then one of four letters) and cloze (the question, then the text of one of the choices).
The bare passes compute the model's body, without its head, on each different input once, sorted by
length, in batches of as many tokens. The goal is a ratio of at most 1.1; cloze is far below it,
since the four inputs of a question share the question.
"""

import argparse
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from side_by_side import DEVICE, device_name, side_by_side
from torch.nn.utils.rnn import pad_sequence
from twins import read_size

from minimind import MiniMindForCausalLM
from minimind.evaluation.scoring import LIMITS, ModelSubject, Request
from minimind.tokenizer import load_tokenizer


def questions(count: int, vocab_size: int) -> dict[str, list[Request]]:
    """The requests of `count` questions in each form: a question has 30 to 90 tokens, a choice 4 to
    12."""
    draw = random.Random(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(3, vocab_size), k=draw.randint(low, high)))

    letters, cloze = [], []
    for _ in range(count):
        question, choices = tokens(30, 90), [tokens(4, 12) for _ in range(4)]
        listed = sum(choices, (2, *question))
        letters += [Request(listed, (letter,)) for letter in range(3, 7)]
        cloze += [Request((2, *question), choice) for choice in choices]
    return {"letters": letters, "cloze": cloze}


@torch.inference_mode()
def bare(model: MiniMindForCausalLM, requests: Sequence[Request]) -> None:
    """The body's forward passes on the different inputs."""
    inputs = {(*request.context, *request.continuation)[:-1] for request in requests}
    waiting = sorted(inputs, key=len, reverse=True)
    limit = LIMITS["cpu" if DEVICE == "cpu" else "other"][0]
    while waiting:
        count = max(1, limit // len(waiting[0]))
        chosen, waiting = waiting[:count], waiting[count:]
        ids = pad_sequence([torch.tensor(ids) for ids in chosen], batch_first=True)
        model.model(ids.to(DEVICE), use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="26m", help="file of configs/model")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the tiny model, 40 questions")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    if args.quick:
        args.size, args.questions = "tiny", 40

    torch.manual_seed(0)
    config = read_size(args.size)
    model = MiniMindForCausalLM(config).to(DEVICE).eval()
    subject = ModelSubject(model, load_tokenizer())
    print(f"{device_name()}, {args.size}, {args.questions:,} questions, {args.rounds} rounds")
    rows = []
    for form, requests in questions(args.questions, config.vocab_size).items():
        runs = {
            "bare forward passes": partial(bare, model, requests),
            "score card": partial(subject.log_probabilities, requests),
        }
        for name, (seconds, ratio) in side_by_side(runs, args.rounds).items():
            rows.append({"form": form, "name": name, "seconds": seconds, "ratio": ratio})
            print(f"{form:8} {name:20} {seconds:8.2f} s  x {ratio:.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps({**vars(args), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
