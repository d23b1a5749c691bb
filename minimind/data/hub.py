"""Datasets of the Hugging Face Hub, streamed by the `datasets` library."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from minimind.common.errors import UserError
from minimind.data.lines import Parsable

PREFIX = "hf://datasets/"
SPELLING = "hf://datasets/OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]"
MIRROR = "https://hf-mirror.com"
SECONDS = 10  # for the Hub to answer at all
PARTS = re.compile(
    # For a name without owner, such as "json", the library would read the working directory
    re.escape(PREFIX) + r"(?P<name>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/\w+/[\w.-]+|[^/:]+))?"
    r"(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?"
)


class HubDataset:
    """One split of a dataset on the Hub, or in the cache of `datasets` if the Hub is out of reach.

    The name is that of the Hub's file system, with the revision after an "@", then the config and
    the split as `datasets.load_dataset` takes them; without them the only config and the split
    "train" are read: hf://datasets/owner/name, hf://datasets/owner/name@v1.0:zh:validation,
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
        revision = parts["revision"]
        from datasets import load_dataset_builder  # here, since it takes a second
        from datasets.packaged_modules.cache.cache import Cache

        with _refusing_errors(self.spelling, self.name), _offline_if_out_of_reach():
            # The library no longer runs scripts in a dataset's repository
            self._builder = load_dataset_builder(
                PREFIX + self.name, parts["config"] or None, revision=revision
            )
            is_cached = isinstance(self._builder, Cache)
            if revision and is_cached and self._builder.hash != revision:
                raise ConnectionError(f"only revision {self._builder.hash} is in the cache")

    def __str__(self) -> str:
        return self.spelling

    @property
    def fingerprint(self) -> str:
        """Changes whenever the data does: the commit on the Hub, or the hash in the cache."""
        return f"{self.name}:{self._builder.config.name}:{self.split}@{self._builder.hash}"

    def rows(self) -> Iterator[Parsable]:
        """The rows, with their numbers; images and sounds stay undecoded. Raises UserError."""
        with _refusing_errors(self.spelling, self.name):
            rows = self._builder.as_streaming_dataset(self.split).decode(False)
            for number, row in enumerate(rows, 1):
                yield f"row {number}", partial(dict, row)


@contextmanager
def _offline_if_out_of_reach() -> Iterator[None]:
    """Let `datasets` read only its cache if one request fails: it would retry for 40 s."""
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
def _refusing_errors(spelling: str, name: str) -> Iterator[None]:
    """Turn whatever the library, the network or the Hub raises into one UserError."""
    try:
        yield
    except ConnectionError as error:
        # The user did not set this mode
        problem = str(error).removesuffix(" (OfflineModeIsEnabled)")
        raise UserError(f"{spelling}: {problem}. {_remedies(name)}") from error
    except Exception as error:
        raise UserError(
            f"{spelling}: cannot be read ({type(error).__name__}: {error}). Check the name, config"
            f" and split on https://huggingface.co/datasets/{name}."
        ) from error


def _remedies(name: str) -> str:
    """What to do if the Hub is out of reach."""
    from datasets import config

    silent = f"{config.HF_ENDPOINT} does not answer"
    reason = "HF_HUB_OFFLINE is set" if config.HF_HUB_OFFLINE else silent
    return (
        f"{reason}. Ways round it: another network, a mirror (export HF_ENDPOINT={MIRROR}), or the"
        " files downloaded by hand and given as --train_files data/*.jsonl, from"
        f" https://huggingface.co/datasets/{name} or from ModelScope with `modelscope download"
        " --dataset OWNER/NAME --local_dir data`."
    )
