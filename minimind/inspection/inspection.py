"""An inspection: rows, what was read off them, and the report on them."""

from minimind.common.errors import UserError
from minimind.inspection.messages import Messages
from minimind.inspection.row_checks import LEFT_OUT
from minimind.inspection.tokens import Tokens

REPLIES = ("chosen", "rejected")  # the order of a pair's two rows


class Inspection:
    """Rows, what was read off them, and the report, a dict that fits into JSON (docs/inspect.md
    names its fields)."""

    def __init__(self, stage: str, tokens: Tokens, messages: Messages, report: dict):
        self.stage, self.tokens, self.messages, self.report = stage, tokens, messages, report

    def row(self, number: int) -> dict:
        """One row as {"where", "input_ids", "labels"}; of pairs also "reply", which of the two it
        is."""
        span = slice(self.tokens.starts[number], self.tokens.starts[number + 1])
        reply = {"reply": REPLIES[number % 2]} if self.stage == "dpo" else {}
        ids, labels = (values[span].tolist() for values in (self.tokens.ids, self.tokens.labels))
        return {"where": self.tokens.where[number], **reply, "input_ids": ids, "labels": labels}

    def find(self, where: str) -> list[int]:
        """The rows at a place, "file:line", or the end of one, ":12"; raises UserError if there are
        none."""
        places = self.tokens.where
        numbers = [number for number, place in enumerate(places) if place == where]
        numbers = numbers or [
            number for number, place in enumerate(places) if place.endswith(where)
        ]
        if not numbers:
            known = f"{places[0]} to {places[-1]}"
            raise UserError(
                f"--row {where}: found no such row among {known}. It may be left out: see the"
                " findings."
            )
        return numbers

    def title(self, number: int) -> str:
        """The place of a row, and which reply of a pair it is."""
        reply = f" ({REPLIES[number % 2]})" if self.stage == "dpo" else ""
        return self.tokens.where[number] + reply

    def errors(self) -> list[dict]:
        """The findings that stop a run."""
        return [finding for finding in self.report["findings"] if finding["severity"] == "error"]

    def stop(self, on_findings: str) -> None:
        """Raise UserError if there are errors and `on_findings` is "error"."""
        errors = self.errors()
        if on_findings != "error" or not errors:
            return
        if any(finding["name"] == "rows_lost" for finding in errors):  # and why they are
            errors += [
                finding
                for finding in self.report["findings"]
                if finding["name"] in LEFT_OUT and finding["severity"] != "error"
            ]
        lines = "".join(
            f"\n  {finding['name']}: {finding['text']}. {finding['advice']}"
            + "".join(f"\n    {place}" for place in finding["places"])
            for finding in errors
        )
        raise UserError(
            f"the inspection of the data found errors:{lines}\nTo train it still: --on_findings"
            " warn."
        )
