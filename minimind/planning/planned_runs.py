"""A recipe -> the model, the rows and the steps of the run it describes, without running it."""

import dataclasses
import random
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerFast
from trl import get_peft_config, pack_dataset

from minimind import MiniMindConfig
from minimind.common.cache import find
from minimind.common.errors import UserError
from minimind.common.options import option_names
from minimind.common.recipes import read_deepspeed, read_recipe
from minimind.data.chat_arguments import ChatArguments
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chat_rows import tokenize_conversations
from minimind.data.chats import load_conversations, load_preferences
from minimind.data.columns import Columns
from minimind.data.conversations import to_conversation
from minimind.data.documents import load_blocks, preparation
from minimind.data.files import BadRowError, read_rows, to_document, total_size
from minimind.data.mixing import parse_sources, rows_per_epoch
from minimind.data.packing import packer
from minimind.data.preference_rows import tokenize_preferences
from minimind.data.preferences import to_preference
from minimind.data.template_choice import set_chat_template
from minimind.stage_directory import check_kind, load_config
from minimind.tokenizer import load_tokenizer
from minimind.tokenizer.encoding import DocumentEncoder
from minimind.training.arguments import (
    DataArguments,
    DPOStageConfig,
    ModelArguments,
    PretrainConfig,
    PretrainModelArguments,
    SFTStageConfig,
    StageParser,
    parse_options,
)
from minimind.training.starting_point import check_length, new_model

COUNTED = 2**25  # bytes of data that are tokenised whole; of more, a sample
SAMPLE = 2**22
STAGES = {
    "pretrain": ("pretrain.py", (DataArguments, PretrainModelArguments, PretrainConfig)),
    "sft": ("finetune_sft.py", (DataArguments, ChatArguments, ModelArguments, SFTStageConfig)),
    "lora": ("finetune_sft.py", (DataArguments, ChatArguments, ModelArguments, SFTStageConfig)),
    "dpo": ("train_dpo.py", (DataArguments, ChatArguments, ModelArguments, DPOStageConfig)),
}


@dataclass(frozen=True)
class Rows:
    """The training rows of one epoch.

    `tokens` are those that are not padding. `padded` is the mean length of a row as the batches
    hold it, and `longest` that of the longest; of a preference pair, of its longer reply. `how`
    says whether all was counted.
    """

    rows: int
    tokens: int
    padded: float
    longest: int
    how: str
    exact: bool


