"""What the rows of task files have in common: names, groups, a text, choices."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import BadRows, check_text, shown
from minimind.data.calls import parse_literal
from minimind.data.columns import NAMES, Columns, Fields
from minimind.data.conversations import LETTERS
from minimind.data.files import read_rows
from minimind.data.sources import File

IDS = ("id", "uid", "question_id", "key", "")  # the column of CMMLU's numbers has no name
T = TypeVar("T")
SUBJECTS = ("subject", "category", "kind")


def stem_of(file: File) -> str:
    """A file's name without folder and extensions."""
    return Path(str(file)).name.split(".")[0]


def named(files: Sequence[File]) -> list[tuple[File, str]]:
    """The files and their names in the keys of items: without folder and extension, where that
    tells them apart."""
    stems = [stem_of(file) for file in files]
    names = stems if len(set(stems)) == len(stems) else map(str, files)
    return list(zip(files, names, strict=True))


class Keys:
    """Names of the rows of one file, by which the items of two models are paired."""

    def __init__(self, name: str):
        self.name, self.count, self.seen = name, 0, set[str]()

    def of(self, row: Fields) -> str:
        """The file's name and the row's id, or else its number; raises BadRowError for an id that
        was there before."""
        ids = (row.get(name) for name in IDS)
        found = next((each for each in ids if isinstance(each, str | int) and each != ""), None)
        key = f"{self.name}#{self.count}" if found is None else f"{self.name}/{found}"
        self.count += 1
        if key in self.seen:
            raise BadRowError(f"found the id {shown(found)} twice, expected one row of an id")
        self.seen.add(key)
        return key


def read_items(
    files: Sequence[tuple[File, str]],
    convert: Callable[[Fields, str, str], T],
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
) -> list[T]:
    """What `convert` makes of the rows of named files; it also gets a row's key and the file's name
    without folder and extension. Raises UserError, see `files.read_rows`."""
    items = []
    for file, name in files:
        keys, stem = Keys(name), stem_of(file)

        def item(data: Mapping[str, Any], keys: Keys = keys, stem: str = stem) -> T:
            row = Fields.of(data)
            return convert(row, keys.of(row), stem)

        rows = read_rows([file], BadRows(on_bad_rows), item, "line", columns=columns or Columns())
        items += [row.data for row in rows]
    return items


def groups_of(row: Fields, default: str, language: str | None = None) -> tuple[str, ...]:
    """What a row is counted under: its subject, category or kind, and its language;
    raises BadRowError for one named "all".

    Args:
        default: the first group of a row that names none.
        language: of the row; by default the one that it names.
    """
    subjects = (row.get(name) for name in SUBJECTS)
    subject = next((each for each in subjects if isinstance(each, str) and each.strip()), default)
    language = row.get("language") if language is None else language
    names = (subject, language) if isinstance(language, str) and language.strip() else (subject,)
    if "all" in names:
        raise BadRowError("found the group 'all', which stands for all rows, expected another name")
    return tuple(dict.fromkeys(names))


def take_text(row: Fields, meaning: str) -> str:
    """The text of a column; raises BadRowError for a missing or empty one, or another value."""
    name = row.find(meaning)
    value = row.take(name) if name else None
    if not isinstance(value, str) or not value.strip():
        found = f"{name!r}: {shown(value)}" if name else f"keys {row.names}"
        expected = " or ".join(map(repr, NAMES[meaning][:2]))
        raise BadRowError(f"found {found}, expected {expected}: a text")
    check_text(value, name)
    return value.strip()


def read_choices(row: Fields) -> tuple[tuple[str, ...], list[str] | None]:
    """The choices of a question and, where the row has them, their labels.

    They are in columns A, B, C, D, or in one column: a list of texts, {"text": [...], "label":
    [...]}, or a list of {"text", "label"}.

    Raises:
        BadRowError: there are fewer than two or too many, one is empty or no text, or two are
            equal.
    """
    values, labels = _choice_values(row)
    if not 2 <= len(values) <= len(LETTERS):
        raise BadRowError(f"found {len(values)} choices, expected 2 to {len(LETTERS)}")
    names = labels or LETTERS
    choices: list[str] = []
    for label, value in zip(names, values, strict=False):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not isinstance(value, str) and not is_number:
            raise BadRowError(f"choice {label}: found {shown(value)}, expected a text")
        choice = str(value).strip()
        if not choice:
            raise BadRowError(f"choice {label}: found an empty text, expected words")
        check_text(choice, f"choice {label}")
        if choice in choices:
            first = names[choices.index(choice)]
            raise BadRowError(
                f"found the choices {first} and {label} equal ({shown(choice)}), expected different"
                " ones"
            )
        choices.append(choice)
    return tuple(choices), labels


def _choice_values(row: Fields) -> tuple[list[Any], list[str] | None]:
    letters = [letter for letter in LETTERS.lower() if letter in row]
    if letters[:1] == ["a"] and "choices" not in row:
        missing = next(letter for letter in f"{LETTERS.lower()}?" if letter not in letters)
        if missing < letters[-1]:
            raise BadRowError(f"choice {missing.upper()}: found nothing, expected a text")
        return [row.take(letter) for letter in letters], [*LETTERS[: len(letters)]]

    name = row.find("choices")
    if name is None:
        raise BadRowError(
            f"found keys {row.names}, expected 'choices' (a list of texts), or the columns A, B, C"
            " and D"
        )
    value = row.take(name)
    if isinstance(value, str):
        value = parse_literal(value, name)
    if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        value = {key: [each.get(key) for each in value] for key in ("text", "label")}
    labels = None
    if isinstance(value, Mapping):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list):
        raise BadRowError(f"{name}: found {shown(row[name])}, expected a list of texts")
    if labels is not None:
        labels = [str(label).strip() for label in labels] if isinstance(labels, list) else []
        if len(set(labels)) != len(value):
            raise BadRowError(
                f"{name}: found the labels {shown(labels)} of {len(value)} choices, expected a"
                " label for each"
            )
    return value, labels
