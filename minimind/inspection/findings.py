"""What is worth a word about rows: each check looks for a few kinds of findings; docs/inspect.md
lists them all."""

import re
from collections.abc import Iterable
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from minimind.data.bad_rows import BAD_ROW_SHARE
from minimind.data.chat_summary import Reading
from minimind.data.dialogues import VOICES
from minimind.inspection.tokens import (
    NO_TEXT,
    OTHER,
    Messages,
    Replies,
    Texts,
    Tokens,
    ratio,
    special_tokens,
)
from minimind.tokenizer import text_bytes

SEVERITIES = ("error", "warning", "info")
PLACES = 5  # named in one finding
CUT_SHARE = 0.01  # of the rows: more than this cut and it is worth a warning
LOST_SHARE = 0.2  # of the rows: more than this and a run stops
# Of the rows: more than this with turns spelled out and a template wrote the file
RENDERED_SHARE = 0.5
# Of the pairs: where chosen is longer this often, length alone tells it from rejected
LONGER_SHARE = 0.7
SHORT_REPLY = 2  # words (tokens without the end token) that make a reply at least worth a look
SEARCHED = 1 << 20  # tokens turned into text at a time
REASONS = (  # what a bad row's problem says, the name of the finding, and what to do
    (
        "found chosen equal to rejected",
        "identical_pairs",
        "They have no preference to learn. Remove them.",
    ),
    ("an empty reply", "empty_replies", "The model would learn to say nothing. Remove them."),
)
LEFT_OUT = {
    "bad_rows",
    "too_long_rows",
    "rows_without_trained_token",
    *(name for _, name, _ in REASONS),
}


class Findings(list):
    """Findings, the worst first when sorted; each {"name", "severity", "count", "text", "advice",
    "places"}."""

    def add(
        self,
        name: str,
        severity: str,
        count: int,
        text: str,
        advice: str,
        places: Iterable[str] = (),
    ) -> None:
        """Append one, with the first few of its places; nothing if `count` is 0."""
        if count:
            finding = {
                "name": name,
                "severity": severity,
                "count": int(count),
                "text": text,
                "advice": advice,
            }
            self.append({**finding, "places": list(islice(places, PLACES))})

    def in_order(self) -> list[dict]:
        """The worst first, otherwise as they were found."""
        return sorted(self, key=lambda finding: SEVERITIES.index(finding["severity"]))


def check_tokenizer(found: Findings, tokenizer: PreTrainedTokenizerFast) -> None:
    """Find what makes a tokenizer unfit for training."""
    if tokenizer.eos_token_id is None:
        text, advice = "the tokenizer has no end token (eos_token)", "Set one, or no reply can end."
        found.add("no_end_token", "error", 1, text, advice)
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        text = f"pad_token and eos_token are both {tokenizer.eos_token!r}"
        advice = (
            "Padding is masked by its place here. A trainer that masks by the token would mask each"
            " end too."
        )
        found.add("padding_is_end_token", "info", 1, text, advice)


