"""Results that are kept, so that a card goes on where it was interrupted."""

from collections.abc import Mapping
from pathlib import Path

import xxhash

from minimind.common.files import append_json, json_lines
from minimind.evaluation.statistics import Measure
from minimind.score_card.tasks import Task, TaskResult
from minimind.stage_directory import provenance

FORMAT = 1  # changed with what tasks compute


class Finished:
    """The results in a file, by `result_key`; without a file, nothing is kept.

    Results of other weights, files and options stay in the file and do no harm.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.results: dict[str, TaskResult] = {}
        for line in json_lines(file) if file else ():
            if {"key", *TaskResult._fields} <= line.keys():
                measures = {name: Measure(**fields) for name, fields in line["measures"].items()}
                others = [line[name] for name in TaskResult._fields[1:]]
                self.results[line["key"]] = TaskResult(measures, *others)

    def get(self, key: str) -> TaskResult | None:
        """The result with this key, if it is there."""
        return self.results.get(key)

    def add(self, key: str, result: TaskResult) -> None:
        """Keep a result; raises OSError."""
        self.results[key] = result
        if self.file:
            measures = {name: measure._asdict() for name, measure in result.measures.items()}
            append_json(self.file, {"key": key, **result._asdict(), "measures": measures})


def result_key(directory: Path, task: Task) -> str:
    """What decides a result, as a hash: the weights and settings of a stage directory, and the
    task."""
    return key_of({"model": model_identity(directory), "task": task_identity(task)})


def key_of(value: object) -> str:
    """The xxh3 (128 bits) of the `repr` of a value that is built of plain ones."""
    return xxhash.xxh3_128_hexdigest(repr((FORMAT, value)).encode("utf-8", "backslashreplace"))


def model_identity(directory: Path) -> dict:
    """The hashes of the weights, of a base too, and the other files that decide what is
    computed."""

    def weights(origin: Mapping) -> list[str]:
        return [origin["weights"], *(weights(origin["base"]) if "base" in origin else ())]

    names = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json")
    names += ("tokenizer_config.json", "chat_template.jinja")
    files = [directory / name for name in names]
    settings = {file.name: file.read_text("utf-8") for file in files if file.is_file()}
    return {"weights": weights(provenance(directory)), **settings}


def task_identity(task: Task) -> dict:
    """A task's name and attributes; see `Task`."""
    attributes = {name: value for name, value in vars(task).items() if not name.startswith("_")}
    return {"class": type(task).__name__, "name": task.name, **attributes}
