"""Replies to a prompt -> a preference pair that train_dpo.py reads, or why there is none."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from minimind.common.errors import BadRowError, UserError
from minimind.data.conversations import Conversation
from minimind.data.message_order import check_order
from minimind.data.messages import Message, reply_message
from minimind.evaluation.judges import Judge
from minimind.evaluation.replies import Replies
from minimind.generation import Reply

REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8, such as half a character


class PairReply(NamedTuple):
    """A reply that may become part of a pair; `stopped` as in `Reply`."""

    text: str
    message: Message
    stopped: bool


class Question(NamedTuple):
    """Two replies to a prompt between which a person chooses."""

    prompt: Conversation
    left: PairReply
    right: PairReply


def candidates(prompt: Conversation, replies: Sequence[Reply], counts: Counter) -> list[PairReply]:
    """The replies that training accepts, equal ones once; the others are counted as "unusable".

    A reply is usable if it has words or calls a tool, and all its bytes are text.
    """
    found: list[PairReply] = []
    for reply in sorted(replies, key=lambda reply: not reply.stopped):  # of equal ones that ended
        candidate = PairReply(reply.text, reply_message(reply.text), reply.stopped)
        if not is_usable(prompt, candidate):
            counts["unusable"] += 1
        elif all(candidate.message != other.message for other in found):
            found.append(candidate)
    return found


def is_usable(prompt: Conversation, candidate: PairReply) -> bool:
    """Whether training accepts a reply to the prompt."""
    try:
        check_order([*prompt.messages, candidate.message])
    except BadRowError:
        return False
    return REPLACEMENT not in candidate.text


def ranked_pairs(
    prompts: Sequence[Conversation],
    steps: Iterable[tuple[int, Replies]],
    judge: Judge,
    counts: Counter,
) -> list[dict]:
    """The best and the worst reply to each prompt as a pair, with their scores.

    A reply that reached the limit of tokens may be rejected, never chosen: it would be trained to
    end in the middle. Prompts without a pair are counted: "equal", all their usable replies are the
    same; "unfinished", none of them ended by itself; "tie", nothing is better than the worst.

    Args:
        steps: see `sample_replies`.

    Raises:
        UserError: the judge cannot score a reply.
    """
    rows = []
    for first, replies in steps:
        group = prompts[first : first + len(replies)]
        found = [candidates(*each, counts) for each in zip(group, replies, strict=True)]
        scores = judge.scores(group, [[each.text for each in replies] for replies in found])
        for prompt, each, values in zip(group, found, scores, strict=True):
            ended = [index for index, candidate in enumerate(each) if candidate.stopped]
            if len(each) < 2:
                counts["equal"] += 1
            elif not ended:
                counts["unfinished"] += 1
            else:
                best = max(ended, key=values.__getitem__)
                worst = min(range(len(each)), key=values.__getitem__)
                if values[best] > values[worst]:
                    marks = {"chosen_score": values[best], "rejected_score": values[worst]}
                    rows.append(pair_row(prompt, each[best], each[worst]) | marks)
                else:
                    counts["tie"] += 1
    return rows


def pair_row(prompt: Conversation, chosen: PairReply, rejected: PairReply) -> dict:
    """A row for train_dpo.py."""
    row = {"prompt": prompt.messages, "chosen": [chosen.message], "rejected": [rejected.message]}
    return row | ({"tools": prompt.tools} if prompt.tools else {})


# For a person


def questions(
    prompts: Sequence[Conversation], steps: Iterable[tuple[int, Replies]], counts: Counter
) -> list[Question]:
    """The replies that ended by themselves, two and two, for a person to choose from; prompts with
    fewer than two different ones are counted as "equal"."""
    asked = []
    for first, replies in steps:
        group = prompts[first : first + len(replies)]
        for prompt, each in zip(group, replies, strict=True):
            found = candidates(prompt, [reply for reply in each if reply.stopped], counts)
            counts["equal"] += len(found) < 2
            twos = zip(found[::2], found[1::2], strict=False)
            asked += [Question(prompt, left, right) for left, right in twos]
    return asked


def chosen_pairs(
    asked: Sequence[Question], choices: Mapping[int, str], counts: Counter
) -> list[dict]:
    """The pairs that a person chose; counts "tie", "skip" and "open" questions."""
    rows = []
    for number, question in enumerate(asked):
        choice = choices.get(number, "open")
        if choice == "left":
            rows.append(pair_row(question.prompt, question.left, question.right))
        elif choice == "right":
            rows.append(pair_row(question.prompt, question.right, question.left))
        else:
            counts[choice] += 1
    return rows


# Both


def describe_pairs(path: Path, rows: Sequence[dict]) -> dict:
    """The number of pairs, and the mean length and score of their chosen and rejected replies.

    Raises:
        UserError: there is no pair to write to `path`.
    """
    if not rows:
        raise UserError(
            f"no pair was found, so {path} was not written: no reply is better than another one to"
            " the same prompt. Give more --samples, a higher --temperature, or another judge."
        )
    facts = {"pairs": len(rows)}
    for side in ("chosen", "rejected"):
        facts[f"{side}_characters"] = round(fmean(len(row[side][0]["content"]) for row in rows), 1)
        if f"{side}_score" in rows[0]:
            facts[f"{side}_score"] = round(fmean(row[f"{side}_score"] for row in rows), 6)
    return facts
