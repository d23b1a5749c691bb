"""Preference pairs -> rows of token ids and masks, as TRL's trainer expects them.

Prompt and replies are limited separately. Of a prompt the end is kept, cut at the border of a turn
(a question and all until the next one) where possible; of a reply the beginning is kept:

    at most --max_prompt_length                  at most --max_completion_length
    system turn 1 turn 2 turn 3   as it is       a a a a a end     as it is
    system        turn 2 turn 3   first          a a a a           cut: no end token
                         turn 3   then
                         "rn 3"   at last

A pair of which one reply is cut says nothing about where a reply ends: the other has no end token
either. With it, a model would learn to run on where the better reply is the longer one, and a
reward model could tell the two apart by the end token alone.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import PreferenceArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import Outcome
from minimind.data.conversations import Conversation
from minimind.data.long_conversations import BORDER, tokens_before_turns, turns
from minimind.data.loss_mask import completion_mask

REPLIES = ("chosen", "rejected")


class EncodedPair(NamedTuple):
    """A pair as a row, and the tokens before each turn of its prompt."""

    row: dict
    until: list[int]
    escaped: bool

    @property
    def prompt(self) -> list[int]:
        """The ids of its prompt."""
        return self.row["prompt_ids"]


def tokenize_preferences(
    pairs: Sequence[dict], encoder: ChatEncoder, args: PreferenceArguments | None = None
) -> list[Outcome | BadRowError]:
    """Return one row for each pair, or why it has none.

    A row has prompt_ids, chosen_ids and rejected_ids, where nothing is cut identical to those of
    TRL's trainer, and chosen_mask and rejected_mask, 1 where the assistant speaks.

    Counted are `truncated` (anything is cut) with `prompts_cut` and `replies_cut`, `dropped` (too
    long), `identical` (its replies are equal once they are cut, so it is dropped too) and
    `escaped` (its words contain control tokens).
    """
    shortener = _PairShortener(encoder, args or PreferenceArguments())
    results: list[Outcome | BadRowError] = []
    for pair in pairs:
        try:
            results.append(shortener(pair))
        except BadRowError as problem:
            results.append(problem)
    return results


class _TooLongError(Exception):
    """Why nothing of a pair fits."""


class _PairShortener:
    """Pairs -> rows within the limits of `args`."""

    def __init__(self, encoder: ChatEncoder, args: PreferenceArguments):
        self.encoder, self.args = encoder, args
        self.special = set(encoder.tokenizer.all_special_ids)

    def __call__(self, pair: dict) -> Outcome:
        """The row of a pair, or why it has none; raises BadRowError."""
        complete = _encode_pair(Conversation(pair["prompt"], pair.get("tools")), pair, self.encoder)
        row = complete.row
        if row["chosen_ids"] == row["rejected_ids"]:
            raise BadRowError(
                "found chosen equal to rejected in what the chat template writes, expected two"
                " different replies"
            )
        lengths = [len(row[f"{name}_ids"]) for name in ("prompt", *REPLIES)]

        counts = Counter(escaped=int(complete.escaped))
        counts["prompts_cut"] = int(lengths[0] > self.args.max_prompt_length)
        counts["replies_cut"] = int(max(lengths[1:]) > self.args.max_completion_length)
        counts["truncated"] = int(counts["prompts_cut"] or counts["replies_cut"])
        try:
            if counts["prompts_cut"]:
                row = self._cut_prompt(complete, pair)
            if counts["replies_cut"]:
                row = self._cut_replies(row)
        except _TooLongError as problem:
            return Outcome([], Counter(dropped=1), lengths, str(problem))
        if row["chosen_ids"] == row["rejected_ids"]:
            problem = (
                "found chosen equal to rejected once both are cut to --max_completion_length"
                f" {self.args.max_completion_length:,}"
            )
            return Outcome([], Counter(identical=1), lengths, problem)
        return Outcome([row], +counts, lengths)

    def _cut_prompt(self, complete: EncodedPair, pair: dict) -> dict:
        """The row with the end of the prompt that fits; raises _TooLongError."""
        prompt, tools, limit = pair["prompt"], pair.get("tools"), self.args.max_prompt_length
        needed, what = len(complete.prompt), "in the prompt"
        starts = [start for start, _ in turns(prompt)]

        def encoded(messages: list) -> EncodedPair:
            return _encode_pair(Conversation(messages, tools), pair, self.encoder)

        if self.args.long_prompts == "cut":
            # Without the oldest turns
            for turn, start in enumerate(starts[1:], 1):
                if start == starts[-1] or needed - complete.until[turn] <= limit + BORDER:
                    part = encoded(prompt[: starts[0]] + prompt[start:])
                    if len(part.prompt) <= limit:
                        return part.row

            # Without the system message. The question may be cut, before which no space remains
            question, *others = prompt[starts[-1] :]
            question = {**question, "content": question["content"].lstrip()}
            part = encoded([question, *others])
            if len(part.prompt) <= limit:
                return part.row

            # Without the beginning of the question: what the template writes before it, and the end
            bare = Conversation([{**question, "content": ""}, *others], tools)
            (bare,) = self.encoder.encode([bare], prompt=True)
            if isinstance(bare, BadRowError):
                raise bare
            alike = zip(bare.ids, part.prompt, strict=False)
            opening = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], alike))
            if limit > len(bare.ids):
                ids = list(part.prompt)
                kept = ids[:opening] + ids[opening - limit :]
                return {**part.row, "prompt_ids": kept}
            needed, what = len(bare.ids) + 1, "in the last turn of the prompt without its question"
        raise _TooLongError(
            f"found {needed:,} tokens {what}, expected at most --max_prompt_length {limit:,}"
        )

    def _cut_replies(self, row: dict) -> dict:
        """The row with the beginnings of the replies, without end tokens; raises _TooLongError."""
        limit = self.args.max_completion_length
        longer = max(REPLIES, key=lambda name: len(row[f"{name}_ids"]))
        problem = (
            f"found {len(row[f'{longer}_ids']):,} tokens in the {longer} reply, expected at most"
            f" --max_completion_length {limit:,}"
        )
        if self.args.long_completions == "drop":
            raise _TooLongError(problem)
        row = dict(row)
        for name in REPLIES:
            ids, mask = (list(row[f"{name}_{kind}"][:limit]) for kind in ("ids", "mask"))
            while ids and (not mask[-1] or ids[-1] in self.special):
                ids, mask = ids[:-1], mask[:-1]
            if not ids:
                raise _TooLongError(problem)
            row |= {f"{name}_ids": ids, f"{name}_mask": mask}
        return row


def _encode_pair(prompt: Conversation, pair: dict, encoder: ChatEncoder) -> EncodedPair:
    """Return the row of a pair after a prompt; raises BadRowError where it cannot be encoded."""
    results = encoder.encode([prompt], prompt=True)
    results += encoder.encode(
        [prompt._replace(messages=prompt.messages + pair[name]) for name in REPLIES]
    )
    for result in results:
        if isinstance(result, BadRowError):
            raise result
    start, *answered = results
    length = len(start.ids)
    earlier = sum(message["role"] == "assistant" for message in prompt.messages)
    row = {"prompt_ids": start.ids}
    for name, encoded in zip(REPLIES, answered, strict=True):
        if list(encoded.ids[:length]) != list(start.ids):
            raise BadRowError(
                f"the chat template renders the prompt differently before the {name} reply than"
                " alone"
            )
        mask = completion_mask(len(encoded.ids), encoded.replies[earlier:])
        row |= {f"{name}_ids": encoded.ids[length:], f"{name}_mask": mask[length:]}
    until = tokens_before_turns([*prompt.messages, *pair["chosen"]], answered[0])
    escaped = any(encoded.escaped for encoded in answered)
    return EncodedPair(row, until, escaped)
