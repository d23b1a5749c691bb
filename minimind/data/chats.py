"""Files of conversations or preference pairs -> rows for a trainer, read and tokenised in batches.

chat_rows.py and preference_rows.py make the rows, loss_mask.py decides what of them is trained, and
held_out.py which of them are held out.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.common.cache import Contents
from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated
from minimind.data.bad_rows import BadRows
from minimind.data.batching import batches
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import Outcome, tokenize_conversations
from minimind.data.chat_summary import Reading
from minimind.data.conversations import to_conversation
from minimind.data.files import read_rows
from minimind.data.held_out import HoldOut
from minimind.data.markers import rendered_turn
from minimind.data.messages import Message
from minimind.data.mixing import add_counts, epoch_rows, parse_sources, source_facts
from minimind.data.preference_rows import tokenize_preferences
from minimind.data.preferences import to_preference
from minimind.data.sources import expand

BATCH = 1000  # conversations tokenised at a time
EXPECTED = 'expected its turns without markers, each as {"role", "content"} in "messages"'
IDS = pa.list_(pa.int32())  # the type of a column, but for these:
TYPES = {"loss_weights": pa.list_(pa.float32()), "roles": pa.list_(pa.string())}


class ChatRows(NamedTuple):
    """Rows for a trainer.

    `facts` are the files, rows and counts of both parts; `where` is the place ("file:line") of each
    training row, `lengths` the tokens of its conversation before any cut.
    """

    train: Dataset
    eval: Dataset | None
    facts: dict
    where: list[str]
    lengths: list[int]
    reading: Reading


class _Kind(NamedTuple):
    """How to read conversations, or pairs."""

    parse: Callable[[dict], Any]  # a row's columns -> one
    tokenize: Callable[[list], list[Outcome | BadRowError]]
    key: Callable[[Any], str]  # the text that copies share
    messages: Callable[[Any], list[Message]]  # all its messages


class _BadRowsOfBothSteps(BadRows):
    """Identical to BadRows except: not judged when all is read, because a row may also turn out bad
    when it is tokenised; call `judge` after that."""

    def finish(self, total: int) -> None:
        self.total = total

    def judge(self) -> None:
        super().finish(self.total)


def load_conversations(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    args: ChatArguments | None = None,
    roles: bool = False,
    seed: int = 42,
) -> ChatRows:
    """Return the rows of the conversations in the files of `data_args`.

    They have input_ids and labels, and if needed loss_weights and roles.

    Raises:
        UserError: too many rows are bad, or none is left to train.
    """
    encoder = ChatEncoder(tokenizer)
    options = encoder, max_length, args, roles
    kind = _Kind(
        to_conversation,
        lambda conversations: tokenize_conversations(conversations, *options),
        lambda conversation: str(conversation.messages),
        lambda conversation: conversation.messages,
    )
    return _load(data_args, kind, seed)


def load_preferences(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    args: ChatArguments | None = None,
    seed: int = 42,
) -> ChatRows:
    """Return the rows of the preference pairs in the files of `data_args`; see
    `tokenize_preferences`.

    Raises:
        UserError: too many rows are bad, none is left to train, or an option is not for pairs.
    """
    args = args or ChatArguments()
    allowed = {"long_conversations": ("keep_last", "drop"), "train_turns": ("all",)}
    for name, choices in allowed.items():
        if (value := getattr(args, name)) not in choices:
            raise UserError(
                f"--{name} {value}: expected {' or '.join(choices)} for preference pairs."
            )
    if args.needs_weights:
        raise UserError(
            "--weighted_loss and --loss_normalization: expected in finetune_sft.py only, not for"
            " pairs."
        )
    encoder = ChatEncoder(tokenizer)
    kind = _Kind(
        to_preference,
        lambda pairs: tokenize_preferences(pairs, encoder, max_length, args),
        lambda pair: str(pair["prompt"]),
        lambda pair: pair["prompt"] + pair["chosen"] + pair["rejected"],
    )
    return _load(data_args, kind, seed)


def _load(data_args, kind: _Kind, seed: int) -> ChatRows:
    sources = parse_sources(data_args.train_files, data_args.mixing_temperature)
    files = [data_args.expand(source.paths) for source in sources]
    held_out_files = expand(data_args.eval_files) if data_args.eval_files else []
    everything = [path for paths in files for path in paths]
    contents, held_out_contents = Contents(everything), Contents(held_out_files)

    # Read all sources; the rows to hold out are known only at the end
    parts, held_out = [_Collector() for _ in sources], _Collector()
    hold_out = HoldOut(0.0 if held_out_files else data_args.eval_ratio, data_args.max_eval_rows)
    reading = Reading()
    for part, paths in zip(parts, files, strict=True):
        for text, where, outcome in _read(paths, kind, data_args, reading):
            for owner, *trained in hold_out.offer(text, (part, where, outcome)):
                owner.add(*trained)
    for _, where, outcome in hold_out.chosen():
        held_out.add(where, outcome)

    # Read held-out files to their end, since bad rows are judged there
    if held_out_files:
        rows = _read(held_out_files, kind, data_args, Reading())
        for _, where, outcome in islice(rows, data_args.max_eval_rows):
            held_out.add(where, outcome)
        for _ in rows:
            pass
    contents.check()
    held_out_contents.check()
    for part, paths in zip(parts, files, strict=True):
        if not part.where:
            raise UserError(
                f"{', '.join(map(str, paths))}: no row is left to train"
                f" ({part.counted() or 'all are held out'}). Raise --max_length, lower"
                " --eval_ratio, give more rows, or choose another --train_turns."
            )

    # Join the sources as an epoch takes them
    facts = [part.facts() for part in parts]
    train = concatenate_datasets([part.dataset() for part in parts])
    where = [place for part in parts for place in part.where]
    lengths = [length for part in parts for length in part.lengths]
    counts, mixture = epoch_rows(data_args, sources, [len(part.where) for part in parts], seed)
    if mixture is not None:
        train = train.select(mixture)
        where, lengths = [where[i] for i in mixture], [lengths[i] for i in mixture]
    reading.held_out = held_out.where
    train_facts = {"files": list(map(str, everything)), "hash": contents.hash, **add_counts(facts)}
    train_facts |= source_facts(sources, facts, counts)
    held_out_hash = held_out_contents.hash if held_out_files else None
    held_out_facts = {"files": list(map(str, held_out_files)), "hash": held_out_hash}
    all_facts = {"train": train_facts, "eval": held_out_facts | held_out.facts()}
    return ChatRows(train, held_out.dataset(), all_facts, where, lengths, reading)


def _read(files, kind: _Kind, data_args, reading: Reading) -> Iterator[tuple[str, str, Outcome]]:
    """Yield the key, the place and the outcome of each usable row, and note all in `reading`."""

    def parse(data: dict) -> Any:
        try:
            return kind.parse(data)
        except BadRowError:
            if marker := rendered_turn(value for value in data.values() if isinstance(value, str)):
                raise BadRowError(
                    f"found a chat that is rendered already, with {marker!r}, {EXPECTED}"
                ) from None
            raise

    def characters(row) -> int:
        return sum(len(message["content"]) for message in kind.messages(row.data))

    bad, too_long = _BadRowsOfBothSteps(data_args.on_bad_rows), BadRows("skip")
    columns = data_args.reading()
    reading.bad.append(bad)
    reading.columns.append(columns)
    reading.too_long.append(too_long)
    rows = read_rows(files, bad, parse, columns=columns)
    rows = tqdm(rows, unit=" rows", desc=translated("tokenising"), disable=None)
    for batch in batches(rows, characters, BATCH):
        outcomes = kind.tokenize([row.data for row in batch])
        for row, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BadRowError):
                bad.add(row.where, str(outcome))
                continue
            if outcome.problem:
                too_long.add(row.where, outcome.problem)
            reading.add(row.where, outcome, kind.messages(row.data))
            yield kind.key(row.data), row.where, outcome
    bad.judge()
    too_long.warn(bad.total)


class _Collector:
    """Collects rows as Arrow tables: lists of Python integers take many times the memory."""

    def __init__(self):
        self.rows: list[dict] = []
        self.tables: list[pa.Table] = []
        self.where: list[str] = []
        self.lengths: list[int] = []
        self.counts = Counter()

    def add(self, where: str, outcome: Outcome) -> None:
        self.rows += outcome.rows
        self.where += [where] * len(outcome.rows)
        self.lengths += [outcome.length] * len(outcome.rows)
        self.counts += outcome.counts
        if len(self.rows) >= BATCH:
            self._flush()

    def counted(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())

    def facts(self) -> dict[str, int]:
        return {"rows": len(self.where), "truncated": 0, **self.counts}

    def dataset(self) -> Dataset | None:
        self._flush()
        return Dataset(pa.concat_tables(self.tables)) if self.tables else None

    def _flush(self) -> None:
        if self.rows:
            columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            arrays = [pa.array(values, TYPES.get(name, IDS)) for name, values in columns.items()]
            self.tables.append(pa.table(arrays, names=list(columns)))
            self.rows = []
