"""What became of the conversations and pairs that were read, for the report of an inspection."""

from collections import Counter
from collections.abc import Callable, Sequence

from minimind.data.bad_rows import BadRows
from minimind.data.chat_rows import Outcome
from minimind.data.columns import Columns
from minimind.data.markers import rendered_turn
from minimind.data.messages import Message


class Reading:
    """The facts of one reading.

    bad, columns   per source: its bad rows, and which columns were read
    too_long       per source: the rows of which nothing could be used, because of a limit
    lengths        the tokens of each row before any cut (see `Outcome`), dropped ones included
    counts         how many were truncated, split, dropped ... (see `Outcome`)
    places         where the first few of each count are, as "file:line"
    held_out       where the held-out rows are
    marker         the first marker of a chat template found in the words ("rendered" in `counts`)
    """

    NAMED = 5
    COLUMNS = ("total", "renamed_rows", "counts", "places", "names")  # what was counted of them

    def __init__(self):
        self.bad: list[BadRows] = []
        self.columns: list[Columns] = []
        self.too_long: list[BadRows] = []
        self.lengths: list[list[int]] = []
        self.counts = Counter()
        self.places: dict[str, list[str]] = {}
        self.held_out: list[str] = []
        self.marker: str | None = None

    def add(self, where: str, outcome: Outcome, messages: Sequence[Message]) -> None:
        """Note what became of one conversation, or of a pair with all its `messages`."""
        self.lengths.append(outcome.lengths)
        marker = rendered_turn(message["content"] for message in messages)
        self.marker = self.marker or marker
        for name in [*outcome.counts, *(["rendered"] if marker else [])]:
            self.counts[name] += 1
            if self.counts[name] <= self.NAMED:
                self.places.setdefault(name, []).append(where)

    def state(self) -> dict:
        """All of it as JSON values, for `restored`."""
        return {
            **vars(self),
            "bad": [vars(each) for each in self.bad],
            "columns": [
                {name: getattr(each, name) for name in self.COLUMNS} for each in self.columns
            ],
            "too_long": [vars(each) for each in self.too_long],
        }

    @classmethod
    def restored(cls, state: dict, new_columns: Callable[[], Columns]) -> "Reading":
        """The reading of a `state` that may have become JSON."""
        reading = cls()
        vars(reading).update(
            state, counts=Counter(state["counts"]), bad=[], columns=[], too_long=[]
        )
        for name in ("bad", "too_long"):
            for values in state[name]:
                rows = BadRows(values["policy"])
                first = [tuple(each) for each in values["first"]]
                reasons = {reason: tuple(each) for reason, each in values["reasons"].items()}
                vars(rows).update(values, first=first, reasons=reasons)
                getattr(reading, name).append(rows)
        for values in state["columns"]:
            reading.columns.append(new_columns())
            vars(reading.columns[-1]).update(values)
        return reading

    def warn(self) -> None:
        """Log the warnings about rows that were left out."""
        for bad, too_long in zip(self.bad, self.too_long, strict=True):
            bad.warn(bad.total)
            too_long.warn(bad.total)
