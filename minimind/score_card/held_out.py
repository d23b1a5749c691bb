"""Held-out files: the loss of conversations or documents, and exact answers."""

from collections.abc import Mapping, Sequence

import numpy as np

from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.data.columns import Columns
from minimind.data.sources import expand
from minimind.evaluation.files import evaluate
from minimind.evaluation.scoring import ModelSubject
from minimind.inspection import data_paths, recognise_stage
from minimind.score_card.tasks import Result
from minimind.score_card.training_text import read_texts


class HeldOutTask:
    """`evaluation.evaluate` of files; its fields are entries of the card itself.

    Raises:
        UserError: the files hold neither conversations nor documents, or cannot be read.
    """

    name = "held_out"

    def __init__(
        self,
        files: Sequence[str],
        stage: str | None = None,
        on_bad_rows: str | None = None,
        columns: Columns | None = None,
        **options,
    ):
        self.options = {"stage": stage, "on_bad_rows": on_bad_rows, **options}
        self._files, self._columns = files, columns
        self.content = content_hash(expand(data_paths(files)))
        if (stage or recognise_stage(files, columns)) == "dpo":
            raise UserError(
                f"{files[0]}: found preference pairs, expected conversations or documents."
            )

    def run(self, subject: ModelSubject) -> Result:
        """See `Task`."""
        model, tokenizer = subject.model, subject.tokenizer
        fields = evaluate(model, tokenizer, self._files, columns=self._columns, **self.options)
        return Result({}, {}, fields)

    def texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {row.where: [row.data] for row in read_texts(expand(self._files), "held-out files")}

    def shuffled(self, generator: np.random.Generator) -> None:
        """See `Task`."""
