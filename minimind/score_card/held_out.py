"""Held-out files: bits per byte of documents by source and language; the loss of conversations and
exact answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.data.bad_rows import BadRows
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.columns import Columns
from minimind.data.sources import expand
from minimind.evaluation.answers import answer_metrics, answer_questions, read_question_rows
from minimind.evaluation.files import conversation_losses, conversation_metrics
from minimind.evaluation.losses import RowLoss, loss_metrics
from minimind.evaluation.scoring import ModelSubject, Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.evaluation.texts import (
    HeldOutText,
    losses_of,
    read_held_out_texts,
    text_losses,
)
from minimind.inspection import data_paths, recognise_stage
from minimind.score_card.tasks import Task, TaskResult
from minimind.score_card.training_text import read_row_texts


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

    def run(self, subject: Subject) -> TaskResult:
        """See `Task`."""
        losses = text_losses(subject, self.texts, self.max_length)
        found = losses_of(self.texts, losses)
        groups: dict[tuple[str, str], list[int]] = {("all", ""): list(range(len(found)))}
        for kind in ("languages", "sources"):
            for index, text in enumerate(self.texts):
                name = text.language if kind == "languages" else text.source
                groups.setdefault((kind, name), []).append(index)

        measures, section = {}, {"all": {}, "languages": {}, "sources": {}}
        for (kind, name), members in groups.items():
            measure = bits_measure({self.texts[index].key: found[index] for index in members})
            fields = {
                "documents": len(members),
                "bytes": sum(found[index].bytes for index in members),
                **loss_metrics([found[index] for index in members]),
                "bits_per_byte_interval": [round(end, 6) for end in estimate(measure)["interval"]],
            }
            section[kind] |= {name: fields} if name else fields
            if not name or len(members) < len(found):  # a group of everything says nothing new
                measures["/".join(filter(None, ("texts", kind, name, "bits_per_byte")))] = measure
        metrics = loss_metrics(losses_of(self.texts, losses, with_ends=True))
        entries = {"documents": len(found), **metrics, "bad_rows": self.bad_rows}
        return TaskResult(measures, section, entries)

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {each.key: [each.text] for each in self.texts}

    def shuffled(self, generator: np.random.Generator) -> None:
        """See `Task`: documents have no labels."""


def bits_measure(losses: Mapping[str, RowLoss]) -> Measure:
    """Bits per byte of items, weighted by their bytes."""
    values = {key: each.nats / (math.log(2) * each.bytes) for key, each in losses.items()}
    sizes = {key: each.bytes for key, each in losses.items()}
    return Measure(values, weights=sizes, higher_is_better=False)


class ChatsTask:
    """The loss of the replies of conversations, and how many of the last ones the model gives word
    for word. `entries` are the fields of `evaluate`."""

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
        self._files, self._columns = files, columns or Columns()

    def run(self, subject: ModelSubject) -> TaskResult:
        """See `Task`."""
        model, tokenizer = subject.model, subject.tokenizer
        bad_rows = BadRows(self.options["on_bad_rows"])
        encoder = ChatEncoder(tokenizer)
        rows = read_question_rows(self._files, bad_rows, encoder, self._columns)
        self._columns.stop()
        keys, questions = [row.where for row in rows], [row.data for row in rows]
        size = self.options["batch_size"]

        measures, fields = {}, {}
        if new_tokens := self.options["max_new_tokens"]:
            answers = answer_questions(model, tokenizer, questions, new_tokens, size)
            fields = answer_metrics(questions, answers)
            exact = {key: float(each.exact) for key, each in zip(keys, answers, strict=True)}
            measures["chats/exact_match"] = Measure(exact)
        length = self.options["max_length"]
        losses = conversation_losses(model, tokenizer, questions, length, size)
        found = zip(keys, losses, strict=True)
        with_bytes = {key: each for key, each in found if each and each.bytes}
        if with_bytes:
            measures["chats/bits_per_byte"] = bits_measure(with_bytes)
        fields |= {**conversation_metrics(losses), "bad_rows": bad_rows.count}
        return TaskResult(measures, {}, fields)

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        rows = read_row_texts(expand(data_paths(self._files)), "conversations")
        return {row.where: [row.data] for row in rows}
