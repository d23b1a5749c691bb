"""What files are for, and the inspection of documents beside the blocks made from them."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.chat_summary import Reading
from minimind.data.columns import Columns, Fields
from minimind.data.conversations import to_conversation
from minimind.data.documents import Blocks
from minimind.data.files import read_rows, to_document
from minimind.data.mixing import parse_sources
from minimind.data.preferences import to_preference
from minimind.data.rated import Rated, is_rating, to_rated
from minimind.inspection.documents import inspect_documents
from minimind.inspection.findings import Findings
from minimind.inspection.inspection import Inspection
from minimind.inspection.row_checks import check_left_out
from minimind.inspection.texts import DocumentTexts

RECOGNISED = 20  # rows that are tried to recognise a stage


def recognise_stage(words: Sequence[str], columns: Columns | None = None) -> str:
    """The stage that the first usable row of some files is for: "dpo", "kto", "sft" or "pretrain";
    raises UserError."""
    columns = columns or Columns()
    converters = {"dpo": to_preference, "kto": to_labelled, "sft": to_conversation}
    converters["pretrain"] = to_document
    problems: dict[str, str] = {}
    for row in islice(read_rows(data_paths(words), "skip"), RECOGNISED):
        for stage, convert in converters.items():
            try:
                convert(columns.fields(row.data))
            except BadRowError as problem:
                problems.setdefault(stage, f"{row.where}: {problem}")
            else:
                return stage
    lines = "\n".join(f"  as {stage}: {problem}" for stage, problem in problems.items())
    raise UserError(
        f"the stage cannot be told from the first {RECOGNISED} rows:\n{lines}\nFix them, or name"
        " the --stage."
    )


def to_labelled(data: Mapping) -> list[Rated]:
    """`to_rated` of a row with a column that only ratings have; raises BadRowError."""
    if not is_rating(Fields.of(data)):
        raise BadRowError(f"found keys {Fields.of(data).names}, expected a rating in 'label'")
    return to_rated(data)


def data_paths(words: Sequence[str]) -> list[str]:
    """Words of `--train_files` -> the paths in them."""
    return [path for source in parse_sources(words) for path in source.paths]


def inspect_blocks(
    blocks: Blocks, tokenizer: PreTrainedTokenizerFast, data_args: Any
) -> Inspection:
    """Inspect the rows of `load_blocks` and, read once more, the files they were made from; their
    bad rows become findings."""

    def read(paths: Sequence[str]) -> DocumentTexts:
        return DocumentTexts(paths, tokenizer, data_args.boundary_markers, data_args.reading())

    texts = read(data_paths(data_args.train_files))
    held_out = read(data_args.eval_files) if data_args.eval_files else None
    findings, reading = Findings(), Reading()
    reading.bad.append(texts.bad)
    reading.columns.append(texts.columns)
    check_left_out(findings, reading, data_args.on_bad_rows)
    facts = blocks.facts["train"]
    return inspect_documents(blocks.train, facts, texts, tokenizer, held_out, findings)
