"""The score card: tasks run on models, and what they found as JSON, items, table and picture."""

import json
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from minimind.common.errors import UserError
from minimind.common.files import write_json, write_text
from minimind.evaluation.scoring import ModelSubject
from minimind.generation import load_for_generation
from minimind.score_card.contamination import contamination
from minimind.score_card.controls import RememberingSubject, controls
from minimind.score_card.finished import Finished, key_of, result_key
from minimind.score_card.tasks import CONTROLS, Card, Task, TaskResult
from minimind.stage_directory import lineage, read_stage, require_stage
from minimind.stage_directory.loading import check_scores
from minimind.tokenizer import load_tokenizer


def check_model(directory: str, tasks: Sequence[Task]) -> None:
    """Check that a directory holds a model that can do the tasks, before any is loaded.

    Raises:
        UserError: it does not, or holds a reward model; or a task asks, and the model has not
            learned to answer.
    """
    path = require_stage(directory)
    check_scores(path, scores=False)
    asking = [task.name for task in tasks if getattr(task, "needs_chat", False)]
    if asking:
        is_base = read_stage(path).get("stage") == "pretrain"
        if is_base or not load_tokenizer(path).chat_template:
            found = "a base model" if is_base else "a model without a chat template"
            raise UserError(
                f"{path}: found {found}, which has not learned to answer the questions of"
                f" {asking[0]}, expected a chat model. Give the directory of a later stage, or what"
                " a base model can do: --max_new_tokens 0, rows with 'text', no --chat."
            )


def make_card(
    directory: str, tasks: Sequence[Task], finished: Finished, checks: Collection[str] = ()
) -> Card:
    """Run the tasks that are not finished on the model of a stage directory.

    Args:
        checks: "controls" and "contamination" add these sections.

    Raises:
        UserError: the model cannot be loaded, or does not fit a task.
    """
    path, results = require_stage(directory), {}

    @cache
    def subject() -> ModelSubject:
        loaded = ModelSubject(*load_for_generation(directory))
        return RememberingSubject(loaded) if "controls" in checks else loaded

    def find(key: str, run: Callable[[], TaskResult]) -> TaskResult:
        result = finished.get(key)
        if result is None:
            result = run()
            finished.add(key, result)
        return result

    for task in tasks:
        results[task.name] = find(result_key(path, task), lambda task=task: task.run(subject()))
    ancestors = lineage(path) if checks else []
    key = [result_key(path, task) for task in tasks], ancestors
    if "controls" in checks:
        run = partial(controls, subject, tasks, ancestors)
        results[CONTROLS] = find(key_of(("controls", key)), run)
    if "contamination" in checks:
        run = partial(contamination, tasks, dict(results), ancestors)
        results["contamination"] = find(key_of(("contamination", key)), run)
    return Card(directory, results)


def cards_json(cards: Sequence[Card], **others: Any) -> dict[str, Any]:
    """The card of one model as one object; of several: `models`. After it come the `others` that
    are not empty."""
    cards = [card.entries() for card in cards]
    others = {name: value for name, value in others.items() if value}
    return {**(cards[0] if len(cards) == 1 else {"models": cards}), **others}


def item_lines(cards: Sequence[Card]) -> list[str]:
    """A line of JSON for each item of each task: its value in every measure that has it, and its
    details."""
    lines = []
    for card in cards:
        for name, result in card.results.items():
            items: dict[str, dict] = {}
            for measure_name, measure in result.measures.items():
                for key, value in measure.values.items():
                    items.setdefault(key, {})[measure_name] = value
            for key, values in items.items():
                line = {"directory": card.directory, "task": name, "item": key, "values": values}
                line |= result.details.get(key, {})
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def write_cards(
    output: Path,
    cards: Sequence[Card],
    report: dict[str, Any],
    text: str,
    draw: Callable[[Path, Sequence[Card]], None],
) -> None:
    """Write card.json (the `report`), card.md, card.png and items.jsonl, each complete or not at
    all; raises OSError."""
    write_text(output / "items.jsonl", "".join(item_lines(cards)))
    write_text(output / "card.md", text)
    draw(output / "card.png", cards)
    write_json(output / "card.json", report)
