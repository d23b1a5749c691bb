"""Rows that cannot be used: the policy for them, and how their values are shown."""

import json
import logging
import re
from typing import Any

from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated

logger = logging.getLogger(__name__)

BAD_ROW_SHARE = 0.001  # without a policy, more bad rows than this are an error
BAD_ROWS_NAMED = 5
REASONS = 100  # different ones told apart
PARTICULARS = re.compile(r"\d[\d,]*|'[^']*'|\"[^\"]*\"|[\[{].*?[\]}]")


class BadRows:
    """The bad rows of one reading and the policy for them, one of `"error"`, `"skip"` and None.

    "error" refuses the first; "skip" leaves out all; None leaves them out while they are at most
    0.1 % of the rows.
    """

    def __init__(self, policy: str | None = None):
        if policy not in (None, "error", "skip"):
            raise UserError(
                f"on_bad_rows: found {policy!r}, expected error, skip or nothing (skip at most"
                " 0.1 %)"
            )
        self.policy = policy
        self.count = self.total = 0  # `total` rows, the good ones included, once they are read
        # A problem without its particulars -> how often, the first time with particulars, and the
        # first places.
        self.reasons: dict[str, tuple[int, str, list[str]]] = {}
        self.first: list[tuple[str, str]] = []

    def add(self, where: str, problem: str) -> None:
        """Count one bad row; raises UserError at once if the policy is "error"."""
        self.count += 1
        if len(self.first) < BAD_ROWS_NAMED:
            self.first.append((where, problem))
        reason = PARTICULARS.sub("…", problem)
        count, first, places = self.reasons.get(reason, (0, problem, []))
        if count or len(self.reasons) < REASONS:
            self.reasons[reason] = (
                count + 1,
                first,
                [*places, where] if count < BAD_ROWS_NAMED else places,
            )
        if self.policy == "error":
            raise UserError(f"{self}\nMend the row, or leave out bad rows with --on_bad_rows skip.")

    def finish(self, total: int) -> None:
        """Judge the bad rows among `total`: one warning where they may be skipped, UserError where
        not."""
        self.total = total
        if self.count and self.count == total:
            raise UserError(
                f"{self}\nNo usable row is left of {total:,}. Check the format of the files."
            )
        if self.policy is None and self.count > BAD_ROW_SHARE * total:
            raise UserError(
                f"{self}\n{self.count:,} of {total:,} rows are bad, and without --on_bad_rows at"
                f" most {BAD_ROW_SHARE:.1%} are left out. Mend them, or leave them out with"
                " --on_bad_rows skip."
            )
        self.warn(total)

    def warn(self, total: int) -> None:
        """Say in one warning how many of `total` rows were skipped; nothing if none was."""
        if self.count:
            logger.warning("%s", translated(f"skipped {self.count:,} of {total:,} rows: {self}"))

    def __str__(self) -> str:
        (where, problem), *others = self.first
        if not others:
            return f"{where}: {problem}"
        ellipsis = ", ..." if self.count > len(self.first) else ""
        return (
            f"{where}: {problem} (and {self.count - 1:,} more:"
            f" {', '.join(w for w, _ in others)}{ellipsis})"
        )


def check_text(text: str, name: str) -> None:
    """Refuse (BadRowError) a text that holds a NUL: it is binary data, or was cut out of it."""
    if (position := text.find("\0")) >= 0:
        raise BadRowError(f"{name}: found a NUL character at offset {position}, expected text")


def shown(value: Any, limit: int = 60) -> str:
    """A value -> the start of its JSON, for messages."""
    text = (
        json.dumps(value, ensure_ascii=False, default=str)
        .encode("utf-8", "backslashreplace")
        .decode("utf-8")
    )
    return text if len(text) <= limit else text[:limit] + "..."


def decoded(raw: bytes) -> str:
    """UTF-8 bytes -> text; raises BadRowError naming the first byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"found byte 0x{raw[error.start]:02x} at byte offset {error.start}, expected UTF-8 text"
            " (a Chinese file from Windows: iconv -f gb18030 -t utf-8)"
        ) from None