def check_mask(
    found: Findings,
    tokens: Tokens,
    messages: Messages,
    replies: Replies,
    tokenizer,
    every_reply: bool = True,
) -> None:
    """Find wrong labels. `every_reply`: whether the options ask to train all replies (false for
    pairs too)."""
    trained, before = tokens.trained, tokens.trained_before
    tags = "Check the generation tags of the chat template."
    if not trained.any():
        found.add(
            "nothing_trained",
            "error",
            len(tokens),
            "no token has a label: nothing would be learnt",
            tags,
        )
        return
    per_row = before[tokens.starts[1:]] - before[tokens.starts[:-1]]
    empty = np.flatnonzero(per_row == 0)
    text = f"{len(empty):,} of {len(tokens):,} rows have no trained token"
    advice = "They cost time and teach nothing. Leave them out, or check their roles."
    found.add(
        "rows_without_trained_token", "warning", len(empty), text, advice, tokens.places(empty)
    )

    wrong = np.flatnonzero(trained & (tokens.labels != tokens.ids))
    text = f"{len(wrong):,} labels differ from the token at their own position"
    advice = (
        "The model shifts the labels itself: a label is the token beside it, not the next one, or"
        " it is -100."
    )
    found.add(
        "labels_differ", "error", len(wrong), text, advice, tokens.places(tokens.row_of(wrong))
    )

    foreign = before[messages.end] - before[messages.start]
    foreign[messages.reply | (messages.names[messages.role] == OTHER)] = 0
    names = ", ".join(np.unique(messages.names[messages.role][foreign > 0]))
    text = f"{foreign.sum():,} tokens of {names} have a label; only the assistant's may"
    found.add(
        "other_roles_trained",
        "error",
        foreign.sum(),
        text,
        tags,
        tokens.places(messages.row[foreign > 0]),
    )

    learnt = replies.trained > 0
    missing = learnt & ~replies.end_trained
    places = tokens.places(replies.row[missing])
    if missing.all() or (learnt.any() and not replies.end_trained.any()):
        text = (
            f"no reply's end token {tokenizer.eos_token!r} has a label: the model would never learn"
            " to stop"
        )
        found.add("end_never_trained", "error", missing.sum(), text, tags, places)
    else:
        text = (
            f"{missing.sum():,} of {learnt.sum():,} trained replies end without a trained"
            f" {tokenizer.eos_token!r}"
        )
        advice = (
            "Cut conversations after a reply, not within, or the model learns to stop less often."
        )
        found.add("end_not_trained", "warning", missing.sum(), text, advice, places)

    border = replies.border
    text = (
        f"in {border.sum():,} of {learnt.sum():,} trained replies the header or what follows the"
        " end has a label"
    )
    advice = (
        f"The mask is shifted, or its tags are too wide: the template writes these tokens. {tags}"
    )
    found.add(
        "border_trained", "error", border.sum(), text, advice, tokens.places(replies.row[border])
    )
    partly = learnt & ~replies.whole & ~missing & ~border
    text = f"{partly.sum():,} of {learnt.sum():,} trained replies have words without a label"
    advice = (
        "Right where only a part is meant to be learnt (an answer without its reasoning); else"
        " check the template."
    )
    found.add(
        "replies_partly_trained",
        "warning",
        partly.sum(),
        text,
        advice,
        tokens.places(replies.row[partly]),
    )
    if every_reply:
        without = ~learnt & (per_row[replies.row] > 0)
        text = f"{without.sum():,} of {len(learnt):,} replies are context only"
        advice = "Right where the options or the rows choose the turns to train."
        found.add(
            "replies_not_trained",
            "info",
            without.sum(),
            text,
            advice,
            tokens.places(replies.row[without]),
        )


def check_replies(found: Findings, tokens: Tokens, replies: Replies) -> None:
    """Find replies that say nothing, or next to nothing."""
    learnt = replies.trained > 0
    empty, short = (
        learnt & (replies.words == 0),
        learnt & (replies.words > 0) & (replies.words <= SHORT_REPLY),
    )
    text = f"{empty.sum():,} trained replies have no word before their end token"
    advice = "The model would learn to say nothing. Remove them."
    found.add(
        "empty_replies", "warning", empty.sum(), text, advice, tokens.places(replies.row[empty])
    )
    text = (
        f"{short.sum():,} of {learnt.sum():,} trained replies are of {SHORT_REPLY} tokens at most"
    )
    advice = "Look whether they are answers."
    found.add("short_replies", "info", short.sum(), text, advice, tokens.places(replies.row[short]))


