"""The texts a tokenizer is trained and evaluated on: their language, their domain, and the weight
of each domain.

The *domain* of a text is the row's field "source" where it has one, else the name of its file. Its
*language* is that of most of its writing: Chinese characters ("zh"), words in Latin
letters ("en"), or letters of other scripts ("other", also for a text without letters). A Chinese
page about code thus stays Chinese, and Japanese is neither.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from tqdm import tqdm

from minimind.common.errors import UserError
from minimind.common.language import translated
from minimind.data.columns import Columns
from minimind.data.conversations import to_text
from minimind.data.files import read_rows
from minimind.data.markers import Boundaries
from minimind.data.sources import expand, total_size

logger = logging.getLogger(__name__)

LANGUAGES = ("zh", "en", "other")
HAN = r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
LATIN = r"A-Za-zªºÀ-ÖØ-öø-ɏ"
HAN_RUN = re.compile(f"[{HAN}]+")
WORD = re.compile(f"[{LATIN}]+(?:['’][{LATIN}]+)*")
OTHER_LETTERS = re.compile(rf"[^\W\d_{HAN}{LATIN}]+")


class Text(NamedTuple):
    """A document, or the words of a conversation."""

    text: str
    domain: str


class Script(NamedTuple):
    """How much of each writing a text holds."""

    han: int  # characters
    words: int  # in Latin letters; "don't" is one
    others: int  # letters

    @property
    def language(self) -> str:
        """One of `LANGUAGES`; of equals the first."""
        return LANGUAGES[self.index(max(self))] if any(self) else "other"


def script(text: str) -> Script:
    """Count the writing in a text."""
    han = sum(map(len, HAN_RUN.findall(text)))
    return Script(han, len(WORD.findall(text)), sum(map(len, OTHER_LETTERS.findall(text))))


def read_texts(
    files: Sequence[str],
    on_bad_rows: str | None = None,
    title: str | None = None,
    columns: Sequence[str] | None = None,
    check: Callable[[str], None] | None = None,
) -> Iterator[Text]:
    """The texts in files, directories and globs of documents and conversations; with a `title`
    under a progress bar.

    `columns`: words of `--columns`; `check` raises BadRowError for a text that cannot be used.
    Raises UserError as `read_rows`.
    """
    inputs, boundaries = expand(files), Boundaries()
    options = {"unit": "B", "unit_scale": True, "desc": title, "disable": None if title else True}
    with tqdm(total=total_size(inputs), **options) as bar:

        def convert(data: dict) -> tuple[list[str], Any]:
            texts = boundaries.split(to_text(data))
            for text in texts if check else ():
                check(text)
            return texts, data.get("source")

        reading = {"progress": bar.update, "columns": Columns(columns)}
        for row in read_rows(inputs, on_bad_rows, convert, **reading):
            texts, source = row.data
            is_named = isinstance(source, str) and source
            domain = source if is_named else Path(row.where.rsplit(":", 1)[0]).name
            yield from (Text(text, domain) for text in texts)
    if boundaries.rows:
        logger.warning("%s", translated(str(boundaries)))


def weighted(texts: Iterable[Text], weights: Mapping[str, float]) -> Iterator[Text]:
    """The texts of each domain as often as its weight says, others once.

    A weight of 0.25 takes every fourth text of a domain, chosen by its hash; 2.25 takes each twice,
    and every fourth once more. Raises UserError for a weight below 0, and at the end for a domain
    that had no text.
    """
    refused = [f"{name}={weight}" for name, weight in weights.items() if not 0 <= weight < inf]
    if refused:
        raise UserError(f"--weights {' '.join(refused)}: expected weights of 0 or more.")
    seen = dict.fromkeys(weights, False)
    for text in texts:
        times, part = divmod(weights.get(text.domain, 1), 1)
        times += part > 0 and xxhash.xxh3_64_intdigest(text.text.encode()) < part * 2**64
        yield from [text] * int(times)
        seen[text.domain] = True
    if missing := [domain for domain in weights if not seen[domain]]:
        known = ", ".join(sorted(domain for domain in seen if seen[domain]))
        raise UserError(f"--weights {' '.join(missing)}: no text has this source. Found {known}.")
