"""Preference pairs -> rows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import Tokenized
from minimind.data.conversations import Conversation
from minimind.data.files import BadRowError
from minimind.data.long_conversations import BORDER, tokens_until, turns
from minimind.data.packing import IGNORED


def tokenize_preferences(
    pairs: Sequence[dict],
    encoder: ChatEncoder,
    max_length: int | None = None,
    args: ChatArguments | None = None,
) -> list[Tokenized | BadRowError]:
    """Each pair -> one row of prompt_ids, chosen_ids and rejected_ids, as TRL's trainer makes them,
    and of chosen_mask and rejected_mask, 1 where the assistant speaks; or why it cannot be used.

    A pair longer than `max_length` loses the oldest turns of its prompt (keep_last) or is left out
    (drop).
    """
    args = args or ChatArguments()
    results = []
    for pair in pairs:
        try:
            results.append(_tokenized_pair(pair, encoder, max_length, args))
        except BadRowError as problem:
            results.append(problem)
    return results


def _tokenized_pair(
    pair: dict, encoder: ChatEncoder, max_length: int | None, args: ChatArguments
) -> Tokenized:
    prompt, tools = pair["prompt"], pair.get("tools")
    starts, whole = [start for start, _ in turns(prompt)], None
    for turn, start in enumerate(starts):
        is_last = turn == len(starts) - 1
        if turn and not is_last and whole.length - whole.until[turn] > max_length + BORDER:
            continue
        head = [message for message in prompt[:start] if message["role"] == "system"]
        messages = head + prompt[start:] if turn else prompt
        found = _encoded_pair(Conversation(messages, tools), pair, encoder)
        whole = whole or found
        if max_length is None or found.length <= max_length:
            return Tokenized(
                [found.row],
                +Counter(truncated=int(turn > 0), escaped=int(found.escaped)),
                whole.length,
            )
        if args.long_conversations == "drop":
            break
    problem = (
        f"found {found.length:,} tokens of prompt and {found.longest} reply, expected at most"
        f" --max_length {max_length:,}"
    )
    return Tokenized([], Counter(dropped=1), whole.length, problem)


class _EncodedPair(NamedTuple):
    """A pair as a row; the tokens of its `longest` conversation, and of it before each turn of the
    prompt."""

    row: dict
    longest: str
    length: int
    until: list[int]
    escaped: bool


def _encoded_pair(prompt: Conversation, pair: dict, encoder: ChatEncoder) -> _EncodedPair:
    (start,) = encoder.encode([prompt], prompt=True)
    names = ("chosen", "rejected")
    wholes = encoder.encode(
        [prompt._replace(messages=prompt.messages + pair[name]) for name in names]
    )
    for result in (start, *wholes):
        if isinstance(result, BadRowError):
            raise result
    asked = sum(message["role"] == "assistant" for message in prompt.messages)
    row, lengths = {"prompt_ids": start.ids}, {}
    for name, whole in zip(names, wholes, strict=True):
        if list(whole.ids[: len(start.ids)]) != list(start.ids):
            raise BadRowError(
                f"the chat template renders the prompt differently before the {name} reply than"
                " alone"
            )
        mask = [0] * len(whole.ids)
        for begin, end in whole.replies[asked:]:
            mask[begin:end] = [1] * (end - begin)
        row |= {f"{name}_ids": whole.ids[len(start.ids) :], f"{name}_mask": mask[len(start.ids) :]}
        lengths[name] = len(whole.ids)
    longest = max(lengths, key=lengths.get)
    until = tokens_until([*prompt.messages, *pair[longest]], wholes[names.index(longest)])
    return _EncodedPair(
        row, longest, lengths[longest], until, any(whole.escaped for whole in wholes)
    )


def preference_labels(rows: Iterable[dict]) -> list[dict]:
    """Rows of `tokenize_preferences` -> one row of input_ids and labels for each reply."""
    labelled = []
    for row in rows:
        for name in ("chosen", "rejected"):
            reply = row[f"{name}_ids"]
            labels = [
                token if mask else IGNORED
                for token, mask in zip(reply, row[f"{name}_mask"], strict=True)
            ]
            ids = row["prompt_ids"] + reply
            labelled.append(
                {"input_ids": ids, "labels": [IGNORED] * len(row["prompt_ids"]) + labels}
            )
    return labelled
