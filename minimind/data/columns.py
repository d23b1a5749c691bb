"""The columns of a row: what each usual name means, and what becomes of a column that nobody reads.

A row's format is recognised by the names of its columns. `Fields` remember which of them were read,
so that text in any other one is noticed: `Columns` counts it, and a run stops unless the user says
that it may be left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import shown

# What a column means -> its usual names, in lower case; the first one that holds something is read.
NAMES = {
    "text": ("text", "content"),
    "messages": (
        *("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "chat"),
        "contents",  # Gemini's
    ),
    "prompt": ("prompt", "question", "query", "instruction", "problem"),
    "input": ("input", "inputs"),
    "response": (
        "completion",
        "response",
        "output",
        "answer",
        "target",
        "solution",
        "reply",
        "answerkey",
    ),
    "system": (
        *("system", "system_prompt", "system_message", "systemprompt", "sys_prompt"),
        *("system_instruction", "systeminstruction", "custom_instructions"),
    ),
    "context": ("context", "passage", "background"),
    "choices": ("choices", "options"),
    "reasoning_content": (
        *(
            "reasoning_content",
            "reasoning",
            "thinking",
            "thought",
            "cot",
            "complex_cot",
            "chain_of_thought",
        ),
        *("rationale", "think", "reasoning_text"),
    ),
    "tools": (
        "tools",
        "functions",
        "tools_json",
        "functions_json",
        "tool_definitions",
        "xml_tools",
        "python_tools",
    ),
    "history": ("history",),
    "chosen": (
        *("chosen", "preferred_output", "chosen_messages", "chosen_response", "response_chosen"),
        *("chosen_conversations", "preferred"),
    ),
    "rejected": (
        *(
            "rejected",
            "non_preferred_output",
            "rejected_messages",
            "rejected_response",
            "response_rejected",
        ),
        *("rejected_conversations", "dispreferred"),
    ),
}
# Columns that say something about a row and are no part of its text.
FACTS = re.compile(
    r"(.*_)?("
    r"ids?|keys?|doc|uu?id|guid|hash|sha\d*|md5|index|idx|number|count|num|length|len|size|tokens?|n|"
    r"scores?|ratings?|ranks?|rewards?|quality|loss|ppl|perplexity|probability|confidence|votes?|weight|"
    r"sources?|origin|datasets?|corpus|subset|split|config|version|licen[cs]e|copyright|rights|authors?|annotators?|"
    r"users?|publisher|verified|from|dump|"
    r"url|uri|link|domain|host|website|file(name|_name)?|path|repo(_name)?|repository|commit|"
    r"date|time|timestamp|year|created(_at)?|updated(_at)?|"
    r"lang|languages?|locale|country|region|state|"
    r"category|categories|class|topics?|tags?|types?|kind|genre|subject|field|area|skills?|tasks?|task_(name|type)|"
    r"difficulty|level|grade|status|flags?|title|names?|meta(data)?|extra(_info)?|"
    r"model(_?name)?|generator|engine|teacher|temperature|"
    r"toxic|toxicity|redacted|moderation|safety|pii|order|turns?|format|template|seed|header|"
    r"language_(score|code)|label|desirable|kto_tag|is_.*|has_.*|num_.*|n_.*"
    r")"
)
# A value that is one word, path or address (of Chinese, a few characters): a name of something, not
# text.
LABEL = re.compile(r"(?a:[\w.:/+#@%&=?~-]{1,200})|\w{1,8}")
KNOWN = {name for names in NAMES.values() for name in names}
IGNORE_ALL = "ignore"
PLACES = 5  # rows named for one column
NAMES_SHOWN = 50  # names of columns kept for a message


class Fields(Mapping):
    """A row's columns by lower-case name, without those that are null; they remember which were
    read.

    `get` and `[]` do not count as reading; `take` does.
    """

    def __init__(self, data: Mapping[str, Any]):
        self.given = data
        self.columns = {
            str(name).strip().lower(): value for name, value in data.items() if value is not None
        }
        if len(self.columns) < len(data):  # some are null, or two names differ in their case alone
            given = {name: value for name, value in data.items() if value is not None}
            self.columns = self.columns if len(self.columns) == len(given) else given
        self.read: set[str] = set()
        self.unread_inside: list[str] = []  # of messages and other parts

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Fields":
        """The fields themselves, or those of a dict."""
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
        """The value of a column, which does not count as reading."""
        return self.columns.get(name, default)

    def find(self, meaning: str) -> str | None:
        """The name of the column with this meaning: the first that holds something, else one that
        is empty."""
        there = [name for name in NAMES[meaning] if name in self.columns]
        return next(
            (name for name in there if self.columns[name] not in ("", [], {})),
            there[0] if there else None,
        )

    def take(self, *names: str | None) -> list[Any]:
        """Read columns; those that are not there give None."""
        self.read.update(name for name in names if name)
        return [self.columns.get(name) for name in names]

    @property
    def names(self) -> str:
        """The names as they were given, for messages."""
        return shown([name for name, value in self.given.items() if value is not None])

    def unread(self) -> list[str]:
        """The columns that hold text of which nothing was read."""
        rest = [name for name in self.columns if name not in self.read and not _is_fact(name)]
        found = [
            name
            for name in rest
            if any(_is_text(text, name in KNOWN) for text in _texts(self.columns[name]))
        ]
        if found:
            read = [text.strip() for name in self.read for text in _texts(self.columns.get(name))]
            found = [name for name in found if not _repeats(list(_texts(self.columns[name])), read)]
        return found + self.unread_inside


@cache
def _is_fact(name: str) -> bool:
    return bool(FACTS.fullmatch(name))


def _texts(value: Any) -> Iterator[str]:
    """The strings within a value that are not empty; JSON in a string gives its own."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _repeats(texts: list[str], read: list[str]) -> bool:
    """Whether texts say nothing beside what was read: a prompt beside the conversation, or all of
    it as one text."""
    whole = "\n".join(read)
    return all(text.strip() in whole for text in texts) or (
        len(read) > 1 and all(text in texts[0] for text in read)
    )


