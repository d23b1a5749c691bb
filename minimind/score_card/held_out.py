"""Held-out files: bits per byte of documents by source and language; the loss of conversations and
exact answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.sources import expand
from minimind.evaluation.files import evaluate
from minimind.evaluation.scoring import ModelSubject, Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.evaluation.texts import (
    HeldOutText,
    metrics_with_ends,
    read_held_out_texts,
    text_losses,
    text_metrics,
)
from minimind.inspection import data_paths, recognise_stage
from minimind.score_card.tasks import Result, Task
from minimind.score_card.training_text import read_texts


def held_out_task(
    files: Sequence[str],
    stage: str | None = None,
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
    **options: Any,
) -> Task:
    """The task for files of documents or conversations; `options` are those of `evaluate`.

    Raises:
        UserError: the files hold neither of them, or cannot be read.
    """
    stage = stage or recognise_stage(files, columns)
    if stage == "dpo":
        raise UserError(f"{files[0]}: found preference pairs, expected conversations or documents.")
    if stage == "sft":
        return ChatsTask(files, on_bad_rows, columns, **options)
    bad_rows = BadRows(on_bad_rows)
    texts = read_held_out_texts(files, bad_rows, columns)
    return TextsTask(texts, options["max_length"], bad_rows.count)


class TextsTask:
    """Bits per byte and perplexity of documents, each after an end token: of `all`, and by source
    and language. `entries` has those with the end tokens, as pretraining computes its loss."""

    name = "texts"

    def __init__(self, texts: Sequence[HeldOutText], max_length: int, bad_rows: int = 0):
        self.texts, self.max_length, self.bad_rows = list(texts), max_length, bad_rows

    def run(self, subject: Subject) -> Result:
        """See `Task`."""
        losses = text_losses(subject, self.texts, self.max_length)
        nats = [each.tokens.sum() for each in losses]
        groups: dict[tuple[str, str], list[int]] = {("all", ""): list(range(len(nats)))}
        for kind in ("languages", "sources"):
            for index, text in enumerate(self.texts):
                name = text.language if kind == "languages" else text.source
                groups.setdefault((kind, name), []).append(index)

        measures, section = {}, {"all": {}, "languages": {}, "sources": {}}
        for (kind, name), members in groups.items():
            texts = [self.texts[index] for index in members]
            sizes = {text.key: text.bytes for text in texts}
            values = {
                text.key: nats[index] / (math.log(2) * text.bytes)
                for index, text in zip(members, texts, strict=True)
            }
            measure = Measure(values, weights=sizes, higher_is_better=False)
            tokens = sum(len(losses[index].tokens) for index in members)
            found = {
                "documents": len(texts),
                "bytes": sum(sizes.values()),
                **text_metrics(sum(nats[index] for index in members), tokens, sum(sizes.values())),
                "bits_per_byte_interval": estimate(measure)["interval"],
            }
            section[kind] |= {name: found} if name else found
            if not name or len(members) < len(nats):  # a group of everything says nothing new
                measures["/".join(filter(None, ("texts", kind, name, "bits_per_byte")))] = measure
        fields = metrics_with_ends(self.texts, losses)
        return Result(measures, section, {**fields, "bad_rows": self.bad_rows})

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {each.key: [each.text] for each in self.texts}

    def shuffled(self, generator: np.random.Generator) -> None:
        """See `Task`: documents have no labels."""


class ChatsTask:
    """The loss of conversations and their exact answers: `evaluate`, whose fields are `entries` of
    the card."""

    name = "chats"

    def __init__(
        self,
        files: Sequence[str],
        on_bad_rows: str | None = None,
        columns: Columns | None = None,
        **options: Any,
    ):
        self.options = {"on_bad_rows": on_bad_rows, **options}
        self.needs_chat = options["max_new_tokens"] > 0
        self.content = content_hash(expand(data_paths(files)))
        self._files, self._columns = files, columns

    def run(self, subject: ModelSubject) -> Result:
        """See `Task`."""
        options = {"stage": "sft", "columns": self._columns, **self.options}
        return Result({}, {}, evaluate(subject.model, subject.tokenizer, self._files, **options))

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        rows = read_texts(expand(data_paths(self._files)), "conversations")
        return {row.where: [row.data] for row in rows}