@dataclass
class Recipe:
    """What a recipe and the options beside it say of one run.

    `others`: recipes that may write its parent. `tokens`: to be pretrained on in an epoch, in place
    of data.
    """

    path: Path
    stage: str
    words: list[str]
    others: list["Recipe"] = field(default_factory=list, repr=False)
    tokens: float | None = None

    @property
    def script(self) -> str:
        """The root script that runs it."""
        return STAGES[self.stage][0]

    @cached_property
    def options(self) -> Namespace:
        """Every option of the stage by its name."""
        return parse_options(*STAGES[self.stage][1], argv=self.words)

    @property
    def data_args(self) -> DataArguments:
        """The files it reads; without any, the embedded corpus."""
        names = [each.name for each in dataclasses.fields(DataArguments)]
        corpus = "lora" if self.adapter else "sft" if self.stage == "lora" else self.stage
        return self._made(DataArguments, names).or_embedded(corpus)

    @property
    def chat_args(self) -> ChatArguments | None:
        """How its conversations become rows; None where it reads documents."""
        names = [each.name for each in dataclasses.fields(ChatArguments)]
        return None if self.stage == "pretrain" else self._made(ChatArguments, names)

    def _made(self, kind: type, names: Sequence[str]):
        try:
            return kind(**{name: getattr(self.options, name) for name in names})
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error

    @property
    def adapter(self) -> PeftConfig | None:
        """The adapter it trains, or None."""
        if not getattr(self.options, "use_peft", False):
            return None
        names = [each.name for each in dataclasses.fields(ModelArguments) if each.init]
        return get_peft_config(self._made(ModelArguments, names))

    @property
    def parent(self) -> str | None:
        """The stage directory it starts from."""
        if self.stage == "pretrain" or self.options.model_name_or_path:
            return self.options.model_name_or_path
        default = "runs/sft" if self.adapter or self.stage == "dpo" else "runs/pretrain"
        return default if Path(default).exists() else None

    @property
    def length(self) -> int:
        """Tokens of the longest row it allows."""
        return self.options.block_size if self.stage == "pretrain" else self.options.max_length

    def starting_point(self) -> tuple[MiniMindConfig, PreTrainedTokenizerFast, list[str]]:
        """Configuration and tokenizer of the model it trains, and notes on what they were taken
        from.

        A parent that is still to be written is looked for among the recipes: the one with that
        `output_dir`.

        Raises:
            UserError: there is neither the parent nor a recipe that writes it, or the model's file
            is wrong.
        """
        parent = self.parent
        if parent and (Path(parent).is_dir() or not self.writer(parent)):
            config, tokenizer, notes = load_config(parent), load_tokenizer(parent), []
            check_kind(config, parent)
        elif parent:
            writer = self.writer(parent)
            config, tokenizer, notes = writer.starting_point()
            notes = [note for note in notes if "train_files" not in note]
            notes.append(f"{parent} is still to be written; its model is taken from {writer.path}")
        else:
            given = getattr(self.options, "tokenizer", None)
            exists = given is None or Path(given).exists()
            tokenizer = load_tokenizer(given if exists else None)
            notes = (
                []
                if exists
                else [f"{given} does not exist yet; tokens are those of the default tokenizer"]
            )
            with torch.device("meta"):
                file = getattr(self.options, "model_config", "configs/model/tiny.json")
                config = new_model(file, tokenizer).config
        if not self.options.train_files and not self.tokens:
            hint = "; --tokens 1e9 plans without data" if self.stage == "pretrain" else ""
            notes.append(f"{self.path} names no train_files: planned for the embedded corpus{hint}")
        check_length(
            "block_size" if self.stage == "pretrain" else "max_length", self.length, config
        )
        return config, tokenizer, notes

    def writer(self, directory: str) -> "Recipe | None":
        """The recipe that writes a stage directory: one of those given, or one in the folders
        beside this one's."""
        for other in self.others:
            if other is not self and Path(other.options.output_dir) == Path(directory):
                return other
        here = self.path.absolute()
        for file in sorted(here.parent.parent.glob("*/*.yaml")) if self.path.suffix else []:
            written = _keys(file).get("output_dir")
            if file != here and written and Path(written) == Path(directory):
                return Recipe(file, stage_of(file, []), ["--config", str(file)], self.others)
        return None

    def rows(self, tokenizer: PreTrainedTokenizerFast) -> Rows:
        """The rows it trains on: counted, or of large files estimated from a sample of each; raises
        UserError."""
        if self.tokens:
            return Rows(
                ceil(self.tokens / self.length),
                round(self.tokens),
                self.length,
                self.length,
                "as given",
                True,
            )
        data_args = self.data_args
        if self.stage == "pretrain":
            return count_blocks(data_args, tokenizer, self.options)
        return count_chats(
            data_args, self.chat_args, tokenizer, self.options, pairs=self.stage == "dpo"
        )


def read_recipes(
    paths: Sequence[str],
    overrides: Sequence[str],
    stage: str | None = None,
    tokens: float | None = None,
) -> list[Recipe]:
    """Recipes with the same options beside each; `tokens` are those of pretraining.

    Raises:
        UserError: a recipe that is not there or whose stage cannot be told, or an unknown option.
    """
    recipes: list[Recipe] = []
    for path in paths:
        words = ["--config", str(path), *overrides]
        recipes.append(Recipe(Path(path), stage or stage_of(Path(path), overrides), words))
    for recipe in recipes:
        recipe.others = recipes
        recipe.tokens = tokens if recipe.stage == "pretrain" else None
    if tokens is not None and (tokens < 1 or not any(recipe.tokens for recipe in recipes)):
        raise UserError(
            f"--tokens {tokens:g}: expected a number above 0, and a recipe of pretraining among"
            " those given."
        )
    return recipes


