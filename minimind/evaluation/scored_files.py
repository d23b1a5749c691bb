"""`minimind score`: the replies in files of conversations or preference pairs, scored by a reward
model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.files import read_rows
from minimind.data.preferences import to_preference
from minimind.evaluation.rewards import RewardModel, pair_metrics
from minimind.inspection import recognise_stage


class Replies(NamedTuple):
    """The sequences of a row, each ending with a reply, and the tokens of that reply; of a pair the
    chosen reply is first."""

    ids: list[list[int]]
    lengths: list[int]


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
    is_pairs = stage == "dpo"

    def convert(data: Mapping) -> Replies:
        found = list(_pair(data) if is_pairs else _conversation(data))
        encoded = reward.encode([each for each, _ in found])
        if problem := next((each for each in encoded if isinstance(each, BadRowError)), None):
            raise problem
        prompts = [each._replace(messages=each.messages[:count]) for each, count in found]
        before = reward.encoder.encode(prompts, prompt=True)
        if problem := next((each for each in before if isinstance(each, BadRowError)), None):
            raise problem
        lengths = [len(ids) - len(start.ids) for ids, start in zip(encoded, before, strict=True)]
        return Replies(encoded, lengths)

    rows = list(read_rows(files, BadRows(on_bad_rows), convert, columns=columns))
    columns.stop()
    rewards = iter(reward.score_ids([ids for row in rows for ids in row.data.ids]))
    scores = [[next(rewards) for _ in row.data.ids] for row in rows]
    if not is_pairs:
        return [
            {"where": row.where, "scores": [round(score, 6) for score in values]}
            for row, values in zip(rows, scores, strict=True)
        ], None
    scored = [
        {"where": row.where, "chosen": round(chosen, 6), "rejected": round(rejected, 6)}
        for row, (chosen, rejected) in zip(rows, scores, strict=True)
    ]
    return scored, pair_metrics(np.array(scores), np.array([row.data.lengths for row in rows]))


def _conversation(data: Mapping) -> Iterator[tuple[Conversation, int]]:
    """A conversation up to each of its replies, and the number of messages before that."""
    conversation = to_conversation(data)
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            yield conversation._replace(messages=conversation.messages[: index + 1]), index


def _pair(data: Mapping) -> Iterator[tuple[Conversation, int]]:
    """The two conversations of a pair, and the number of messages of its prompt."""
    pair = to_preference(data)
    for name in ("chosen", "rejected"):
        messages = pair["prompt"] + pair[name]
        yield Conversation(messages, pair.get("tools")), len(pair["prompt"])
