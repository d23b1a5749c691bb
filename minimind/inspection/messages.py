"""The messages and replies of rows of tokens, read off the ids without the chat template."""

import re
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerFast

from minimind.inspection.tokens import Tokens, ratio
from minimind.tokenizer import BOS_TOKEN, text_bytes

HEADER = 12  # tokens at the start of a message among which its role must be
ROLE = re.compile(rb"[A-Za-z_]+")
OTHER = "other"  # the role of a message that does not show its own
NO_TEXT = b"\xff"  # in the place of a special token among bytes of text; UTF-8 has no such byte


class Messages:
    """The messages of some rows; arrays of shape (messages,).

    `start` and `end` (exclusive) are positions in the flat arrays, `content` is the first position
    after the header, `stop` that of the end token (-1: there is none), `row` the row, `role` an
    index into `names`, `roles` the role's name, `reply` whether the assistant speaks.

    In ChatML the ids show the role; a user's message that begins with <tool_response> is the
    tool's. For another template the loader's roles are used. Without them every role is "other",
    and each run of trained tokens counts as a reply, so that at least its end can be judged.
    """

    def __init__(self, tokens: Tokens, tokenizer: PreTrainedTokenizerFast):
        ids = tokens.ids

        # Where messages begin, whose they are, and how long their headers are.
        opens = np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(BOS_TOKEN))
        row_starts = tokens.starts[:-1][tokens.lengths > 0]
        self.start = np.union1d(row_starts, opens)
        roles, header = _read_headers(ids, self.start, tokenizer)
        self.is_chatml = 2 * int((roles != OTHER).sum()) > len(opens)
        if not self.is_chatml:
            key = tokens.trained if tokens.roles is None else tokens.roles
            self.start = np.union1d(row_starts, np.flatnonzero(key[1:] != key[:-1]) + 1)
            header = np.zeros(len(self.start), np.int64)
            roles = np.full(len(self.start), OTHER, object)
            if tokens.roles is not None:
                roles = np.array(tokens.role_names, object)[tokens.roles[self.start]]
        self.end = np.append(self.start[1:], len(ids))
        self.row = tokens.row_of(self.start)
        self.roles = roles.astype(str)
        self.names, self.role = np.unique(self.roles, return_inverse=True)
        self.reply = self.roles == "assistant"
        if not self.is_chatml and tokens.roles is None:
            self.reply = tokens.trained[self.start]

        # Where their words begin: without a readable header at the first trained token.
        self.content = self.start + header
        if not self.is_chatml:
            trained = np.append(np.flatnonzero(tokens.trained), len(ids))
            first = trained[np.searchsorted(trained, self.start)]
            self.content = np.where(first < self.end, first, self.start)

        # Where they end.
        ends = np.append(np.flatnonzero(ids == tokenizer.eos_token_id), len(ids))
        following = ends[np.searchsorted(ends, self.content)]
        self.stop = np.where(following < self.end, following, -1)

    def __len__(self) -> int:
        return len(self.start)

    @cached_property
    def of_token(self) -> np.ndarray:
        """The message of each token: shape (tokens,)."""
        return np.repeat(np.arange(len(self)), self.end - self.start)


def _read_headers(
    ids: np.ndarray, start: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """The roles of the messages that begin at `start` ("other" without a readable header), and the
    numbers of tokens of their headers."""
    pieces = text_bytes(tokenizer)
    end = np.append(start[1:], len(ids))

    # The first tokens of each message up to its first line end, -1 behind.
    window = start[:, None] + np.arange(HEADER)
    is_inside = window < end[:, None]
    header = np.where(is_inside, ids[np.minimum(window, len(ids) - 1)], -1)
    ends_line = np.array([b"\n" in piece for piece in pieces])[header] & is_inside
    last = ends_line.argmax(1)
    header[(np.arange(HEADER) > last[:, None]) | ~ends_line.any(1)[:, None]] = -1

    # The few different ones, read once each.
    different, which = np.unique(header, axis=0, return_inverse=True)
    start_id, names = tokenizer.convert_tokens_to_ids(BOS_TOKEN), []
    for row in different.tolist():
        first, *others = [token for token in row if token >= 0] or [-1]
        text = b"".join(pieces[token] or NO_TEXT for token in others).split(b"\n")[0]
        names.append(text.decode() if first == start_id and ROLE.fullmatch(text) else OTHER)
    roles = np.array(names, object)[which.reshape(-1)]
    size = np.where(roles == OTHER, 0, last + 1)

    # A template may have no header for tools, and show their answers as the user's words in a tag.
    mark = b"<tool_response>"
    texts = [
        piece or tokenizer.convert_ids_to_tokens(token).encode()
        for token, piece in enumerate(pieces)
    ]
    begins = np.array([mark.startswith(text) or text.startswith(mark) for text in texts])
    first = ids[np.minimum(start + size, len(ids) - 1)]
    for message in np.flatnonzero((roles == "user") & begins[first]):
        words = ids[start[message] + size[message] : end[message]][: len(mark)]
        if b"".join(texts[token] for token in words).startswith(mark):
            roles[message] = "tool"
    return roles, size


class Replies:
    """What is trained of each reply; arrays of shape (replies,).

    `trained` and `words` count tokens; the end token is no word. The others are true where:
    `ended`: there is an end token; `end_trained`: it has a label; `complete`: every token from the
    first word to the end has one; `border`: a token has one that only the template writes, of the
    header or after the end.
    """

    def __init__(self, tokens: Tokens, messages: Messages):
        trained_before, reply = tokens.trained_before, messages.reply
        start, content = messages.start[reply], messages.content[reply]
        end, stop = messages.end[reply], messages.stop[reply]
        self.ended = stop >= 0
        last = np.where(self.ended, stop, end - 1)
        before_words, after_end = trained_before[content], trained_before[last + 1]
        self.row = messages.row[reply]
        self.words = np.maximum(last - content + ~self.ended, 0)
        self.trained = trained_before[end] - trained_before[start]
        self.end_trained = self.ended & tokens.trained[stop]
        self.complete = after_end - before_words == last + 1 - content
        self.border = (before_words > trained_before[start]) | (trained_before[end] > after_end)


def count_roles(tokens: Tokens, messages: Messages) -> dict[str, dict]:
    """Role -> the number of tokens of its messages (header and end token included), and of those
    with a label."""
    role, size = messages.role[messages.of_token], len(messages.names)
    totals = np.bincount(role, minlength=size).tolist()
    trained = np.bincount(role[tokens.trained], minlength=size).tolist()
    return {
        str(name): {
            "tokens": total,
            "trained": part,
            "trained_tokens": part,  # the name it has always had in mask_report.json
            "trained_share": ratio(part, total),
        }
        for name, total, part in zip(messages.names, totals, trained, strict=True)
    }
