"""`minimind score`: the replies in files of conversations or preference pairs, scored by a reward
model."""

from collections.abc import Mapping, Sequence

import numpy as np

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.files import Row, read_rows
from minimind.data.preferences import to_preference
from minimind.evaluation.rewards import RewardModel, pair_metrics
from minimind.inspection import recognise_stage


def score_files(
    reward: RewardModel,
    files: Sequence[str],
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
) -> tuple[list[dict], dict[str, float] | None]:
    """A row for each row of the files, and of pairs the `pair_metrics`.

    A row has "where" ("file:line"), and "chosen" and "rejected", the rewards of a pair, or
    "scores", those of the replies of a conversation, each after all messages before it.

    Raises:
        UserError: see `files.read_rows`; or the files hold neither conversations nor pairs.
    """
    columns = columns or Columns()
    stage = recognise_stage(files, columns)
    if stage == "pretrain":
        raise UserError(f"{files[0]}: found documents, expected conversations or preference pairs.")
    bad_rows, prompts = BadRows(on_bad_rows), []

    def read_pair(data: Mapping) -> list[list[int]]:
        pair = to_preference(data)
        prompt = Conversation(pair["prompt"], pair.get("tools"))
        sides = [prompt.messages + pair[name] for name in ("chosen", "rejected")]
        ids = usable(reward.encode([prompt._replace(messages=side) for side in sides]))
        (start,) = usable(reward.encoder.encode([prompt], prompt=True))
        prompts.append(len(start.ids))
        return ids

    def read_conversation(data: Mapping) -> list[list[int]]:
        conversation = to_conversation(data)
        messages = conversation.messages
        ends = [i for i, each in enumerate(messages, 1) if each["role"] == "assistant"]
        return usable(reward.encode([conversation._replace(messages=messages[:i]) for i in ends]))

    read = read_pair if stage == "dpo" else read_conversation
    rows: list[Row] = list(read_rows(files, bad_rows, read, columns=columns))
    columns.stop()
    rewards = iter(reward.score_ids([ids for row in rows for ids in row.data]))
    scores = [[round(next(rewards), 6) for _ in row.data] for row in rows]
    places = [row.where for row in rows]
    if stage != "dpo":
        names = ("where", "scores")
        return [
            dict(zip(names, row, strict=True)) for row in zip(places, scores, strict=True)
        ], None
    lengths = [
        [len(ids) - prompt for ids in row.data] for row, prompt in zip(rows, prompts, strict=True)
    ]
    names = ("where", "chosen", "rejected")
    scored = [dict(zip(names, (p, *s), strict=True)) for p, s in zip(places, scores, strict=True)]
    return scored, pair_metrics(np.array(scores), np.array(lengths))


def usable(encoded: list) -> list:
    """What was encoded; raises the first BadRowError in it."""
    for each in encoded:
        if isinstance(each, BadRowError):
            raise each
    return encoded
