"""Conversations and preference pairs -> token ids with a loss mask.

The mask is the template's: what stands between its generation tags (all that the assistant emits,
the end token included) is trained, nothing else. Only what the template itself writes becomes a
control token; the same characters in somebody's words are plain text.

    load_conversations, load_preferences     files -> rows for a trainer
    tokenize_conversation(s)                 -> {"input_ids", "labels"} and, if asked for, "roles" and "loss_weights"
    ChatEncoder                              -> ids, and where in them the assistant speaks; also prompts to answer
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from minimind.common.cache import Contents
from minimind.common.errors import UserError
from minimind.common.language import translated
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import Tokenized, tokenize_conversations
from minimind.data.chat_summary import Reading
from minimind.data.conversations import to_conversation
from minimind.data.files import BadRowError, BadRows, expand, read_rows
from minimind.data.held_out import HoldOut
from minimind.data.markers import rendered_turn
from minimind.data.messages import Message
from minimind.data.mixing import mixture, parse_sources, rows_per_epoch
from minimind.data.preference_rows import tokenize_preferences
from minimind.data.preferences import to_preference
from minimind.data.rows import batches

BATCH = 1000  # conversations tokenised at a time
EXPECTED = 'expected its turns without markers, each as {"role", "content"} in "messages"'


class ChatRows(NamedTuple):
    """Rows for a trainer; `facts`: files, rows and what became of the conversations, of both parts.

    `where` names the place ("file:line") of each training row, `lengths` its conversation's tokens
    before any cut.
    """

    train: Dataset
    eval: Dataset | None
    facts: dict
    where: list[str]
    lengths: list[int]
    reading: Reading


# What of a conversation is trained, and in which rows


# Preference pairs


# Files


class _Unjudged(BadRows):
    """Bad rows of a reading whose rows may turn out bad later, when they are tokenised: `judge`
    comes after that."""

    total = 0

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
    """Conversations in the files of `data_args` -> rows with input_ids, labels and, if needed,
    loss_weights and roles.

    Raises:
        UserError: bad rows, or none is left to train.
    """
    encoder = ChatEncoder(tokenizer)
    return _load(
        data_args,
        seed,
        to_conversation,
        lambda conversations: tokenize_conversations(
            conversations, encoder, max_length, args, roles
        ),
        lambda conversation: str(conversation.messages),
        lambda conversation: conversation.messages,
    )


def load_preferences(
    data_args,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    args: ChatArguments | None = None,
    seed: int = 42,
) -> ChatRows:
    """Preference pairs in the files of `data_args` -> the rows of `tokenize_preferences`; raises
    UserError."""
    args = args or ChatArguments()
    for name, choices in {
        "long_conversations": ("keep_last", "drop"),
        "train_turns": ("all",),
    }.items():
        if (given := getattr(args, name)) not in choices:
            raise UserError(
                f"--{name} {given}: expected {' or '.join(choices)} for preference pairs."
            )
    if args.needs_weights:
        raise UserError(
            "--weighted_loss and --loss_normalization: expected in finetune_sft.py only, not for"
            " pairs."
        )
    encoder = ChatEncoder(tokenizer)
    return _load(
        data_args,
        seed,
        to_preference,
        lambda pairs: tokenize_preferences(pairs, encoder, max_length, args),
        lambda pair: str(pair["prompt"]),
        lambda pair: pair["prompt"] + pair["chosen"] + pair["rejected"],
    )


def _load(
    data_args,
    seed: int,
    parse: Callable,
    tokenize: Callable,
    key: Callable,
    messages: Callable[[Any], list[Message]],
) -> ChatRows:
    def unrendered(data: dict) -> Any:
        try:
            return parse(data)
        except BadRowError:
            if marker := rendered_turn(value for value in data.values() if isinstance(value, str)):
                raise BadRowError(
                    f"found a chat that is rendered already, with {marker!r}, {EXPECTED}"
                ) from None
            raise

    def read(files, reading: Reading) -> Iterator[tuple[str, str, Tokenized]]:
        bad, too_long = _Unjudged(data_args.on_bad_rows), BadRows("skip")
        columns = data_args.reading()
        reading.bad.append(bad)
        reading.columns.append(columns)
        reading.too_long.append(too_long)
        found = read_rows(files, bad, unrendered, columns=columns)
        rows = tqdm(found, unit=" rows", desc=translated("tokenising"), disable=None)
        for batch in batches(
            rows, lambda row: sum(len(m["content"]) for m in messages(row.data)), BATCH
        ):
            for row, result in zip(batch, tokenize([row.data for row in batch]), strict=True):
                if isinstance(result, BadRowError):
                    bad.add(row.where, str(result))
                    continue
                if result.problem:
                    too_long.add(row.where, result.problem)
                reading.add(row.where, result, messages(row.data))
                yield key(row.data), row.where, result
        bad.judge()
        too_long.warn(bad.total)

    temperature, stopping = data_args.mixing_temperature, data_args.mixing_stop
    sources = parse_sources(data_args.train_files, temperature)
    files = [data_args.expand(source.paths) for source in sources]
    held_out_files = expand(data_args.eval_files) if data_args.eval_files else []
    hold_out = HoldOut(0.0 if held_out_files else data_args.eval_ratio, data_args.max_eval_rows)
    parts, held_out = [_Collected() for _ in sources], _Collected()
    everything = [path for paths in files for path in paths]
    contents, held_out_contents = Contents(everything), Contents(held_out_files)
    reading, apart = Reading(), Reading()
    for part, paths in zip(parts, files, strict=True):
        for text, where, result in read(paths, reading):
            for owner, *certain in hold_out.offer(text, (part, where, result)):
                owner.add(*certain)
    for _, where, result in hold_out.chosen():
        held_out.add(where, result)
    for number, (_, where, result) in enumerate(
        read(held_out_files, apart) if held_out_files else ()
    ):
        if number < data_args.max_eval_rows:  # and read on, since bad rows are judged at the end
            held_out.add(where, result)
    contents.check()
    held_out_contents.check()
    for part, paths in zip(parts, files, strict=True):
        if not part.where:
            raise UserError(
                f"{', '.join(map(str, paths))}: no row is left to train"
                f" ({part.counted() or 'all are held out'}). Raise --max_length, lower"
                " --eval_ratio, give more rows, or choose another --train_turns."
            )
    counted = [part.facts() for part in parts]
    train = concatenate_datasets([part.dataset() for part in parts])
    where, lengths = (
        [each for part in parts for each in getattr(part, name)] for name in ("where", "lengths")
    )
    sizes = [len(part.where) for part in parts]
    wanted = rows_per_epoch(sources, sizes, temperature, stopping)
    if wanted != sizes:
        chosen = mixture(sizes, wanted, seed)
        train, where, lengths = (
            train.select(chosen),
            [where[i] for i in chosen],
            [lengths[i] for i in chosen],
        )
    facts = {
        "train": {
            "files": list(map(str, everything)),
            "hash": contents.hash,
            **{
                name: sum(each.get(name, 0) for each in counted)
                for name in {n: None for each in counted for n in each}
            },
        },
        "eval": {
            "files": list(map(str, held_out_files)),
            "hash": held_out_contents.hash if held_out_files else None,
            **held_out.facts(),
        },
    }
    if len(sources) > 1:
        facts["train"]["rows_per_epoch"] = sum(wanted)
        facts["train"]["sources"] = [
            {"files": source.paths, **each, "rows_per_epoch": want}
            for source, each, want in zip(sources, counted, wanted, strict=True)
        ]
    reading.held_out = held_out.where
    return ChatRows(train, held_out.dataset(), facts, where, lengths, reading)


class _Collected:
    """Collects rows as Arrow tables, a list of Python integers taking many times the memory."""

    types = {"loss_weights": pa.list_(pa.float32()), "roles": pa.list_(pa.string())}  # noqa: RUF012

    def __init__(self):
        self.rows: list[dict] = []
        self.tables: list[pa.Table] = []
        self.where: list[str] = []
        self.lengths: list[int] = []
        self.counts = Counter()

    def add(self, where: str, result: Tokenized) -> None:
        self.rows += result.rows
        self.where += [where] * len(result.rows)
        self.lengths += [result.length] * len(result.rows)
        self.counts += result.counts
        if len(self.rows) >= BATCH:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            kind = {name: self.types.get(name, pa.list_(pa.int32())) for name in columns}
            self.tables.append(
                pa.table({name: pa.array(values, kind[name]) for name, values in columns.items()})
            )
            self.rows = []

    def counted(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())

    def facts(self) -> dict[str, int]:
        return {"rows": len(self.where), "truncated": 0, **self.counts}

    def dataset(self) -> Dataset | None:
        self.flush()
        return Dataset(pa.concat_tables(self.tables)) if self.tables else None