def _is_text(text: str, is_named_so: bool) -> bool:
    """Whether a string is something to read: in a column of a usual name any, elsewhere more than
    one word."""
    return is_named_so or not LABEL.fullmatch(text.strip())


class Columns:
    """How the columns of some rows are read, and which of them nobody read.

    Args:
        renamed: "meaning=column" words (`--columns`), such as "prompt=问题". unread: columns that are
        left out, or "ignore" for all that nobody reads (`--unread_columns`). cleaned: whether the
        rows were renamed before, by a cleaning.

    Raises:
        UserError: a word that is not of this form, or with an unknown meaning.
    """

    def __init__(
        self,
        renamed: Sequence[str] | None = None,
        unread: Sequence[str] | None = None,
        cleaned: bool = False,
    ):
        self.given, self.cleaned = {}, cleaned
        for word in renamed or ():
            meaning, equals, column = str(word).partition("=")
            if not equals or not column or meaning not in NAMES:
                raise UserError(
                    f"--columns {word}: expected MEANING=COLUMN, such as response=回答, with one of "
                    f"{', '.join(NAMES)}."
                )
            self.given[column] = meaning
        self.ignored = {name.strip().lower() for name in unread or ()}
        self.total = 0
        self.renamed_rows = 0
        self.counts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}
        self.seen: dict[str, None] = {}

    def rename(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row with renamed columns under our names, and without those that are left out."""
        if not self.given and not self.ignored:
            return data
        taken = {self.given[name] for name in data if name in self.given}
        self.renamed_rows += bool(taken)
        if self.given and len(self.seen) < NAMES_SHOWN:
            self.seen.update(dict.fromkeys(data))
        kept = {
            name: value
            for name, value in data.items()
            if name not in self.given
            and name not in taken
            and name.strip().lower() not in self.ignored
        }
        return kept | {
            self.given[name]: value for name, value in data.items() if name in self.given
        }

    def fields(self, data: Mapping[str, Any]) -> Fields:
        """The columns of a row as they will be read."""
        return Fields(self.rename(data))

    def count(self, where: str, fields: Fields) -> None:
        """Note which columns of a row that could be used nobody read."""
        self.total += 1
        if IGNORE_ALL in self.ignored:
            return
        for name in fields.unread():
            if name in self.ignored:
                continue
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.counts[name] <= PLACES:
                self.places.setdefault(name, []).append(where)

    def finish(self) -> None:
        """Raises UserError where no row had a renamed column."""
        if self.given and not self.renamed_rows and not self.cleaned:
            raise UserError(
                f"--columns: found no row with {' or '.join(map(repr, self.given))}, only the"
                f" columns {', '.join(map(repr, self.seen)) or 'of an empty file'}. Check the"
                " names."
            )

    def findings(self) -> list[tuple[str, int, str, str, list[str]]]:
        """(column, rows, what was found, what to do, places) of each column with text that nobody
        read."""
        found = []
        for name, count in self.counts.items():
            text = (
                f"{count:,} of {self.total:,} rows ({count / self.total:.1%}) have text in"
                f" {name!r}, which is not read"
            )
            advice = (
                f"Say what it means with --columns, such as context={name}, or leave it out with"
                f" --unread_columns {name} (or ignore, for all such columns)."
            )
            found.append((name, count, text, advice, self.places[name]))
        return found

    def stop(self) -> None:
        """Raises UserError where text is not read."""
        if found := self.findings():
            listed = "\n".join(
                f"  {text}. {advice}\n    {', '.join(places)}"
                for _, _, text, advice, places in found
            )
            raise UserError(f"the data has columns that would be left out:\n{listed}")


def as_text(value: Any, name: str) -> str:
    """A string; raises BadRowError for anything else."""
    if not isinstance(value, str):
        raise BadRowError(f"{name}: found {shown(value)}, expected a string")
    return value
