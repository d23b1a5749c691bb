"""Rows that cannot be used: when they stop a run, and how messages describe them."""

import json
import logging
import re
from typing import Any

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated

logger = logging.getLogger(__name__)

BAD_ROW_SHARE = 0.001  # without a policy, more bad rows than this are an error
BAD_ROWS_NAMED = 5
REASONS = 100  # kinds of problems that are counted separately
# The parts of a problem that differ from row to row
PARTICULARS = re.compile(r"\d[\d,]*|'[^']*'|\"[^\"]*\"|[\[{].*?[\]}]")


class BadRows:
    """The bad rows of one reading and the policy for them: "error", "skip" or None.

    "error" refuses the first bad row; "skip" leaves out all; None leaves them out as long as they
    are at most 0.1 % of the rows.
    """

    def __init__(self, policy: str | None = None):
        if policy not in (None, "error", "skip"):
            raise UserError(
                f"on_bad_rows: found {policy!r}, expected error, skip or nothing (skip at most"
                " 0.1 %)"
            )
        self.policy = policy
        self.count = self.total = 0  # `total` counts good rows too, and is known at the end
        self.first: list[tuple[str, str]] = []  # places and problems
        # A problem without its particulars -> its count, its first full text and its first places
        self.reasons: dict[str, tuple[int, str, list[str]]] = {}

    def add(self, where: str, problem: str) -> None:
        """Count one bad row; raises UserError at once if the policy is "error"."""
        self.count += 1
        if len(self.first) < BAD_ROWS_NAMED:
            self.first.append((where, problem))
        reason = PARTICULARS.sub("…", problem)
        if reason in self.reasons or len(self.reasons) < REASONS:
            count, example, places = self.reasons.get(reason, (0, problem, []))
            self.reasons[reason] = count + 1, example, [*places, where][:BAD_ROWS_NAMED]
        if self.policy == "error":
            raise UserError(f"{self}\nFix the row, or leave out bad rows with --on_bad_rows skip.")

    def finish(self, total: int) -> None:
        """Log how many of `total` rows were skipped; raises UserError if they were too many."""
        self.total = total
        if self.count and self.count == total:
            raise UserError(
                f"{self}\nNo usable row is left of {total:,}. Check the format of the files."
            )
        if self.policy is None and self.count > BAD_ROW_SHARE * total:
            raise UserError(
                f"{self}\n{self.count:,} of {total:,} rows are bad, and without --on_bad_rows at"
                f" most {BAD_ROW_SHARE:.1%} are left out. Fix them, or leave them out with"
                " --on_bad_rows skip."
            )
        self.warn(total)

    def warn(self, total: int) -> None:
        """Log one warning with the number of rows that were skipped, if any."""
        if self.count:
            logger.warning("%s", translated(f"skipped {self.count:,} of {total:,} rows: {self}"))

    def __str__(self) -> str:
        (where, problem), *others = self.first
        if not others:
            return f"{where}: {problem}"
        places = ", ".join(place for place, _ in others)
        ellipsis = ", ..." if self.count > len(self.first) else ""
        return f"{where}: {problem} (and {self.count - 1:,} more: {places}{ellipsis})"


def check_text(text: str, name: str) -> None:
    """Raise BadRowError for a text with a NUL character, which comes from binary data."""
    if (position := text.find("\0")) >= 0:
        raise BadRowError(f"{name}: found a NUL character at offset {position}, expected text")


def shown(value: Any, limit: int = 60) -> str:
    """The start of a value's JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[:limit] + "..."


def decoded(raw: bytes) -> str:
    """The text of UTF-8 bytes; raises BadRowError with the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"found byte 0x{raw[error.start]:02x} at byte offset {error.start}, expected UTF-8 text"
            " (a Chinese file from Windows: iconv -f gb18030 -t utf-8)"
        ) from None
