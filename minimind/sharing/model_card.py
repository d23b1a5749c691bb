"""README.md of a stage directory or an export: the Hub's model card, made from the directory's own
files and the records of the stages before it.

It names files without their directories, and nothing of this machine. A card is English, as the
Hub's readers and its search are, with a summary in Chinese: who reads it is not who writes it, so
the writer's language does not decide.

The last line holds a hash of the rest. A card that a person has edited is recognised by it, and is
not written over. The front matter keeps what only the user knows.
"""

import re
from pathlib import Path
from typing import NamedTuple

import xxhash
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minimind.common.errors import UserError, first_line
from minimind.common.files import read_json, write_json, write_text
from minimind.sharing.facts import Facts, describe
from minimind.sharing.figures import HeldOut, Score, held_out, scores
from minimind.stage_directory import find_origin, require_stage

CARD, SCORE_CARD, EXPORT = "README.md", "score_card.json", "export.json"
GIVE_SCORES = "Give the card.json that minimind evaluate --output wrote."
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MARK = "<!-- written by minimind, {}. Changes of this file are kept. -->\n"
# What stands for the names of repositories, until `push` knows them
REPOSITORY, BASE = "OWNER/NAME", "OWNER/BASE"
# The Hub's identifiers, such as apache-2.0
LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
LANGUAGE = re.compile(r"[a-z]{2,3}")
# The metrics of the Hub's metadata: name of ours, and the Hub's type
HUB_METRICS = {"perplexity": "perplexity", "rewards/accuracies": "accuracy"}


class Choices(NamedTuple):
    """What only the user knows: the licence and the languages as the Hub spells them, and the
    repository of an adapter's base."""

    license: str | None = None
    language: list[str] | None = None
    base_model: str | None = None


def write_model_card(
    directory: str | Path,
    choices: Choices | None = None,
    overwrite: bool = False,
    score_card: str | Path | None = None,
) -> bool:
    """Write the model card of a stage directory or an export, complete or not at all.

    A choice that is None stays what the card in the directory says; for an export, what the
    source's card says. `score_card`, the card.json of `minimind evaluate --output` or its
    directory, is copied beside the model and stays in its card likewise.

    Returns:
        False where a README.md that a person wrote or edited was kept.

    Raises:
        UserError: the directory is neither, its source is gone, or a choice is not spelled as the
            Hub spells it, or the score card is none of one model.
    """
    directory = Path(directory)
    file = directory / CARD
    if file.exists() and not (overwrite or is_generated(file)):
        return False
    given = score_card and Path(score_card)
    given = given / "card.json" if given and given.is_dir() else given
    text = model_card(directory, choices or Choices(), given)
    if given:
        write_json(directory / SCORE_CARD, read_json(given, GIVE_SCORES))
    write_text(file, text + MARK.format(_hash(text)))
    return True


def is_generated(file: Path) -> bool:
    """Whether a README.md is a card just as `write_model_card` wrote it."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    start = text.rstrip("\n").rfind("\n") + 1
    return text[start:] == MARK.format(_hash(text[:start]))


def _hash(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode("utf-8", "backslashreplace"))


def model_card(directory: Path, choices: Choices, score_card: Path | None = None) -> str:
    """The text of a model card, without its last line; see `write_model_card`."""
    source, export = directory, {}
    if (directory / EXPORT).exists():
        source, export = read_export(directory)
    facts = describe(require_stage(source), export)
    earlier = [read_choices(each / CARD) for each in dict.fromkeys((directory, source))]
    known = zip(choices, *earlier, strict=True)
    choices = Choices(*(next(filter(None, values), None) for values in known))
    check_choices(choices)
    choices = choices._replace(language=choices.language or facts.languages or None)

    measured, found = list(held_out(facts.record)), []
    kept = (each / SCORE_CARD for each in (directory, source))
    if file := score_card or next(filter(Path.exists, kept), None):
        found = scores(read_json(file, GIVE_SCORES), file)
    card = ModelCard.from_template(
        metadata(facts, choices, measured, found),
        template_path=str(TEMPLATE),
        **facts._asdict(),
        choices=choices,
        held_out=measured,
        scores=found,
        has_plot=(directory / "loss.png").exists(),
        export=export,
        repository=REPOSITORY,
        base=choices.base_model or BASE,
    )
    return str(card).rstrip("\n") + "\n\n"


def read_export(directory: Path) -> tuple[Path, dict]:
    """The stage directory that an export was made of, and the record of the export; raises
    UserError."""
    fields = {"source": dict, "format": str, "dtype": str}
    export = read_json(directory / EXPORT, "Export the model again.", fields=fields)
    source = find_origin(directory, export["source"])
    if source is None:
        raise UserError(
            f"{directory} was exported from {export['source'].get('directory')}, which is not there"
            " or holds other weights now. Put it back, or export the model again."
        )
    return source, export


# What only the user knows


def read_choices(file: Path) -> Choices:
    """The choices in the front matter of a card; none if there is no such file.

    Raises:
        UserError: its front matter cannot be read.
    """
    if not file.exists():
        return Choices()
    data = load_card(file).data
    language = data.get("language")
    language = [language] if isinstance(language, str) else language
    return Choices(data.get("license"), language, data.get("base_model"))


def load_card(file: Path) -> ModelCard:
    """A card with its front matter; raises UserError where that is not as the Hub has it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}: the front matter between the lines --- is no metadata of the Hub"
            f" ({first_line(error)}). Correct it, or remove the file and write the card anew with"
            " minimind card."
        ) from error


def check_choices(choices: Choices) -> None:
    """Raise UserError for a choice that the Hub would refuse."""
    if choices.license is not None and not _fits(LICENSE, choices.license):
        raise UserError(
            f"--license {choices.license}: found no identifier of the Hub, expected one such as"
            " apache-2.0, mit, cc-by-4.0 or other."
        )
    for language in choices.language or ():
        if not _fits(LANGUAGE, language):
            raise UserError(
                f"--language {language}: expected two or three letters (ISO 639), such as zh or en."
            )


def _fits(pattern: re.Pattern, value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


# Metadata


def metadata(
    facts: Facts, choices: Choices, measured: list[HeldOut], found: list[Score]
) -> ModelCardData:
    """The front matter of a card, from which the Hub knows what a model is."""
    reward = facts.kind == "reward"
    library = {"gguf": "gguf", "web": None}.get(facts.layout, "transformers")
    tags = ["minimind", facts.record.get("stage") or "minimind"]
    tags += ["custom_code"] if facts.layout == "minimind" and not facts.is_adapter else []
    tags += ["conversational"] if facts.kind == "chat" else []
    tags += ["reward-model"] if reward else []
    task = "text-classification" if reward else "text-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="held-out",
            dataset_name="held-out rows of the last stage",
            metric_type=HUB_METRICS.get(each.name, each.name),
            metric_name=each.title,
            metric_value=each.after,
        )
        for each in measured
        if each.name
    ]
    results += [
        EvalResult(
            task_type=task,
            dataset_type=each.task,
            dataset_name=each.task,
            metric_type=each.name.rpartition("/")[2],
            metric_name=each.name,
            metric_value=each.score,
        )
        for each in found
    ]
    return ModelCardData(
        language=choices.language,
        license=choices.license,
        library_name="peft" if facts.is_adapter else library,
        pipeline_tag=task,
        tags=tags,
        base_model=choices.base_model,
        datasets=facts.datasets or None,
        model_name=facts.title if results else None,
        eval_results=results or None,
    )
