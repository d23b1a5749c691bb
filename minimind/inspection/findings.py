"""Findings: what is worth reporting about the rows of a run; docs/inspect.md lists them all.

error     a run with these options would learn something wrong, or would stop
warning   it would run, and be worse for it
info      good to know
"""

from collections.abc import Iterable
from itertools import islice

from minimind.common.severities import COLOURS

ORDER = list(COLOURS)  # of severities, the worst first
PLACES = 5  # listed in one finding


class Findings(list):
    """Findings, each {"name", "severity", "count", "text", "advice", "places"}."""

    def add(
        self,
        name: str,
        severity: str,
        count: int,
        text: str,
        advice: str,
        places: Iterable[str] = (),
    ) -> None:
        """Append a finding with the first few of its places, unless `count` is 0."""
        if count:
            finding = {"name": name, "severity": severity, "count": int(count), "text": text}
            self.append({**finding, "advice": advice, "places": list(islice(places, PLACES))})

    def in_order(self) -> list[dict]:
        """The worst first, otherwise in the order of the checks."""
        return sorted(self, key=lambda finding: ORDER.index(finding["severity"]))
