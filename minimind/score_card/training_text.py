"""The training text of a model's lineage."""

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from minimind.cleaning.duplicates import strings_in
from minimind.cleaning.row_texts import RowTexts, check_row
from minimind.common.errors import BadRowError
from minimind.common.language import translated
from minimind.data.bad_rows import BadRows
from minimind.data.files import Row, read_rows
from minimind.data.sources import File, total_size
from minimind.stage_directory import Ancestor


def training_files(ancestors: Sequence[Ancestor]) -> list[File]:
    """The training files of a lineage, each once."""
    return list(dict.fromkeys(file for ancestor in ancestors for file in ancestor.files))


def lineage_json(ancestors: Sequence[Ancestor]) -> list[dict]:
    """A lineage as JSON."""
    return [
        {**ancestor._asdict(), "files": list(map(str, ancestor.files))} for ancestor in ancestors
    ]


def read_row_texts(files: Sequence[File], title: str) -> Iterator[Row]:
    """The place and the text of each row of training files, with a progress bar; of a row whose
    columns have names of their own, all its strings.

    Raises:
        UserError: a file is broken.
    """
    size, title = total_size(files), translated(title)
    with tqdm(total=size, unit="B", unit_scale=True, desc=title, disable=None) as progress:
        rows = read_rows(files, BadRows("skip"), text_unit="paragraph", progress=progress.update)
        for where, row in rows:
            try:
                yield Row(where, RowTexts(check_row(row)).all_text)
            except BadRowError:
                yield Row(where, "\n".join(strings_in(row)))
