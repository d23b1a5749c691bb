"""What became of the conversations that were read."""

from collections import Counter
from collections.abc import Sequence

from minimind.data.chat_rows import Tokenized
from minimind.data.columns import Columns
from minimind.data.files import BadRows
from minimind.data.markers import rendered_turn
from minimind.data.messages import Message


class Reading:
    """What became of the conversations that were read for training, for the report of an
    inspection.

    `bad` are the bad rows of each source, `columns` what was read of its rows, and `too_long` those
    of which nothing fits; `lengths` the tokens of every conversation before any cut, also of one
    that is dropped; `counts` and `places` what became of how many, and where the first of them
    stand; `held_out` where the held-out rows do; `marker` the first of those that a chat template
    writes and that stand in the words ("rendered" in `counts`).
    """

    NAMED = 5

    def __init__(self):
        self.bad: list[BadRows] = []
        self.columns: list[Columns] = []
        self.too_long: list[BadRows] = []
        self.lengths: list[int] = []
        self.counts = Counter()
        self.places: dict[str, list[str]] = {}
        self.held_out: list[str] = []
        self.marker: str | None = None

    def add(self, where: str, result: "Tokenized", messages: Sequence[Message] = ()) -> None:
        """Note one conversation, or pair with all its `messages`."""
        self.lengths.append(result.length)
        marker = rendered_turn(message["content"] for message in messages)
        self.marker = self.marker or marker
        for name in [*result.counts, *(["rendered"] if marker else [])]:
            self.counts[name] += 1
            if self.counts[name] <= self.NAMED:
                self.places.setdefault(name, []).append(where)
