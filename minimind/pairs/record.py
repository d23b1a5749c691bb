"""The record beside a file of pairs, OUT.samples: what was sampled and chosen so far."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from minimind.common.errors import UserError
from minimind.common.files import append_json, json_lines, write_text
from minimind.common.streams import json_text
from minimind.evaluation.replies import Replies, Sampling
from minimind.generation import Reply
from minimind.stage_directory import provenance


def replies_depend_on(
    directory: str, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> dict[str, Any]:
    """What decides the replies of a stage directory to prompts of token ids, as a record has it."""
    weights, origin = [], provenance(Path(directory))
    while origin:
        weights.append(origin["weights"])
        origin = origin.get("base")
    digest = xxhash.xxh3_128_hexdigest(json.dumps(list(map(list, prompts))).encode())
    return {"model": weights, "prompts": digest, **sampling._asdict()}


class Record:
    """A JSON Lines file to which each step of the work is appended; a line that a killed process
    left unfinished does not count.

    options   {"options": {...}}, first: what the replies depend on
    steps     {"first": index, "replies": [[[text, tokens, stopped], ...], ...]} -> by index
    choices   {"question": index, "choice": "left"} -> the last one of each question
    result    {"result": {...}}: the report on the pairs that were written last; None before that
    """

    def __init__(self, out: Path, options: dict[str, Any]):
        """Open the record of `out`, or begin it.

        Raises:
            UserError: it has replies that depend on other options, or is no such record.
            OSError: it cannot be read or written.
        """
        self.out, self.path = out, out.with_name(f"{out.name}.samples")
        self.steps: dict[int, Replies] = {}
        self.choices: dict[int, str] = {}
        self.result: dict | None = None
        entries = list(json_lines(self.path))
        if not entries and self.path.exists() and self.path.stat().st_size:
            entries = [{}]
        if not entries:
            write_text(self.path, json_text({"options": options}) + "\n")
            return

        self._check(entries[0].get("options"), options)
        for entry in entries[1:]:
            if "replies" in entry:
                self.steps[entry["first"]] = [
                    [Reply(*reply) for reply in replies] for replies in entry["replies"]
                ]
            elif "choice" in entry:
                self.choices[entry["question"]] = entry["choice"]
            elif "result" in entry:
                self.result = entry["result"]

    def _check(self, recorded: Any, options: dict[str, Any]) -> None:
        if not isinstance(recorded, dict):
            raise UserError(
                f"{self.path} is in the way: it is no record of samples. Give another OUT."
            )
        names = [name for name in options if recorded.get(name) != options[name]]
        if names:
            raise UserError(
                f"{self.path} has replies that were sampled with other values ({', '.join(names)})."
                " Restore them, give another OUT, or delete the file to sample again."
            )

    def keep_step(self, first: int, replies: Replies) -> None:
        """Append the replies to some prompts, from the prompt with index `first` on."""
        append_json(self.path, {"first": first, "replies": replies})
        self.steps[first] = replies

    def keep_choice(self, question: int, choice: str) -> None:
        """Append what a person chose."""
        append_json(self.path, {"question": question, "choice": choice})
        self.choices[question] = choice

    def keep_result(self, result: dict) -> None:
        """Append the report on the pairs that were written."""
        append_json(self.path, {"result": result})
        self.result = result

    def check_out(self, judge: dict[str, Any]) -> bool:
        """Whether OUT was written by this judge before.

        Raises:
            UserError: there is an OUT of another judge, or of another program.
        """
        if not self.out.exists():
            return False
        if self.result is None or self.result["judge"] != judge:
            raise UserError(
                f"{self.out} exists, and holds other pairs. Give another OUT, or move it away."
            )
        return True
