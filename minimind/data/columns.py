"""The columns of a row: what each usual name means, and what happens to a column that nobody reads.

The format of a row is recognised by the names of its columns. `Fields` remember which of them were
read, so that text in any other one is noticed: `Columns` counts it, and a run stops unless the user
says that it may be left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import shown

# What a column means -> its usual names, in lower case; the first one that is not empty is read
NAMES = {
    meaning: tuple(names.split())
    for meaning, names in {
        "text": "text content",
        "messages": "messages conversations conversation dialogue dialog dialogs chat contents",
        "prompt": "prompt question query instruction problem",
        "input": "input inputs",
        "response": "completion response output answer target solution reply answerkey",
        "system": "system system_prompt system_message systemprompt sys_prompt system_instruction"
        " systeminstruction custom_instructions",
        "context": "context passage background",
        "choices": "choices options",
        "reasoning_content": "reasoning_content reasoning thinking thought cot complex_cot"
        " chain_of_thought rationale think reasoning_text",
        "tools": "tools functions tools_json functions_json tool_definitions xml_tools"
        " python_tools",
        "history": "history",
        "chosen": "chosen preferred_output chosen_messages chosen_response response_chosen"
        " chosen_conversations preferred",
        "rejected": "rejected non_preferred_output rejected_messages rejected_response"
        " response_rejected rejected_conversations dispreferred",
    }.items()
}
KNOWN = {name for names in NAMES.values() for name in names}
# Columns with facts about a row, which are not part of its text
FACTS = re.compile(
    r"(.*_)?("
    r"ids?|keys?|doc|uu?id|guid|hash|sha\d*|md5|index|idx|number|count|num|length|len|size|"
    r"tokens?|n|scores?|ratings?|ranks?|rewards?|quality|loss|ppl|perplexity|probability|"
    r"confidence|votes?|weight|"
    r"sources?|origin|datasets?|corpus|subset|split|config|version|licen[cs]e|copyright|rights|"
    r"authors?|annotators?|users?|publisher|verified|from|dump|"
    r"url|uri|link|domain|host|website|file(name|_name)?|path|repo(_name)?|repository|commit|"
    r"date|time|timestamp|year|created(_at)?|updated(_at)?|"
    r"lang|languages?|locale|country|region|state|"
    r"category|categories|class|topics?|tags?|types?|kind|genre|subject|field|area|skills?|tasks?|"
    r"task_(name|type)|difficulty|level|grade|status|flags?|title|names?|meta(data)?|extra(_info)?|"
    r"model(_?name)?|generator|engine|teacher|temperature|"
    r"toxic|toxicity|redacted|moderation|safety|pii|order|turns?|format|template|seed|header|"
    r"language_(score|code)|label|desirable|kto_tag|is_.*|has_.*|num_.*|n_.*"
    r")"
)
# A value that is one word, path or address (in Chinese, a few characters) names something and is
# not text
LABEL = re.compile(r"(?a:[\w.:/+#@%&=?~-]{1,200})|\w{1,8}")
IGNORE_ALL = "ignore"
PLACES = 5  # rows named for one column
NAMES_SHOWN = 50  # names of columns kept for a message


class Fields(Mapping):
    """The columns of a row that are not null, by lower-case name; they remember which were read.

    `take` counts as reading, `get` and `[]` do not.
    """

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        present = {name: value for name, value in data.items() if value is not None}
        self.columns = {str(name).strip().lower(): value for name, value in present.items()}
        if len(self.columns) < len(present):  # two names differ only in case
            self.columns = present
        self.names_read: set[str] = set()
        self.unread_inside: list[str] = []  # names of unread keys of messages

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Fields":
        """The fields of a dict; fields are returned as they are."""
        return data if isinstance(data, cls) else cls(data)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def get(self, name: str | None, default: Any = None) -> Any:
        return self.columns.get(name, default)

    def find(self, meaning: str) -> str | None:
        """The name of the column with this meaning: the first that is not empty, else the first."""
        names = [name for name in NAMES[meaning] if name in self.columns]
        filled = (name for name in names if self.columns[name] not in ("", [], {}))
        return next(filled, names[0] if names else None)

    def take(self, name: str | None) -> Any:
        """Read a column; None if there is none of this name."""
        self.names_read.add(name)
        return self.columns.get(name)

    @property
    def names(self) -> str:
        """The original names, for messages."""
        return shown([name for name, value in self.data.items() if value is not None])

    def unread(self) -> list[str]:
        """The columns with text that was neither read nor repeats what was read."""
        names = [name for name in self.columns if name not in self.names_read]
        with_text = [name for name in names if not _is_fact(name) and self._has_text(name)]
        if with_text:
            read = [t.strip() for name in self.names_read for t in _texts(self.columns.get(name))]
            with_text = [n for n in with_text if not _repeats(list(_texts(self.columns[n])), read)]
        return with_text + self.unread_inside

    def _has_text(self, name: str) -> bool:
        """Whether a column holds text: in one of a known name anything, else more than a label."""
        is_known = name in KNOWN
        return any(is_known or not LABEL.fullmatch(t.strip()) for t in _texts(self.columns[name]))


@cache
def _is_fact(name: str) -> bool:
    return bool(FACTS.fullmatch(name))


def _texts(value: Any) -> Iterator[str]:
    """The strings within a value that are not blank."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _repeats(texts: list[str], read: list[str]) -> bool:
    """Whether texts add nothing to what was read, such as a prompt beside its conversation, or a
    conversation rendered as one text."""
    everything = "\n".join(read)
    return all(text.strip() in everything for text in texts) or (
        len(read) > 1 and all(text in texts[0] for text in read)
    )


