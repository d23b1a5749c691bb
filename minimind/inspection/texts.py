"""The documents in some files, read once more for what only their text shows."""

from collections.abc import Sequence

import xxhash
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import BadRows
from minimind.data.columns import Columns
from minimind.data.files import read_rows, to_document
from minimind.data.markers import Boundaries


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The strings of the tokens that are structure and no text, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


class DocumentTexts:
    """What the texts of some files show: size, copies, spelled out boundaries and special tokens.

    `first` maps the hash of a document to the place of its first copy; `copies` are pairs of a
    place and that of the first copy; `split` and `marked` are the places with boundary markers and
    with special tokens.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: PreTrainedTokenizerFast,
        markers: str = "split",
        columns: Columns | None = None,
    ):
        self.bad, self.boundaries = BadRows("skip"), Boundaries(markers)
        self.columns = columns or Columns()
        self.count = self.bytes = 0
        self.first: dict[int, str] = {}
        self.copies, self.marked, self.split = [], [], []
        names = special_tokens(tokenizer)
        for row in read_rows(paths, self.bad, to_document, columns=self.columns):
            before = self.boundaries.rows.total()
            try:
                documents = self.boundaries.split(row.data)
            except BadRowError as problem:
                self.bad.add(row.where, str(problem))
                continue
            if self.boundaries.rows.total() > before:
                self.split.append(row.where)
            for document in documents:
                self._add(document, row.where)
                if any(name in document for name in names):
                    self.marked.append(row.where)

    def _add(self, document: str, where: str) -> None:
        raw = document.encode()
        self.count += 1
        self.bytes += len(raw)
        if (original := self.first.setdefault(xxhash.xxh3_128_intdigest(raw), where)) != where:
            self.copies.append((where, original))
