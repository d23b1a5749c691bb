"""The rows of one epoch of a stage: counted, or of large files estimated from a sample."""

import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset

from minimind.common.cache import find
from minimind.common.errors import BadRowError
from minimind.data.chat_arguments import TemplateArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.conversations import to_conversation
from minimind.data.documents import preparation
from minimind.data.files import read_rows, to_document
from minimind.data.mixing import parse_sources, rows_per_epoch
from minimind.data.packing import packer
from minimind.data.preference_rows import tokenize_preferences
from minimind.data.preferences import to_preference
from minimind.data.rated import to_rated, tokenize_rated
from minimind.data.row_lengths import RowLength, row_lengths, shares
from minimind.data.sources import total_size
from minimind.data.template_choice import set_chat_template
from minimind.stages import StageSpec, load_rows
from minimind.tokenizer.encoding import DocumentEncoder
from minimind.training.data_arguments import DataArguments

COUNTED = 2**25  # bytes of data that are tokenised completely; of more, a sample
SAMPLE = 2**22


@dataclass(frozen=True)
class RowCounts:
    """The training rows of one epoch.

    tokens: without padding; of a preference pair those of both sequences, the prompt twice.
    padded: the mean length of a row in its batch; of a preference pair, of its longer sequence, or
        of all of it with the prompt once.
    longest: the length of the longest row.
    how: how they were counted; `exact` if all of them were.
    """

    rows: int
    tokens: int
    padded: float
    longest: int
    how: str
    exact: bool
    predicting: float = 1.0  # see Step
    counted: float = 1.0


def count_rows(
    spec: StageSpec,
    data_args: DataArguments,
    chat_args: TemplateArguments | None,
    tokenizer: PreTrainedTokenizerFast,
    options: Namespace,
) -> RowCounts:
    """Count the rows of a stage, which needs its options alone; raises UserError."""
    if spec.reads_documents:
        return _count_blocks(spec, data_args, tokenizer, options)
    return _count_chats(spec, data_args, chat_args, tokenizer, options)


def _count_blocks(spec, data_args, tokenizer, options) -> RowCounts:
    block_size = options.block_size
    names = ("block_size", "packing_strategy", "document_mask")
    place = preparation(data_args, tokenizer, **{name: getattr(options, name) for name in names})
    size = total_size([path for paths in place.files for path in paths])
    prepared = find("blocks", place.key) is not None
    if prepared or size <= COUNTED:
        facts = load_rows(spec, data_args, tokenizer, options).facts["train"]
        rows = facts.get("rows_per_epoch", facts["blocks"])
        tokens = (facts["blocks"] * block_size - facts["padding"]) * rows / facts["blocks"]
        how = "counted, as prepared" if prepared else "counted"
        return RowCounts(rows, round(tokens), block_size, block_size, how, True)

    encoder = DocumentEncoder(tokenizer)
    rows, tokens = [], []
    for paths in place.files:
        documents, scale = sample(paths, to_document, data_args, size)
        ids = encoder(documents)
        packing = packer(options.packing_strategy, block_size, tokenizer.eos_token_id)
        full = packing.add(ids)
        blocks = (
            len(ids) / block_size if options.packing_strategy == "wrapped" else len(full.lengths)
        )
        blocks += len(packing.finish().lengths)
        share = scale * (1 - held_out_share(data_args, len(documents) * scale))
        rows.append(blocks * share)
        tokens.append(len(ids) * share)

    mixed = rows_per_epoch(place.sources, rows, data_args.mixing_temperature, data_args.mixing_stop)
    total = sum(
        count * share / have for count, share, have in zip(tokens, mixed, rows, strict=True)
    )
    return RowCounts(
        round(sum(mixed)), round(total), block_size, block_size, _sampled(size), exact=False
    )