class Columns:
    """How the columns of some rows are read, and which of them nobody read.

    Args:
        renamed: "meaning=column" words (`--columns`), such as "prompt=问题".
        unread: columns to leave out, or "ignore" for all that nobody reads (`--unread_columns`).
        cleaned: whether a cleaning has renamed the columns already.

    Raises:
        UserError: a word that does not have this form, or an unknown meaning.
    """

    def __init__(
        self,
        renamed: Sequence[str] | None = None,
        unread: Sequence[str] | None = None,
        cleaned: bool = False,
    ):
        self.meanings: dict[str, str] = {}  # of the renamed columns
        for word in renamed or ():
            meaning, _, column = str(word).partition("=")
            if not column or meaning not in NAMES:
                raise UserError(
                    f"--columns {word}: expected MEANING=COLUMN, such as response=回答, with one"
                    f" of {', '.join(NAMES)}."
                )
            self.meanings[column] = meaning
        self.cleaned = cleaned
        self.ignored = {name.strip().lower() for name in unread or ()}
        self.total = self.renamed_rows = 0
        self.counts: dict[str, int] = {}  # rows with text in an unread column
        self.places: dict[str, list[str]] = {}
        self.names: dict[str, None] = {}  # for the message about names that are in no row

    def rename(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with renamed columns under our names, and without those that are left out."""
        if not self.meanings and not self.ignored:
            return data
        renamed = {self.meanings[name]: data[name] for name in data if name in self.meanings}
        self.renamed_rows += bool(renamed)
        if self.meanings and len(self.names) < NAMES_SHOWN:
            self.names.update(dict.fromkeys(data))
        left_out = self.meanings.keys() | renamed.keys()
        others = {
            name: value
            for name, value in data.items()
            if name not in left_out and name.strip().lower() not in self.ignored
        }
        return others | renamed

    def fields(self, data: Mapping[str, Any]) -> Fields:
        """The columns of a row as they will be read."""
        return Fields(self.rename(data))

    def count(self, where: str, fields: Fields) -> None:
        """Count the columns with text of a row that nobody read."""
        self.total += 1
        if IGNORE_ALL in self.ignored:
            return
        for name in fields.unread():
            if name not in self.ignored:
                self.counts[name] = self.counts.get(name, 0) + 1
                if self.counts[name] <= PLACES:
                    self.places.setdefault(name, []).append(where)

    def finish(self) -> None:
        """Raise UserError if no row had a renamed column."""
        if self.meanings and not self.renamed_rows and not self.cleaned:
            raise UserError(
                f"--columns: found no row with {' or '.join(map(repr, self.meanings))}, only the"
                f" columns {', '.join(map(repr, self.names)) or 'of an empty file'}. Check the"
                " names."
            )

    def findings(self) -> list[tuple[str, int, str, str, list[str]]]:
        """(column, rows, what was found, what to do, places) of each column with unread text."""
        findings = []
        for name, count in self.counts.items():
            text = (
                f"{count:,} of {self.total:,} rows ({count / self.total:.1%}) have text in"
                f" {name!r}, which is not read"
            )
            advice = (
                f"Say what it means with --columns, such as context={name}, or leave it out with"
                f" --unread_columns {name} (or ignore, for all such columns)."
            )
            findings.append((name, count, text, advice, self.places[name]))
        return findings

    def stop(self) -> None:
        """Raise UserError if there is text that nobody read."""
        if findings := self.findings():
            listed = "\n".join(
                f"  {text}. {advice}\n    {', '.join(places)}"
                for _, _, text, advice, places in findings
            )
            raise UserError(f"the data has columns that would be left out:\n{listed}")


def as_text(value: Any, name: str) -> str:
    """A string; raises BadRowError for anything else."""
    if not isinstance(value, str):
        raise BadRowError(f"{name}: found {shown(value)}, expected a string")
    return value