def stage_of(path: Path, overrides: Sequence[str]) -> str:
    """The stage of a recipe: by its folder, else by its keys, else by its data; raises
    UserError."""
    keys = set(_keys(path))
    given = {word.removeprefix("--").split("=")[0] for word in overrides if word.startswith("--")}
    uses_peft = "use_peft" in keys | given
    if path.parent.name in STAGES:
        return path.parent.name
    scripts = {
        stage: option_names(StageParser(types))
        for stage, (_, types) in STAGES.items()
        if stage != "lora"
    }
    fitting = [stage for stage, names in scripts.items() if keys | given <= names] or list(scripts)
    telling = {"pretrain": {"block_size", "model_config"}, "dpo": {"beta"}}
    fitting = [stage for stage in fitting if keys & telling.get(stage, set())] or fitting
    if len(fitting) > 1 and (files := _keys(path).get("train_files")):
        columns = Columns(_keys(path).get("columns"))
        fitting = [_stage_of_data(files if isinstance(files, list) else [files], columns)]
    if len(fitting) > 1:
        raise UserError(
            f"{path} could be a recipe of {' or '.join(fitting)}. Say which with --stage"
            f" {'|'.join(STAGES)}, or put it into a folder of that name."
        )
    return "lora" if fitting[0] == "sft" and uses_peft else fitting[0]


def _keys(path: Path) -> dict:
    """A recipe's mapping; a file that is none is refused where it is parsed."""
    recipe = read_recipe(path)
    return recipe if isinstance(recipe, dict) else {}


def _stage_of_data(files: list[str], columns: Columns) -> str:
    row = next(iter(read_rows(files, "skip"))).data
    for stage, convert in {
        "dpo": to_preference,
        "sft": to_conversation,
        "pretrain": to_document,
    }.items():
        try:
            convert(columns.fields(row))
        except BadRowError:
            continue
        return stage
    raise UserError(
        f"{files[0]}: the first row is neither a pair, a conversation nor a document. Give --stage."
    )


def count_blocks(
    data_args: DataArguments, tokenizer: PreTrainedTokenizerFast, options: Namespace
) -> Rows:
    """The packed rows of documents."""
    names = ("block_size", "packing_strategy", "document_mask")
    packing = {name: getattr(options, name) for name in names}
    place = preparation(data_args, tokenizer, **packing)
    size, limit = total_size([path for paths in place.files for path in paths]), options.block_size
    prepared = find("blocks", place.key) is not None
    if prepared or size <= COUNTED:
        facts = load_blocks(data_args, tokenizer, **packing, seed=options.seed).facts["train"]
        rows = facts.get("rows_per_epoch", facts["blocks"])
        used = facts["blocks"] * limit - facts["padding"]
        how = "counted" if not prepared else "counted, as prepared"
        return Rows(rows, round(used * rows / facts["blocks"]), limit, limit, how, True)
    encoder = DocumentEncoder(tokenizer)
    rows, tokens = [], []
    for paths in place.files:
        documents, scale = sample(paths, to_document, data_args, size)
        ids = encoder(documents)
        packing = packer(options.packing_strategy, limit, tokenizer.eos_token_id)
        first = packing.add(ids)
        filled = len(ids) / limit if options.packing_strategy == "wrapped" else len(first.lengths)
        filled += len(packing.finish().lengths)
        held_out = (
            0
            if data_args.eval_files
            else min(data_args.eval_ratio, data_args.max_eval_rows / len(documents) / scale)
        )
        rows.append(filled * scale * (1 - held_out))
        tokens.append(len(ids) * scale * (1 - held_out))
    wanted = rows_per_epoch(
        place.sources, rows, data_args.mixing_temperature, data_args.mixing_stop
    )
    total = sum(count * want / have for count, want, have in zip(tokens, wanted, rows, strict=True))
    return Rows(round(sum(wanted)), round(total), limit, limit, _sampled(size), False)


