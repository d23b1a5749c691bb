"""What became of the conversations and pairs that were read, for the report of an inspection."""

from collections import Counter
from collections.abc import Sequence

from minimind.data.bad_rows import BadRows
from minimind.data.chat_rows import Outcome
from minimind.data.columns import Columns
from minimind.data.markers import rendered_turn
from minimind.data.messages import Message


class Reading:
    """The facts of one reading.

    bad, columns   per source: its bad rows, and which columns were read
    too_long       per source: the rows too long for anything to fit
    lengths        the tokens of each conversation before any cut, dropped ones included
    counts         how many were truncated, split, dropped ... (see `Outcome`)
    places         where the first few of each count are, as "file:line"
    held_out       where the held-out rows are
    marker         the first marker of a chat template found in the words ("rendered" in `counts`)
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

    def add(self, where: str, outcome: Outcome, messages: Sequence[Message]) -> None:
        """Note what became of one conversation, or of a pair with all its `messages`."""
        self.lengths.append(outcome.length)
        marker = rendered_turn(message["content"] for message in messages)
        self.marker = self.marker or marker
        for name in [*outcome.counts, *(["rendered"] if marker else [])]:
            self.counts[name] += 1
            if self.counts[name] <= self.NAMED:
                self.places.setdefault(name, []).append(where)
