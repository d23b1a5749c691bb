"""Files of conversations or preference pairs -> rows for a trainer, read and tokenised in batches
once, and found again in the cache.

chat_rows.py and preference_rows.py make the rows, loss_mask.py decides what of them is trained, and
held_out.py which of them are held out.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.common.cache import Contents, find_or_build
from minimind.common.errors import BadRowError, UserError
from minimind.common.language import translated
from minimind.data.bad_rows import BadRows
from minimind.data.batching import batches
from minimind.data.chat_arguments import ChatArguments, PreferenceArguments
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
from minimind.data.rated import to_rated, tokenize_rated
from minimind.data.sources import expand
from minimind.tokenizer import tokenizer_hash

FORMAT_VERSION = 2  # part of the cache key: raise it when the same input results in other rows
# Options of the data that decide the rows
DECISIVE = ("eval_ratio", "max_eval_rows", "on_bad_rows", "text_unit", "columns", "unread_columns")
DECISIVE += ("clean_recipe",)
BATCH = 1000  # conversations tokenised at a time
EXPECTED = 'expected its turns without markers, each as {"role", "content"} in "messages"'
IDS = pa.list_(pa.int32())  # the type of a column, but for these:
TYPES = {"loss_weights": pa.list_(pa.float32()), "roles": pa.list_(pa.string())}
TYPES |= {"label": pa.bool_()}
PLACES = ["where", "lengths"]  # columns of the files beside those of the rows
TYPES |= {"where": pa.binary(), "lengths": pa.list_(pa.int64())}


class ChatRows(NamedTuple):
    """Rows for a trainer.

    `facts` are the files, rows and counts of both parts; `where` is the place ("file:line") of each
    training row, `lengths` its tokens before any cut (see `Outcome`).
    """

    train: Dataset
    eval: Dataset | None
    facts: dict
    where: list[str]
    lengths: list[list[int]]
    reading: Reading


class _Kind(NamedTuple):
    """How to read conversations, or pairs; `options` are those that decide what becomes of one."""

    options: dict
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
    decisive = {"rows": "conversations", "max_length": max_length, "roles": roles}
    kind = _Kind(
        {**decisive, **asdict(args or ChatArguments())},
        to_conversation,
        lambda conversations: tokenize_conversations(conversations, *options),
        lambda conversation: str(conversation.messages),
        lambda conversation: conversation.messages,
    )
    return _load(data_args, kind, tokenizer, seed)


def load_preferences(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    args: PreferenceArguments | None = None,
    seed: int = 42,
) -> ChatRows:
    """Return the rows of the preference pairs in the files of `data_args`; see
    `tokenize_preferences`.

    Raises:
        UserError: too many rows are bad, or none is left to train.
    """
    args = args or PreferenceArguments()
    encoder = ChatEncoder(tokenizer)
    kind = _Kind(
        {"rows": "preferences", **asdict(args)},
        to_preference,
        lambda pairs: tokenize_preferences(pairs, encoder, args),
        lambda pair: str(pair["prompt"]),
        lambda pair: pair["prompt"] + pair["chosen"] + pair["rejected"],
    )
    return _load(data_args, kind, tokenizer, seed)


def load_rated(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    args: ChatArguments | None = None,
    roles: bool = False,
    seed: int = 42,
) -> ChatRows:
    """Return the rows of the rated replies in the files of `data_args`; see `tokenize_rated`. The
    conversations with one prompt are trained or held out together.

    Raises:
        UserError: too many rows are bad, none is left to train, or an option is not for ratings.
    """
    args = args or ChatArguments()
    allowed = {"long_conversations": ("keep_last", "drop"), "train_turns": ("all",)}
    for name, choices in allowed.items():
        if (value := getattr(args, name)) not in choices:
            raise UserError(f"--{name} {value}: expected {' or '.join(choices)} for rated replies.")
    if args.needs_weights:
        raise UserError(
            "--weighted_loss and --loss_normalization: expected in finetune_sft.py only, not for"
            " rated replies."
        )
    encoder, args = ChatEncoder(tokenizer), replace(args, train_turns="last")
    options = encoder, max_length, args, roles
    kind = _Kind(
        {"rows": "rated", "max_length": max_length, "roles": roles, **asdict(args)},
        to_rated,
        lambda rows: tokenize_rated(rows, *options),
        lambda rated: str(rated[0].conversation.messages[:-1]),
        lambda rated: [message for each in rated for message in each.conversation.messages],
    )
    return _load(data_args, kind, tokenizer, seed)


def _load(data_args, kind: _Kind, tokenizer: PreTrainedTokenizerFast, seed: int) -> ChatRows:
    """The rows of `_prepare`, found by everything that decides them or prepared now, and mixed."""
    sources = parse_sources(data_args.train_files, data_args.mixing_temperature)
    files = [data_args.expand(source.paths) for source in sources]
    held_out_files = expand(data_args.eval_files) if data_args.eval_files else []
    everything = [path for paths in files for path in paths]
    contents = [Contents(paths) for paths in (everything, held_out_files)]
    template = str(tokenizer.chat_template)
    key = {
        "version": FORMAT_VERSION,
        "kind": kind.options,
        # Places of rows have names of files
        "files": [list(map(str, paths)) for paths in (*files, held_out_files)],
        "contents": [each.hash for each in contents],
        "tokenizer": tokenizer_hash(tokenizer),
        "special_tokens": {name: str(t) for name, t in tokenizer.special_tokens_map.items()},
        "template": template,
        "date": str(date.today()) if "strftime_now" in template else None,
        "options": {name: getattr(data_args, name) for name in DECISIVE},
    }
    fresh = False

    def build(directory: Path) -> dict:
        nonlocal fresh
        fresh = True
        facts = _prepare(directory, data_args, kind, files, held_out_files)
        for each in contents:
            each.check()
        return facts

    directory, prepared = find_or_build("chats", key, build)
    readings = [Reading.restored(each, data_args.reading) for each in prepared["readings"]]
    if not fresh:
        for each in readings:
            each.warn()

    # Join the sources as an epoch takes them
    facts = prepared["sources"]
    tables = [_open(directory / f"train-{index}.arrow") for index in range(len(files))]
    table = pa.concat_tables(tables)
    where, lengths = (table[name].to_pylist() for name in PLACES)
    where = list(map(os.fsdecode, where))
    train = Dataset(table.drop_columns(PLACES))
    counts, mixture = epoch_rows(data_args, sources, [fact["rows"] for fact in facts], seed)
    if mixture is not None:
        train = train.select(mixture)
        where, lengths = [where[i] for i in mixture], [lengths[i] for i in mixture]
    evaluation = None
    if prepared["eval"]["rows"]:
        evaluation = Dataset(_open(directory / "eval.arrow").drop_columns(PLACES))
    hashes = [contents[0].hash, contents[1].hash if held_out_files else None]
    train_facts = {"files": list(map(str, everything)), "hash": hashes[0], **add_counts(facts)}
    train_facts |= source_facts(sources, facts, counts)
    held_out_facts = {"files": list(map(str, held_out_files)), "hash": hashes[1]}
    all_facts = {"train": train_facts, "eval": held_out_facts | prepared["eval"]}
    return ChatRows(train, evaluation, all_facts, where, lengths, readings[0])


def _open(path: Path) -> pa.Table:
    """The rows of a file, mapped into memory; raises UserError."""
    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowException) as error:  # somebody empties the cache at this moment
        raise UserError(f"{path}: cannot be opened ({error}). Run the command again.") from error


def _prepare(directory: Path, data_args, kind: _Kind, files, held_out_files) -> dict:
    """Write the Arrow files of all parts into `directory`, and return their facts and readings."""
    # Read all sources; the rows to hold out are known only at the end
    parts = [_Collector(directory / f"train-{index}.arrow") for index in range(len(files))]
    held_out = _Collector(directory / "eval.arrow")
    hold_out = HoldOut(0.0 if held_out_files else data_args.eval_ratio, data_args.max_eval_rows)
    readings = [Reading(), Reading()]
    for part, paths in zip(parts, files, strict=True):
        for text, where, outcome in _read(paths, kind, data_args, readings[0]):
            for owner, *trained in hold_out.offer(text, (part, where, outcome)):
                owner.add(*trained)
    for _, where, outcome in hold_out.chosen():
        held_out.add(where, outcome)
        readings[0].held_out += [where] * len(outcome.rows)

    # Read held-out files to their end, since bad rows are judged there
    if held_out_files:
        rows = _read(held_out_files, kind, data_args, readings[1])
        for _, where, outcome in islice(rows, data_args.max_eval_rows):
            held_out.add(where, outcome)
            readings[0].held_out += [where] * len(outcome.rows)
        for _ in rows:
            pass
    facts = [part.finish() for part in parts]
    for part, paths in zip(parts, files, strict=True):
        if not part.count:
            raise UserError(
                f"{', '.join(map(str, paths))}: no row is left to train"
                f" ({part.counted() or 'all are held out'}). Raise the limit of length, lower"
                " --eval_ratio, give more rows, or choose another --train_turns."
            )
    states = [each.state() for each in readings]
    return {"sources": facts, "eval": held_out.finish(), "readings": states}


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
    """Writes rows into an Arrow file as they come, and counts what is in it."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = []
        self.count, self.counts = 0, Counter()
        self.writer: pa.ipc.RecordBatchStreamWriter | None = None

    def add(self, where: str, outcome: Outcome) -> None:
        places = dict(zip(PLACES, (os.fsencode(where), outcome.lengths), strict=True))
        self.rows += [row | places for row in outcome.rows]
        self.counts += outcome.counts
        self.count += len(outcome.rows)
        if len(self.rows) >= BATCH:
            self._flush()

    def counted(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())

    def finish(self) -> dict[str, int]:
        """Close the file, which exists if it has rows, and return the facts."""
        self._flush()
        if self.writer:
            self.writer.close()
            self.sink.close()
        return {"rows": self.count, "truncated": 0, **self.counts}

    def _flush(self) -> None:
        if not self.rows:
            return
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
        arrays = [pa.array(values, TYPES.get(name, IDS)) for name, values in columns.items()]
        table = pa.table(arrays, names=list(columns))
        if self.writer is None:
            self.sink = pa.OSFile(str(self.path), "wb")
            self.writer = pa.ipc.new_stream(self.sink, table.schema)
        self.writer.write_table(table)
        self.rows = []
