"""What a model card says of a model: its sizes, its stages back to the data, what limits it."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from safetensors import safe_open

from minimind.common.files import read_json
from minimind.common.streams import printable
from minimind.costs.units import duration
from minimind.data.hub import PREFIX
from minimind.generation import is_base_model
from minimind.stage_directory import (
    holds_reward_model,
    is_adapter,
    load_config,
    stage_records,
)
from minimind.stage_directory.contents import base_of, shards_of
from minimind.stage_directory.lineage import StageRecord
from minimind.tokenizer import load_tokenizer

LEAST_SHARE = 0.02  # of the training rows in a language that a card names
# What decides a run beside its data, in the order of the card
RECIPE = ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
RECIPE += ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
RECIPE += (
    "max_steps",
    "time_budget",
    "block_size",
    "packing_strategy",
    "max_length",
    "max_prompt_length",
)
RECIPE += ("max_completion_length", "loss_type", "beta", "bf16", "fp16")
PEFT = ("peft_type", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
LENGTHS = ("block_size", "max_length", "max_prompt_length", "max_completion_length")
TITLES = {
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "lora": "supervised fine-tuning of an adapter",
    "dpo": "preference optimisation",
    "kto": "preference optimisation (KTO)",
    "reward": "training of a reward model",
    "merge": "an adapter merged into its base",
    "import": "import of a published checkpoint",
}


class Lesson(NamedTuple):
    """One stage, as a card lists it."""

    title: str
    facts: list[tuple[str, str]]  # name and value
    problem: str | None


class Facts(NamedTuple):
    """What a card says of a model; its fields are the names in the template."""

    kind: str  # "chat", "base" or "reward"
    title: str
    is_adapter: bool
    layout: str  # that of the files: minimind, a stock one, gguf or web
    record: dict  # of the stage itself
    sizes: list[tuple[str, str]]
    parameters: int
    window: int
    longest: int | None  # tokens of the longest row in training
    languages: list[str]
    datasets: list[str]  # of the Hub
    lessons: list[Lesson]  # the first stage first
    warnings: list[str]
    libraries: dict[str, str]


def describe(source: Path, export: dict) -> Facts:
    """What there is to say of the model in a stage directory; `export` is the record of an export
    of it, or empty."""
    config, tokenizer, stages = (
        load_config(source),
        load_tokenizer(source),
        [*stage_records(source)],
    )
    record = stages[0].record
    reward = holds_reward_model(source)
    kind = "reward" if reward else "base" if is_base_model(source, tokenizer) else "chat"

    # Sizes
    tensors = tensor_sizes(base_of(source), "model.safetensors")
    parameters = sum(tensors.values())
    sizes = [("parameters", f"{parameters:,}")]
    if routed := sum(size for name, size in tensors.items() if ".experts." in name):
        used, experts = config.num_experts_per_tok, config.num_experts
        active = round(parameters - routed * (1 - used / experts))
        sizes.append(("of these active", f"{active:,} ({used} of {experts} experts a token)"))
    sizes.append(("of these embedding", f"{config.vocab_size * config.hidden_size:,}"))
    if adapter := is_adapter(source):
        weights = sum(tensor_sizes(source, "adapter_model.safetensors").values())
        sizes.append(("of the adapter", f"{weights:,}"))
    sizes += [
        ("layers", f"{config.num_hidden_layers}, of width {config.hidden_size:,}"),
        ("attention", f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("weights", export.get("dtype") or str(config.dtype or "float32").removeprefix("torch.")),
    ]

    # Stages and data
    recipes = [recipe_of(stage) for stage in stages]
    files = [name for stage in stages for name in training_files(stage.record)]
    hub = [name.removeprefix(PREFIX) for name in files if name.startswith(PREFIX)]
    lengths = [longest_row(recipe) for recipe in recipes]
    size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    words = {"chat": "chat model", "base": "base model", "reward": "reward model"}
    return Facts(
        kind=kind,
        title=f"MiniMind {size}: {words[kind]}"
        + (" (an adapter)" if adapter and not export else ""),
        is_adapter=adapter and not export,
        layout=export.get("format", "minimind"),
        record=record,
        sizes=sizes,
        parameters=parameters,
        window=config.max_position_embeddings,
        longest=max(filter(None, lengths), default=None),
        languages=languages_of(stages),
        datasets=list(dict.fromkeys(name.partition("@")[0].partition(":")[0] for name in hub)),
        lessons=[lesson(*each) for each in zip(stages, recipes, strict=True)][::-1],
        warnings=[
            finding["text"]
            for finding in record.get("reading") or ()
            if finding.get("severity") != "info"
        ],
        libraries=record.get("libraries") or export.get("libraries") or {},
    )


def tensor_sizes(directory: Path, name: str) -> dict[str, int]:
    """The number of weights of each tensor in the safetensors file `name`, or in its shards.

    The files tell it without the model: under ZeRO-3 all processes would have to build that.
    """
    files = [directory / name]
    if not files[0].exists():
        files = [directory / shard for shard in shards_of(directory, name)]
    sizes = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                sizes[key] = math.prod(tensors.get_slice(key).get_shape())
    return sizes


def recipe_of(stage: StageRecord) -> dict:
    """The values that decided a stage: of its run.json, which has all, and of its stage.json, where
    those are that differ from the library's."""
    file, recipe = stage.directory / "run.json", {}
    if not stage.problem and file.exists():
        recipe = read_json(file, "A card can do without it: delete it.").get("recipe") or {}
    return recipe | (stage.record.get("options") or {})


