"""Datasets of the Hugging Face Hub, streamed by the `datasets` library."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from minimind.common.errors import UserError
from minimind.data.json_files import Parsable

PREFIX = "hf://datasets/"
SPELLING = "hf://datasets/OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]"
MIRROR = "https://hf-mirror.com"
SECONDS = 10  # for the Hub to answer at all
PARTS = re.compile(
    # A bare "json" would make the library read the working directory
    re.escape(PREFIX) + r"(?P<name>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/\w+/[\w.-]+|[^/:]+))?"
    r"(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?"
)


class HubDataset:
    """One split of a dataset on the Hub, or of it in the cache of `datasets` if the Hub cannot be
    reached.

    It is named as the Hub's own file system names it, with the revision after an "@", then the
    config and the split as `datasets.load_dataset` takes them; without them the only config and the
    split "train" are read: hf://datasets/owner/name, hf://datasets/owner/name@v1.0:zh:validation,
    hf://datasets/owner/name::test.

    Raises:
        UserError: not such a name, or there is no such dataset, config or revision within reach.
    """

    def __init__(self, spelling: str):
        parts = PARTS.fullmatch(spelling)
        if not parts:
            raise UserError(
                f"{spelling}: not the name of a dataset, expected {SPELLING}. The split is train by"
                " default."
            )
        self.spelling, self.name, self.split = spelling, parts["name"], parts["split"] or "train"
        from datasets import load_dataset_builder  # here, since it takes a second
        from datasets.packaged_modules.cache.cache import Cache

        with _refusing(self.spelling, self.name), _cache_alone_if_out_of_reach():
            # Scripts in a dataset's repository are never run: the library has no support for them
            # any more.
            self._builder = load_dataset_builder(
                PREFIX + self.name, parts["config"] or None, revision=parts["revision"]
            )
            if (
                parts["revision"]
                and isinstance(self._builder, Cache)
                and self._builder.hash != parts["revision"]
            ):
                raise ConnectionError(f"only revision {self._builder.hash} is in the cache")

    def __str__(self) -> str:
        return self.spelling

    @property
    def fingerprint(self) -> str:
        """What changes whenever the data does: the commit on the Hub, or the hash in the cache."""
        return f"{self.name}:{self._builder.config.name}:{self.split}@{self._builder.hash}"

    def rows(self) -> Iterator[Parsable]:
        """The rows, with their numbers; images and sounds stay undecoded. Raises UserError."""
        with _refusing(self.spelling, self.name):
            rows = self._builder.as_streaming_dataset(self.split).decode(False)
            for number, row in enumerate(rows, 1):
                yield f"row {number}", partial(dict, row)


@contextmanager
def _cache_alone_if_out_of_reach() -> Iterator[None]:
    """Let `datasets` read its cache alone where one request to the Hub fails: it would try again
    for 40 s."""
    from datasets import config
    from huggingface_hub.utils import get_session

    before = config.HF_HUB_OFFLINE
    try:
        get_session().head(config.HF_ENDPOINT, timeout=SECONDS)
    except Exception:
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


@contextmanager
def _refusing(spelling: str, name: str) -> Iterator[None]:
    """Turn whatever the library, the network or the Hub raises into one UserError."""
    try:
        yield
    except ConnectionError as error:
        # The mode set above, not by the user
        found = str(error).removesuffix(" (OfflineModeIsEnabled)")
        raise UserError(f"{spelling}: {found}. {_remedies(name)}") from error
    except Exception as error:
        raise UserError(
            f"{spelling}: cannot be read ({type(error).__name__}: {error}). Check the name, config"
            f" and split on https://huggingface.co/datasets/{name}."
        ) from error


def _remedies(name: str) -> str:
    """What to do where the Hub cannot be reached."""
    from datasets import config

    reason = (
        "HF_HUB_OFFLINE is set"
        if config.HF_HUB_OFFLINE
        else f"{config.HF_ENDPOINT} does not answer"
    )
    return (
        f"{reason}. Ways round it: another network, a mirror (export HF_ENDPOINT={MIRROR}), or the"
        " files downloaded by hand and given as --train_files data/*.jsonl, from"
        f" https://huggingface.co/datasets/{name} or from ModelScope with `modelscope download"
        " --dataset OWNER/NAME --local_dir data`."
    )