def count_chats(
    data_args: DataArguments,
    chat_args: ChatArguments,
    tokenizer: PreTrainedTokenizerFast,
    options: Namespace,
    pairs: bool,
) -> Rows:
    """The rows of conversations, packed as the trainer packs them, or of preference pairs.

    The tokens of a pair are those of both its sequences, the prompt twice, as it is computed.
    """
    set_chat_template(tokenizer, chat_args.chat_template)
    limit = options.max_length
    sources = parse_sources(data_args.train_files, data_args.mixing_temperature)
    files = [data_args.expand(source.paths) for source in sources]
    size = total_size([path for paths in files for path in paths])
    if size <= COUNTED:
        load = load_preferences if pairs else load_conversations
        lengths = sequence_lengths(
            load(data_args, tokenizer, limit, chat_args, seed=options.seed).train[:], pairs
        )
        scale, tokens, how = 1.0, sum(map(sum, lengths)), "counted"
    else:
        encoder, how = ChatEncoder(tokenizer), _sampled(size)
        lengths, tokens, parts = [], 0.0, []
        tokenize, parse = (
            (tokenize_preferences, to_preference)
            if pairs
            else (tokenize_conversations, to_conversation)
        )
        for paths in files:
            read, factor = sample(paths, parse, data_args, size)
            results = [
                r
                for r in tokenize(read, encoder, limit, chat_args)
                if not isinstance(r, BadRowError)
            ]
            found = [row for result in results for row in result.rows]
            parts.append(
                (
                    sequence_lengths(
                        {name: [row[name] for row in found] for name in found[0]}, pairs
                    ),
                    factor,
                )
            )
        have = [len(part) * factor for part, factor in parts]
        wanted = rows_per_epoch(sources, have, data_args.mixing_temperature, data_args.mixing_stop)
        held_out = (
            0
            if data_args.eval_files
            else min(data_args.eval_ratio, data_args.max_eval_rows / sum(have))
        )
        lengths = [length for part, _ in parts for length in part]
        mean = [fmean(map(sum, part)) for part, _ in parts]
        tokens = sum(want * each for want, each in zip(wanted, mean, strict=True)) * (1 - held_out)
        scale = sum(wanted) / len(lengths) * (1 - held_out)
    longest = [max(each) for each in lengths]
    if not pairs and options.packing:
        blank = Dataset.from_dict({"input_ids": [[0] * length for length in longest]})
        longest = [
            len(row) for row in pack_dataset(blank, limit, "bfd", {"batch_size": None})["input_ids"]
        ]
    padded = padded_length(longest, options.per_device_train_batch_size)
    return Rows(
        round(len(longest) * scale), round(tokens), padded, max(longest), how, size <= COUNTED
    )


def sequence_lengths(columns: dict[str, list], pairs: bool) -> list[tuple[int, ...]]:
    """Tokens of the sequences of each row: one, or a pair's two."""
    if not pairs:
        return [(len(ids),) for ids in columns["input_ids"]]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        (len(prompt) + len(chosen), len(prompt) + len(rejected))
        for prompt, chosen, rejected in zip(*(columns[name] for name in names), strict=True)
    ]


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


def deepspeed_of(options: Namespace) -> tuple[int | None, bool, bool]:
    """The ZeRO stage of `--deepspeed` (None without it), and whether optimizer and weights are
    offloaded.

    Raises:
        UserError: it cannot be read.
    """
    if not options.deepspeed:
        return None, False, False
    zero = read_deepspeed(options.deepspeed).get("zero_optimization") or {}

    def offloaded(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    return zero.get("stage", 0), offloaded("offload_optimizer"), offloaded("offload_param")
