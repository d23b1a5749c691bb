"""Chats -> preference pairs: each reply of a chat, beside a reply of another chat.

    python scripts/contrast_pairs.py chats.jsonl contrast.jsonl --without pairs_eval.jsonl

For a first reward model where few or no pairs exist: it learns which reply belongs to a
conversation (docs/reward.md).
"""

import argparse
import random
from itertools import pairwise
from math import sqrt
from pathlib import Path

from minimind.common.errors import UserError, reports_user_errors
from minimind.common.files import check_output, write_json_lines
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.files import read_rows
from minimind.data.preferences import to_preference

CANDIDATES = 17  # chats of which a rejected reply comes from the most similar one


def bigrams(messages: list[dict]) -> set[str]:
    """The pairs of neighbouring characters in the messages' texts."""
    return {a + b for message in messages for a, b in pairwise(message["content"])}


def similarity(first: set[str], second: set[str]) -> float:
    """The cosine of two sets."""
    return len(first & second) / sqrt(len(first) * len(second) or 1)


def answers(messages: list[dict]) -> list[int]:
    """The places of the replies in words to a user."""
    return [
        place
        for place, (before, reply) in enumerate(pairwise(messages), 1)
        if before["role"] == "user"
        and reply["role"] == "assistant"
        and reply["content"].strip()
        and not reply.get("tool_calls")
    ]


def contrast_pairs(chats: list[Conversation], draw: random.Random) -> list[dict]:
    """A pair for each reply that answers a user, in random order: the rejected reply comes from the
    most similar of `CANDIDATES` other chats, so that the topic alone does not tell."""
    places = [answers(chat.messages) for chat in chats]
    usable = [index for index, found in enumerate(places) if found]
    grams = {index: bigrams(chats[index].messages) for index in usable}
    rows = []
    for index in usable:
        messages, tools, _ = chats[index]
        for place in places[index]:
            others = draw.sample(usable, min(CANDIDATES, len(usable)))
            others = [other for other in others if other != index]
            others.sort(key=lambda other: similarity(grams[index], grams[other]), reverse=True)
            replies = [chats[other].messages[draw.choice(places[other])] for other in others]
            rejected = next(
                (r for r in replies if r["content"] != messages[place]["content"]), None
            )
            if rejected:
                row = {"prompt": messages[:place], "chosen": [messages[place]]}
                row |= {"rejected": [rejected]} | ({"tools": tools} if tools else {})
                rows.append(row)
    draw.shuffle(rows)
    return rows


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chats", nargs="+", help="conversations, in any format of finetune_sft.py")
    parser.add_argument("output", type=Path, help="jsonl file of pairs to write")
    help_text = "pairs; the chats that their questions and chosen replies come from are left out"
    parser.add_argument("--without", nargs="+", default=[], metavar="PAIRS", help=help_text)
    help_text = "jsonl file to write the other chats to, for SFT"
    parser.add_argument("--kept", type=Path, metavar="CHATS", help=help_text)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outputs = [path for path in (args.output, args.kept) if path]
    for path in outputs:
        check_output(path, inputs=[*args.chats, *args.without])
    if args.kept == args.output:
        raise UserError(f"{args.output}: two files cannot be written to one. Name another --kept.")

    # Chats, without those of the held-out pairs
    chats = [row.data for row in read_rows(args.chats, None, to_conversation)]
    without = read_rows(args.without, None, to_preference) if args.without else ()
    pairs = [row.data for row in without]
    held_out = [(p["prompt"][-1]["content"], p["chosen"][0]["content"]) for p in pairs]
    turns = [{(a["content"], b["content"]) for a, b in pairwise(c.messages)} for c in chats]
    kept = [c for c, own in zip(chats, turns, strict=True) if own.isdisjoint(held_out)]
    found = [turn for turn in held_out if any(turn in own for own in turns)]

    rows = contrast_pairs(kept, random.Random(args.seed))
    if not rows:
        raise UserError(f"{', '.join(args.chats)}: found no two chats with different replies.")
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(args.output, rows)
    if args.kept:
        write_json_lines(args.kept, [chat._asdict() for chat in kept])
    print(f"{len(rows):,} pairs from {len(kept):,} of {len(chats):,} chats -> {args.output}")
    if pairs:
        left_out = f"{len(chats) - len(kept):,}, for {len(found):,} of the {len(pairs):,} pairs"
        print(f"chats left out: {left_out} of --without")


if __name__ == "__main__":
    main()