def longest_row(recipe: dict) -> int | None:
    """The tokens of the longest row that a stage trains on, None if unknown."""
    return sum(recipe.get(name) or 0 for name in LENGTHS) or None


def training_files(record: dict) -> list[str]:
    """The training files in the record of a stage."""
    train = (record.get("data") or {}).get("train")
    files = train.get("files") if isinstance(train, dict) else None
    return [str(name) for name in files or ()]


def languages_of(stages: Iterable[StageRecord]) -> list[str]:
    """The languages of the training rows of all stages, as ISO 639-1 has them."""
    shares = [stage.record.get("languages") or {} for stage in stages]
    found = {name for each in shares for name, share in each.items() if share >= LEAST_SHARE}
    return sorted(found - {"other"})


def public_name(file: str) -> str:
    """The name of a data file without the directories of this machine, as code in Markdown can hold
    it; a dataset of the Hub as it is."""
    name = file if file.startswith(PREFIX) else PurePosixPath(file.replace("\\", "/")).name
    return name.replace("`", "'")


def lesson(stage: StageRecord, recipe: dict) -> Lesson:
    """A stage with what it read and how it trained."""
    record = stage.record
    title = TITLES.get(record.get("stage") or "", record.get("stage") or "a checkpoint")
    facts = []
    if record.get("stage") == "import":
        facts.append(("from", public_name(str(record.get("source")))))
    for part, name in (("train", "data"), ("eval", "held out")):
        if isinstance(found := (record.get("data") or {}).get(part), dict):
            facts.append((name, part_of_data(found, part)))
    if shares := record.get("languages"):
        facts.append(
            ("languages", ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        )
    if record.get("tokens_seen"):
        facts.append(("tokens seen", f"{record['tokens_seen']:,} in {record['steps']:,} steps"))
    if values := list(recipe_values(recipe)):
        facts.append(("recipe", ", ".join(f"`{name}: {value}`" for name, value in values)))
    if "seed" in record:
        facts.append(("seed", str(record["seed"])))
    if trained := training_of(record, recipe):
        facts.append(("training", trained))
    if record.get("weights"):
        facts.append(("weights", f"xxh3 `{record['weights']}`"))
    return Lesson(title, [(name, one_line(value)) for name, value in facts], stage.problem)


def part_of_data(facts: dict, part: str) -> str:
    """Files, counts and hash of the training or held-out rows."""
    names = ", ".join(f"`{public_name(file)}`" for file in map(str, facts.get("files") or ()))
    counts = [
        f"{value:,} {key.replace('_', ' ')}"
        for key, value in facts.items()
        if isinstance(value, int) and value
    ]
    words = [names or ("" if part == "train" else "rows of the training files"), *counts]
    words.append(f"xxh3 `{facts['hash']}`" if facts.get("hash") else "")
    return ", ".join(filter(None, words))


def recipe_values(recipe: dict) -> Iterator[tuple[str, str]]:
    """The values of a recipe that a card shows."""
    unused = "num_train_epochs" if (recipe.get("max_steps") or 0) > 0 else "max_steps"
    for name in (*RECIPE, *(PEFT if recipe.get("use_peft") else ())):
        value = recipe.get(name)
        if value not in (None, False) and name != unused:
            yield name, value if isinstance(value, str) else json.dumps(value)


def training_of(record: dict, recipe: dict) -> str:
    """Where a stage was trained and for how long."""
    machine = record.get("hardware") or {}
    device = machine.get("device") or recipe.get("device")
    processes = machine.get("processes") or recipe.get("processes") or 1
    parts = [f"{processes} x {device}" if processes > 1 else device] if device else []
    if record.get("seconds"):
        parts.append(duration(record["seconds"] / 3600))
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def one_line(text: str) -> str:
    """A text in a cell of a Markdown table."""
    return " ".join(printable(text).split()).replace("|", "\\|").replace("<", "&lt;")