def check_structure(found: Findings, tokens: Tokens, messages: Messages, tokenizer) -> None:
    """Find control tokens where no template puts them: a text that was taken for structure."""
    ids = tokens.ids
    if not messages.is_chatml:
        return
    of_token = messages.of_token
    stop = messages.stop[of_token]
    stray = (ids == tokenizer.eos_token_id) & (stop >= 0) & (np.arange(len(ids)) > stop)
    stray |= ids == (
        -1 if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) else tokenizer.pad_token_id
    )
    stray |= (messages.names[messages.role] == OTHER)[of_token]
    same = (messages.role[1:] == messages.role[:-1]) & (messages.row[1:] == messages.row[:-1])
    same &= np.isin(messages.names[messages.role[1:]], ("system", "user", "assistant"))
    rows = np.concatenate([tokens.row_of(np.flatnonzero(stray)), messages.row[1:][same]])
    count = len(np.unique(rows))
    text = (
        f"in {count:,} rows control tokens stand where no template puts them, or a role speaks"
        " twice running"
    )
    advice = (
        "Text was taken for control tokens: whoever wrote it chose the roles. Tokenise text without"
        " special tokens."
    )
    found.add("control_tokens_in_text", "error", count, text, advice, tokens.places(rows))


def search_text(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, pattern: re.Pattern[bytes]
) -> np.ndarray:
    """The positions of the tokens in whose text a match of `pattern` begins; no match spans special
    tokens."""
    pieces = [piece or NO_TEXT for piece in text_bytes(tokenizer)]
    sizes = np.array([len(piece) for piece in pieces])
    offsets, text = np.cumsum(sizes) - sizes, np.frombuffer(b"".join(pieces), np.uint8)
    found = []
    row = 0
    # Whole rows at a time, so that the memory is bounded and no match is cut
    while row < len(tokens):
        next_row = max(int(np.searchsorted(tokens.starts, tokens.starts[row] + SEARCHED)), row + 1)
        begin, end = tokens.starts[row], tokens.starts[min(next_row, len(tokens))]
        ids, row = tokens.ids[begin:end], next_row
        size = sizes[ids]
        starts = np.cumsum(size) - size
        index = np.repeat(offsets[ids] - starts, size) + np.arange(size.sum())
        matches = np.array(
            [match.start() for match in pattern.finditer(text[index].tobytes())], np.int64
        )
        found.append(begin + np.searchsorted(starts, matches, side="right") - 1)
    return np.concatenate(found)


def check_text(found: Findings, tokens: Tokens, messages: Messages, tokenizer) -> None:
    """Find special tokens spelled out within text, by role."""
    names = [name.encode() for name in special_tokens(tokenizer)]
    positions = search_text(tokens, tokenizer, re.compile(b"|".join(map(re.escape, names))))
    roles = messages.names[messages.role[messages.of_token[positions]]]
    for role in np.unique(roles):
        rows = np.unique(tokens.row_of(positions[roles == role]))
        text = f"special tokens are spelled out in the {role} text of {len(rows):,} rows"
        advice = (
            "They are tokenised as plain text and control nothing. Look whether the rows are"
            " attacks or mishaps."
        )
        found.add("special_tokens_in_text", "warning", len(rows), text, advice, tokens.places(rows))
        found[-1]["role"] = str(role)


def check_dialogues(found: Findings, tokens: Tokens, messages: Messages, tokenizer) -> None:
    """Find users' messages that hold both voices of a dialogue, which a row spelled out in one
    string."""
    both = np.ones(len(messages.role), bool)
    for voices in VOICES.values():
        pattern = re.compile(rf"\n[ \t]*(?:{voices})[ \t]*[:：]".encode(), re.IGNORECASE)
        heard = np.zeros(len(messages.role), bool)
        heard[messages.of_token[search_text(tokens, tokenizer, pattern)]] = True
        both &= heard
    rows = np.unique(messages.row[both & (messages.names[messages.role] == "user")])
    text = (
        f"in {len(rows):,} of {len(tokens):,} rows a user's message holds both voices of a dialogue"
    )
    advice = (
        "Split it into messages. A prompt that begins with 'Human:' or 'User:' is split without"
        " asking."
    )
    severity = "error" if len(rows) > LOST_SHARE * len(tokens) else "warning"
    found.add("flat_dialogues", severity, len(rows), text, advice, tokens.places(rows))


def check_boundaries(found: Findings, texts: Texts) -> None:
    """Find boundaries of documents that are spelled out in their text."""
    split = texts.boundaries.policy == "split"
    advice = (
        "Each is a document of its own now. --boundary_markers keep trains them as text."
        if split
        else (
            "Each is several tokens, no end and no word. --boundary_markers split cuts the rows"
            " there."
        )
    )
    severity = "info" if split else "warning"
    found.add(
        "boundary_markers", severity, len(texts.split), str(texts.boundaries), advice, texts.split
    )


