"""Held-out documents: the log-probability of each of their tokens, and bits per byte."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.files import read_rows, to_document
from minimind.data.markers import Boundaries
from minimind.evaluation.losses import RowLoss
from minimind.evaluation.scoring import Request, Subject
from minimind.tokenizer.encoding import DocumentEncoder
from minimind.tokenizer_evaluation.texts import script


class HeldOutText(NamedTuple):
    """A document; its key is its place, "file:line"."""

    key: str
    text: str
    source: str
    language: str

    @property
    def bytes(self) -> int:
        """Its length in UTF-8."""
        return len(self.text.encode("utf-8", "surrogatepass"))


class Losses(NamedTuple):
    """-log p in nats of the tokens of a document (tokens,), and of the end token after it."""

    tokens: np.ndarray
    end: float


def read_held_out_texts(
    files: Sequence[str],
    on_bad_rows: str | BadRows | None = None,
    columns: Columns | None = None,
    check: Callable[[str], None] | None = None,
) -> list[HeldOutText]:
    """The documents of files, each with the row's `source`, else the name of its file, and the
    row's `language` or `lang`, else that of its script; see `read_documents`.

    Raises:
        UserError: see `read_rows` and `Columns.stop`.
    """
    columns, split, texts = columns or Columns(), Boundaries().split, []

    def convert(row: Mapping) -> tuple[list[str], dict]:
        documents = split(to_document(row))
        for document in documents if check else ():
            check(document)
        facts = {"source": row.get("source"), "language": row.get("language") or row.get("lang")}
        return documents, {name: each for name, each in facts.items() if isinstance(each, str)}

    for where, (documents, facts) in read_rows(files, on_bad_rows, convert, columns=columns):
        source = facts.get("source") or Path(where.rpartition(":")[0]).name
        for number, text in enumerate(documents):
            key = f"{where}:{number}" if number else where
            language = facts.get("language") or script(text).language
            texts.append(HeldOutText(key, text, source, language))
    columns.stop()
    return texts


def text_losses(
    subject: Subject, texts: Sequence[HeldOutText], max_length: int | None = None
) -> list[Losses]:
    """The losses of documents, each of which follows an end token.

    A document of more than `max_length` tokens, or the model's positions if that is less, is
    predicted in windows, see `windows`.

    Raises:
        UserError: a document cannot be encoded.
    """
    length = min(max_length or subject.max_length, subject.max_length)
    encode, end = DocumentEncoder(subject.tokenizer, fast=False), subject.tokenizer.eos_token_id
    requests, counts = [], []
    for text in texts:
        try:
            ids = encode([text.text]).tolist()[:-1]
        except BadRowError as problem:
            raise UserError(f"{text.key}: {problem}.") from problem
        own = list(windows(ids, end, length))
        requests += own
        requests.append(Request(tuple([end, *ids][-length:]), (end,)))
        counts.append(len(own))
    scores: Iterator[np.ndarray] = iter(subject.log_probabilities(requests, "texts"))
    return [
        Losses(-np.concatenate([next(scores) for _ in range(count)]), -next(scores)[0])
        for count in counts
    ]


def windows(ids: Sequence[int], first: int, length: int) -> Iterator[Request]:
    """Requests that predict each of the ids once, the first of them after the token `first`.

    With length 4:

        context  predicted            0 is `first`
        0        1 2 3 4
        4        5 6 7 8
        6 7 8    9 10                 the last window has as many tokens before it as fit

    The rolling windows of lm-evaluation-harness (`get_rolling_token_windows`, context_len=1).
    """
    ids = [first, *ids]
    for start in range(1, len(ids), length):
        end = min(start + length, len(ids))
        yield Request(tuple(ids[max(0, end - 1 - length) : start]), tuple(ids[start:end]))


def losses_of(
    texts: Sequence[HeldOutText], losses: Sequence[Losses], with_ends: bool = False
) -> list[RowLoss]:
    """The loss of each document; `with_ends`, with its end token, as pretraining computes it."""
    return [
        RowLoss(each.tokens.sum() + with_ends * each.end, len(each.tokens) + with_ends, text.bytes)
        for text, each in zip(texts, losses, strict=True)
    ]
