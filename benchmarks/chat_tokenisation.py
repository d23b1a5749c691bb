"""Conversations to ids and loss mask: ours, and `apply_chat_template` with its assistant mask, row
by row.

    python benchmarks/chat_tokenisation.py chats.jsonl [more.jsonl ...]

Ids and labels of all rows are compared; prints rows per second of each, from parsed messages on, on
one thread each.
"""

import argparse
import json
import os

os.environ.setdefault("RAYON_NUM_THREADS", "1")


from side_by_side import device_name, side_by_side

from minimind.common.errors import BadRowError
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.chats import BATCH
from minimind.data.conversations import to_conversation
from minimind.data.files import read_rows
from minimind.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="conversations in any format")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    encoder = ChatEncoder(tokenizer)
    conversations = [row.data for row in read_rows(args.files, "skip", to_conversation)]

    def ours() -> list[list[dict]]:
        batches = (
            conversations[start : start + BATCH] for start in range(0, len(conversations), BATCH)
        )
        found = (tokenize_conversations(batch, encoder) for batch in batches)
        return [
            [] if isinstance(each, BadRowError) else each.rows for part in found for each in part
        ]

    def library() -> list[dict]:
        rows = []
        for messages, tools, _ in conversations:
            row = tokenizer.apply_chat_template(
                messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
            pairs = zip(row["input_ids"], row["assistant_masks"], strict=True)
            rows.append(
                {
                    "input_ids": row["input_ids"],
                    "labels": [t if mask else -100 for t, mask in pairs],
                }
            )
        return rows

    same = sum(mine == [theirs] for mine, theirs in zip(ours(), library(), strict=True))
    times = side_by_side({"ours": ours, "apply_chat_template": library}, args.rounds)
    speeds = {name: round(len(conversations) / seconds) for name, (seconds, _) in times.items()}
    ratio = round(times["apply_chat_template"][1], 2)
    if args.json:
        print(
            json.dumps(
                {
                    "rows": len(conversations),
                    "equal": same,
                    "rows_per_second": speeds,
                    "ratio": ratio,
                }
            )
        )
        return
    print(
        f"{device_name()}: {len(conversations):,} conversations, {same:,} with equal ids and labels"
    )
    for name, speed in speeds.items():
        print(f"{name:<20} {speed:>8,} rows/s")
    print(f"ours is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