def check_rendered(found: Findings, reading: Reading) -> None:
    """Find chats whose turns are spelled out in the words of a message, as a chat template writes
    them."""
    count, total = reading.counts["rendered"], len(reading.lengths)
    text = (
        f"in {count:,} of {total:,} rows the words hold turns that are rendered already, such as"
        f" {reading.marker!r}"
    )
    advice = (
        'They would be trained as plain text within a turn. Give each turn as {"role", "content"}'
        ' in "messages", without the markers; the chat template writes them.'
    )
    severity = "error" if count > RENDERED_SHARE * total else "warning"
    found.add("rendered_chats", severity, count, text, advice, reading.places.get("rendered", ()))


def check_copies(
    found: Findings, tokens: Tokens, held_out: Tokens | None, replies_per_row: int = 1
) -> None:
    """Find rows (of pairs: two rows at a time) that occur more than once, or are held out and
    trained on."""

    def keys(part: Tokens) -> list[tuple[int, ...]]:
        return list(
            zip(
                *(part.hashes[start::replies_per_row] for start in range(replies_per_row)),
                strict=True,
            )
        )

    first: dict[tuple[int, ...], int] = {}
    copies, where = [], tokens.where[::replies_per_row]
    for number, key in enumerate(keys(tokens)):
        # A row that a mixture takes several times is no copy.
        if where[first.setdefault(key, number)] != where[number]:
            copies.append((number, first[key]))
    places = (f"{where[number]} (as {where[original]})" for number, original in copies)
    text = (
        f"{len(copies):,} of {len(where):,} rows ({ratio(len(copies), len(where)):.1%}) are copies"
        " of an earlier one"
    )
    found.add(
        "duplicate_rows",
        "warning",
        len(copies),
        text,
        "Remove them, or they weigh more than others.",
        places,
    )
    if held_out is not None and len(held_out):
        both = [(number, first[key]) for number, key in enumerate(keys(held_out)) if key in first]
        held_where = held_out.where[::replies_per_row]
        places = (f"{held_where[number]} (as {where[original]})" for number, original in both)
        text = f"{len(both):,} of {len(held_where):,} held-out rows are trained on too"
        advice = "The held-out loss would flatter. Remove them from one side."
        found.add("held_out_rows_trained", "warning", len(both), text, advice, places)


def check_cuts(
    found: Findings, tokens: Tokens, lengths_before: np.ndarray, size: int = 1
) -> tuple[int, int]:
    """Find conversations of which a part was cut off; returns how many there are and how many
    tokens they lost.

    `lengths_before` (rows,) are the lengths of the conversations that the rows are made of, those
    of one conversation next to each other; of pairs (`size` 2) that of the longer side.
    """
    lengths = tokens.lengths.reshape(-1, size).max(1)
    before, where = lengths_before[::size], np.array(tokens.where[::size], object)
    first = np.flatnonzero(np.append(True, where[1:] != where[:-1]))
    lost = np.maximum(before[first] - np.add.reduceat(lengths, first), 0)
    cut = int((lost > 0).sum())
    text = (
        f"{cut:,} of {len(first):,} rows ({ratio(cut, len(first)):.1%}) were cut to --max_length,"
        f" and with that {lost.sum():,} tokens ({ratio(lost.sum(), before[first].sum()):.1%}) lost"
    )
    severity = "warning" if ratio(cut, len(first)) > CUT_SHARE else "info"
    found.add(
        "truncated_rows",
        severity,
        cut,
        text,
        "Raise --max_length if they matter.",
        where[first[lost > 0]],
    )
    return cut, int(lost.sum())


