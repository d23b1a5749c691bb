"""The score card: tasks run on models, and what they found as JSON, items, table and picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind.common.errors import UserError
from minimind.common.files import write_json, write_text
from minimind.evaluation.scoring import ModelSubject
from minimind.generation import load_for_generation
from minimind.score_card.finished import Finished, result_key
from minimind.score_card.report import markdown, picture
from minimind.score_card.tasks import Card, Task
from minimind.stage_directory import read_stage, require_stage
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


def make_card(directory: str, tasks: Sequence[Task], finished: Finished) -> Card:
    """Run the tasks that are not finished on the model of a stage directory.

    Raises:
        UserError: the model cannot be loaded, or does not fit a task.
    """
    path = require_stage(directory)
    subject, results = None, {}
    for task in tasks:
        key = result_key(path, task)
        result = finished.get(key)
        if result is None:
            subject = subject or ModelSubject(*load_for_generation(directory))
            result = task.run(subject)
            finished.add(key, result)
        results[task.name] = result
    return Card(directory, results)


def cards_json(cards: Sequence[Card]) -> dict[str, Any]:
    """The card of one model as one object; of several: `models`."""
    if len(cards) == 1:
        return cards[0].entries()
    return {"models": [card.entries() for card in cards]}


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


def write_cards(output: Path, cards: Sequence[Card]) -> None:
    """Write card.json, card.md, card.png and items.jsonl, each complete or not at all; raises
    OSError."""
    write_text(output / "items.jsonl", "".join(item_lines(cards)))
    write_text(output / "card.md", markdown(cards))
    picture(output / "card.png", cards)
    write_json(output / "card.json", cards_json(cards))