def _count_chats(spec, data_args, chat_args, tokenizer, options) -> RowCounts:
    sources = parse_sources(data_args.train_files, data_args.mixing_temperature)
    files = [data_args.expand(source.paths) for source in sources]
    size = total_size([path for paths in files for path in paths])
    exact = size <= COUNTED
    if exact:
        train = load_rows(spec, data_args, tokenizer, options, chat_args).train
        lengths = row_lengths(train[:], spec.pairs, spec.shared_prompts)
        scale, tokens = 1.0, sum(row.tokens for row in lengths)
    else:
        set_chat_template(tokenizer, chat_args.chat_template)
        samples = [
            _sample_chats(spec, paths, data_args, chat_args, tokenizer, options, size)
            for paths in files
        ]
        rows = [len(part) * factor for part, factor in samples]
        mixed = rows_per_epoch(sources, rows, data_args.mixing_temperature, data_args.mixing_stop)
        trained = 1 - held_out_share(data_args, sum(rows))
        means = [fmean(row.tokens for row in part) for part, _ in samples]
        tokens = sum(count * mean for count, mean in zip(mixed, means, strict=True)) * trained
        lengths = [length for part, _ in samples for length in part]
        scale = sum(mixed) / len(lengths) * trained

    if not spec.pairs and getattr(options, "packing", False):
        blank = Dataset.from_dict({"input_ids": [[0] * row.length for row in lengths]})
        packed = pack_dataset(blank, options.max_length, "bfd", {"batch_size": None})
        lengths = row_lengths(packed[:], False, False)
    how = "counted" if exact else _sampled(size)
    return chat_counts(spec, lengths, scale, tokens, how, exact, options)


def _sample_chats(
    spec, paths, data_args, chat_args, tokenizer, options, size: int
) -> tuple[list[RowLength], float]:
    """The lengths of the rows of a sample, and how many times more rows there are."""
    encoder = ChatEncoder(tokenizer)
    if spec.pairs:
        parsed, factor = sample(paths, to_preference, data_args, size)
        results = tokenize_preferences(parsed, encoder, chat_args)
    else:
        parse, tokenize = (to_conversation, tokenize_conversations)
        if spec.family == "kto":
            parse, tokenize = to_rated, tokenize_rated
        parsed, factor = sample(paths, parse, data_args, size)
        results = tokenize(parsed, encoder, options.max_length, chat_args)
    rows = [row for each in results if not isinstance(each, BadRowError) for row in each.rows]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return row_lengths(columns, spec.pairs, spec.shared_prompts), factor


def held_out_share(data_args: DataArguments, rows: float) -> float:
    """The share of so many rows that is held out of training."""
    return 0 if data_args.eval_files else min(data_args.eval_ratio, data_args.max_eval_rows / rows)


def chat_counts(
    spec: StageSpec,
    lengths: Sequence[RowLength],
    scale: float,
    tokens: float,
    how: str,
    exact: bool,
    options,
) -> RowCounts:
    """The counts of rows that stand for `scale` times as many; `options` has the batch size."""
    longest = [row.length for row in lengths]
    more: dict[str, float] = {}
    if spec.shared_prompts:  # without padding
        padded, more = fmean(longest), shares(lengths)
    else:
        padded = padded_length(longest, options.per_device_train_batch_size)
    rows = round(len(longest) * scale)
    return RowCounts(rows, round(tokens), padded, max(longest), how, exact, **more)


def padded_length(lengths: Sequence[int], batch_size: int) -> float:
    """The mean length of rows in shuffled batches, each padded to its longest row."""
    shuffled = random.Random(0).sample(list(lengths), len(lengths))
    return fmean(
        max(shuffled[start : start + batch_size]) for start in range(0, len(shuffled), batch_size)
    )


def sample(
    files: Sequence, convert: Callable, data_args: DataArguments, total: int
) -> tuple[list, float]:
    """Rows from the beginning of every file, SAMPLE bytes in all, and how many times more there
    are."""
    rows: list = []
    taken = 0
    for file in files:
        begun, marks, seen = len(rows), [], 0

        def reached(count: int, marks=marks) -> None:
            nonlocal seen
            marks.append((seen, len(rows)))  # the rows so far lie in the bytes before this call
            seen += count

        budget = SAMPLE * total_size([file]) / total
        for row in read_rows(
            [file], "skip", convert, data_args.text_unit, reached, data_args.reading()
        ):
            rows.append(row.data)
            if marks and marks[-1][0] >= budget and marks[-1][1] > begun:
                taken += marks[-1][0]
                del rows[marks[-1][1] :]
                break
        else:
            taken += total_size([file])
    return rows, total / taken


def _sampled(size: int) -> str:
    return f"estimated from {SAMPLE / 2**20:.0f} of {size / 2**20:,.0f} MiB"
