"""Raw data files -> rows, each with the place it came from.

    sources.py   paths, globs, names of datasets    -> files
    formats.py   a file's bytes                     -> its rows, each parsed on its own
    columns.py   a row                              -> fields, under our names
    `convert`    fields                             -> a document, a conversation, a pair

A row that cannot be used is a *bad row*: reported as `file:line` with what was found and what was
expected, then refused or skipped as `--on_bad_rows` says. Only a file whose structure is lost (a
broken JSON list, an unclosed CSV quote, a damaged archive) is refused whatever the policy, because
nobody can say how many rows would be lost with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import BadRows, check_text, shown
from minimind.data.columns import Columns, Fields
from minimind.data.formats import TEXT_UNITS, read_file
from minimind.data.hub import HubDataset
from minimind.data.lines import Parsable
from minimind.data.markers import Boundaries
from minimind.data.sources import File, expand
from minimind.data.tables import Progress


class Row(NamedTuple):
    """One row; `where` is "file:line", or "file:row N" for parquet, arrow and the Hub."""

    where: str
    data: Any


def read_rows(
    paths: Sequence[str | File],
    on_bad_rows: str | BadRows | None = None,
    convert: Callable[[Mapping], Any] | None = None,
    text_unit: str = "file",
    progress: Progress | None = None,
    columns: Columns | None = None,
) -> Iterator[Row]:
    """Stream the rows of files, directories, globs and datasets of the Hub.

    Args:
        paths: see `expand`.
        on_bad_rows: the policy of `BadRows`, or an instance of it, which then counts them.
        convert: turns a row's fields into `Row.data`; the fields remember what it read. A row that
            it refuses with BadRowError is a bad row like one that cannot be parsed. Without it
            `Row.data` is the row's dict.
        text_unit: what one row of a txt file is: the complete "file", a "paragraph" (between blank
            lines), or a "line".
        progress: called with the bytes read since its last call, as they are on the disk
            (compressed, if the file is); they add up to the size of the files.
        columns: renames and leaves out columns, and counts those that `convert` did not read.

    Raises:
        UserError: at once for what `expand` refuses; while reading for a broken file, one without
            rows, and bad rows, see `BadRows`. Without a policy the bad rows are judged at the end,
            so do not act on the rows before the iteration is over.
    """
    if text_unit not in TEXT_UNITS:
        raise UserError(f"text_unit: found {text_unit!r}, expected {', '.join(TEXT_UNITS)}")
    bad = on_bad_rows if isinstance(on_bad_rows, BadRows) else BadRows(on_bad_rows)
    return _rows(expand(paths), bad, convert, text_unit, progress, columns or Columns())


def _rows(
    files: list[File], bad: BadRows, convert, text_unit: str, progress, columns: Columns
) -> Iterator[Row]:
    total = 0
    try:
        for file in files:
            before = total
            for place, parse in parsables(file, text_unit, progress):
                total += 1
                where = f"{file}:{place}"
                try:
                    fields = columns.fields(parse())
                    row = Row(where, convert(fields) if convert else fields.data)
                except BadRowError as problem:
                    bad.add(where, str(problem))
                else:
                    if convert:
                        columns.count(where, fields)
                    yield row
            if total == before:
                raise UserError(
                    f"{file}: found no rows, expected at least one. Remove the file or create it"
                    " again."
                )
    except GeneratorExit:  # the caller stopped early
        bad.warn(total)
        raise
    columns.finish()
    bad.finish(total)


def parsables(file: File, text_unit: str, progress: Progress | None) -> Iterator[Parsable]:
    """The rows of one file or dataset, as places and functions that parse them."""
    return file.rows() if isinstance(file, HubDataset) else read_file(file, text_unit, progress)


def to_document(data: Mapping) -> str:
    """The text of a row's field "text", or "content" if it has no "text"; raises BadRowError.

    Rows of other kinds may have such a field too: one message of a conversation, or a reply beside
    its reasoning. They are refused.
    """
    row = Fields.of(data)
    name = "text" if row.get("text") is not None or row.get("content") is None else "content"
    if name not in row:
        found = f"{name!r}: null" if name in row.data else f"keys {row.names}"
        raise BadRowError(f"found {found}, expected 'text': a string")
    if "role" in row or "from" in row:
        raise BadRowError(
            f"found keys {row.names}, one message of a conversation, expected a document's 'text'"
        )
    if name == "content" and row.find("reasoning_content"):
        raise BadRowError(
            f"found keys {row.names}, a reply and its reasoning, expected a document's 'text'"
        )
    text = row.take(name)
    if not isinstance(text, str):
        raise BadRowError(f"found {name!r}: {shown(text)}, expected a string")
    if not text.strip():
        raise BadRowError(f"found {name!r} without text, expected a string that is not empty")
    check_text(text, name)
    return text


def read_documents(
    paths: Sequence[str | File],
    on_bad_rows: str | None = None,
    text_unit: str = "file",
    progress: Progress | None = None,
    columns: Columns | None = None,
    boundaries: Boundaries | None = None,
    check: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Stream the documents of files, directories, globs and datasets of the Hub; see `read_rows`.

    `boundaries` splits rows at the boundary markers spelled out in them, and counts; by default it
    splits. `check` raises BadRowError for a document that cannot be used.
    """
    split = (boundaries or Boundaries()).split

    def convert(data: Mapping) -> list[str]:
        documents = split(to_document(data))
        for document in documents if check else ():
            check(document)
        return documents

    rows = read_rows(paths, on_bad_rows, convert, text_unit, progress, columns)
    return (document for row in rows for document in row.data)
