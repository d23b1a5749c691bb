"""Preference pairs -> rows of token ids and masks, as TRL's trainer expects them."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import Outcome
from minimind.data.conversations import Conversation
from minimind.data.long_conversations import BORDER, tokens_before_turns, turns
from minimind.data.loss_mask import completion_mask


class EncodedPair(NamedTuple):
    """A pair as a row; the name and length of its longer conversation, and the tokens of that
    before each turn of the prompt."""

    row: dict
    longest: str
    length: int
    until: list[int]
    escaped: bool


def tokenize_preferences(
    pairs: Sequence[dict],
    encoder: ChatEncoder,
    max_length: int | None = None,
    args: ChatArguments | None = None,
) -> list[Outcome | BadRowError]:
    """Return one row for each pair, or why it has none.

    A row has prompt_ids, chosen_ids and rejected_ids, identical to those of TRL's trainer, and
    chosen_mask and rejected_mask, 1 where the assistant speaks. A pair longer than `max_length`
    loses the oldest turns of its prompt (keep_last) or is left out (drop).
    """
    policy = (args or ChatArguments()).long_conversations
    results: list[Outcome | BadRowError] = []
    for pair in pairs:
        try:
            results.append(_tokenize_pair(pair, encoder, max_length, policy))
        except BadRowError as problem:
            results.append(problem)
    return results


def _tokenize_pair(
    pair: dict, encoder: ChatEncoder, max_length: int | None, policy: str
) -> Outcome:
    prompt, tools = pair["prompt"], pair.get("tools")
    complete = encoded = _encode_pair(Conversation(prompt, tools), pair, encoder)
    starts = [start for start, _ in turns(prompt)]
    for turn, start in enumerate(starts):
        if turn:
            tokens = complete.length - complete.until[turn]
            if start != starts[-1] and tokens > max_length + BORDER:
                continue
            system = [message for message in prompt[:start] if message["role"] == "system"]
            encoded = _encode_pair(Conversation(system + prompt[start:], tools), pair, encoder)
        if max_length is None or encoded.length <= max_length:
            counts = Counter(truncated=int(turn > 0), escaped=int(encoded.escaped))
            return Outcome([encoded.row], +counts, complete.length)
        if policy == "drop":
            break
    problem = (
        f"found {encoded.length:,} tokens of prompt and {encoded.longest} reply, expected at most"
        f" --max_length {max_length:,}"
    )
    return Outcome([], Counter(dropped=1), complete.length, problem)


def _encode_pair(prompt: Conversation, pair: dict, encoder: ChatEncoder) -> EncodedPair:
    """Return the row of a pair after a prompt; raises BadRowError where it cannot be encoded."""
    names = ("chosen", "rejected")
    results = encoder.encode([prompt], prompt=True)
    results += encoder.encode([prompt._replace(messages=prompt.messages + pair[n]) for n in names])
    for result in results:
        if isinstance(result, BadRowError):
            raise result
    start, *answered = results
    length = len(start.ids)
    earlier = sum(message["role"] == "assistant" for message in prompt.messages)
    row = {"prompt_ids": start.ids}
    for name, encoded in zip(names, answered, strict=True):
        if list(encoded.ids[:length]) != list(start.ids):
            raise BadRowError(
                f"the chat template renders the prompt differently before the {name} reply than"
                " alone"
            )
        mask = completion_mask(len(encoded.ids), encoded.replies[earlier:])
        row |= {f"{name}_ids": encoded.ids[length:], f"{name}_mask": mask[length:]}
    name, longest = max(zip(names, answered, strict=True), key=lambda named: len(named[1].ids))
    until = tokens_before_turns([*prompt.messages, *pair[name]], longest)
    escaped = any(encoded.escaped for encoded in answered)
    return EncodedPair(row, name, len(longest.ids), until, escaped)