def check_left_out(found: Findings, reading: Reading, on_bad_rows: str | None) -> None:
    """Find rows that were read and are not trained on. `on_bad_rows` is the policy that a run
    has."""
    counts, total = reading.counts, sum(bad.total for bad in reading.bad)
    allowed = 0 if on_bad_rows == "error" else BAD_ROW_SHARE
    for bad in reading.bad:
        refused = bad.count > allowed * bad.total and on_bad_rows != "skip"
        for count, problem, places in bad.reasons.values():
            name, advice = next(
                (known[1:] for known in REASONS if known[0] in problem), ("bad_rows", "Mend them.")
            )
            named = f"in the first {problem}" if count > 1 else problem
            text = f"{count:,} of {bad.total:,} rows are left out: {named}"
            if refused:
                advice = f"{advice} A run would stop at them without --on_bad_rows skip."
            found.add(name, "error" if refused else "warning", count, text, advice, places)
    for columns in reading.columns:
        for name, count, text, advice, places in columns.findings():
            found.add("unread_columns", "error", count, text, advice, places)
            found[-1]["column"] = name
    long = counts["dropped"]
    reasons = [reason for bad in reading.too_long for reason in bad.reasons.values()]
    problem = next((problem for _, problem, _ in reasons), "")
    named = f"in the first {problem}" if long > 1 else problem
    text = f"{long:,} of {total:,} rows ({ratio(long, total):.1%}) are left out: {named}"
    advice = "Raise it, or shorten them."
    found.add("too_long_rows", "warning", long, text, advice, reading.places.get("dropped", ()))
    text = f"{counts['untrained']:,} of {total:,} rows have no reply to train and are left out"
    advice = "Their flags, weights or the options leave all of their replies out."
    places = reading.places.get("untrained", ())
    found.add("rows_without_trained_token", "warning", counts["untrained"], text, advice, places)
    text = (
        f"{counts['split']:,} of {total:,} rows are longer than --max_length and split into several"
    )
    found.add(
        "split_rows",
        "info",
        counts["split"],
        text,
        "Nothing to do.",
        reading.places.get("split", ()),
    )
    lost = sum(bad.count for bad in reading.bad) + counts["dropped"] + counts["untrained"]
    if lost > LOST_SHARE * total:
        text = f"{lost:,} of {total:,} rows ({ratio(lost, total):.1%}) are left out"
        advice = (
            f"More than {LOST_SHARE:.0%} are a mistake more often than not. Their reasons are"
            " findings of their own."
        )
        found.add("rows_lost", "error", lost, text, advice)


def check_pairs(found: Findings, tokens: Tokens) -> None:
    """Find pairs that teach nothing, the opposite of others, or length. Rows are chosen, rejected,
    chosen, ..."""
    pairs = list(zip(tokens.hashes[::2], tokens.hashes[1::2], strict=True))
    where = tokens.where[::2]
    same = [
        place for place, (chosen, rejected) in zip(where, pairs, strict=True) if chosen == rejected
    ]
    text = f"in {len(same):,} of {len(pairs):,} pairs chosen and rejected are the same tokens"
    advice = "They have no preference to learn. Remove them."
    found.add("identical_pairs", "warning", len(same), text, advice, same)
    known = set(pairs)
    opposite = [
        place for place, (a, b) in zip(where, pairs, strict=True) if a != b and (b, a) in known
    ]
    text = f"{len(opposite):,} pairs stand in the data the other way round too"
    found.add(
        "contradicting_pairs", "warning", len(opposite), text, "Keep one of each two.", opposite
    )
    trained = np.diff(tokens.trained_before[tokens.starts])
    chosen, rejected = trained[::2], trained[1::2]
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    share = max(longer, shorter) / max(longer + shorter, 1)
    if share > LONGER_SHARE and longer + shorter >= 20:
        text = (
            f"chosen is longer than rejected in {ratio(longer, len(chosen)):.0%} of the pairs and"
            f" shorter in {ratio(shorter, len(chosen)):.0%} (mean {chosen.mean():.0f} and"
            f" {rejected.mean():.0f} tokens)"
        )
        advice = (
            "Length alone tells them apart: the model may learn to be long or short. Compare its"
            " replies' lengths."
        )
        found.add("length_bias", "warning", max(longer, shorter), text, advice)
