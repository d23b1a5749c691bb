"""Tasks of lm-evaluation-harness (the extra `lm-eval`), so that scores compare with others'.

Its tasks, prompts and scores are used as they are, on the model as it is loaded here. Two things
differ from the tasks of this project: among choices with equal scores it takes the first, so that
a tie in BLiMP, where the good sentence is the first, counts as right; and of a choice after an
empty context it does not score the first token if that is the end token. And with 0.4.13 the bits
per byte of a text that repeats itself word by word differed, perhaps because windows with the same
tokens but another border share one result (`Collator.get_cache`); no upstream issue is known.
"""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from statistics import fmean
from typing import Any

import numpy as np

from minimind.common.errors import UserError, install, reason
from minimind.evaluation.scoring import ModelSubject
from minimind.evaluation.statistics import Measure
from minimind.score_card.tasks import TaskResult
from minimind.stage_directory import virtual_tokens

BATCH = 16  # rows
RESAMPLES = 1000  # of the bootstrap for metrics that are no means
BY_LIKELIHOOD = ("acc", "acc_norm", "acc_bytes")


class HarnessTask:
    """Tasks of lm-evaluation-harness by their names, those in the directory `include_path` too.

    Raises:
        UserError: the library is not installed, has no such task, or cannot load a task's data.
    """

    name = "lm_eval"

    def __init__(self, names: Sequence[str], include_path: str | None = None):
        self.names, self.include_path = list(names), include_path
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"--lm_eval: found no usable lm_eval ({error}), expected lm-evaluation-harness."
                f" Install it: {install('lm-eval')}"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)

        # Its own tasks are many: they are listed only where they are needed
        self._manager = TaskManager(include_path=include_path, include_defaults=False)
        if not set(names) <= set(self._manager.all_tasks):
            self._manager = TaskManager(include_path=include_path)
        for name in names:
            if name not in self._manager.all_tasks:
                close = get_close_matches(name, self._manager.all_tasks, 3)
                raise UserError(
                    f"--lm_eval {name}: lm-evaluation-harness has no such task, only for example"
                    f" {', '.join(close or ('blimp', 'arc_easy'))}. Tasks of your own are looked"
                    " for in the directory --include_path."
                )
            try:
                self._manager.load([name])
            except Exception as error:  # of the library, the Hub, or code that a task names
                raise UserError(
                    f"--lm_eval {name}: the task or its data cannot be loaded ({reason(error)})."
                    " Without a network, its data has to be in the cache of `datasets`, or a task"
                    " file in --include_path has to name local files; see docs/evaluate.md."
                ) from error

    def run(self, subject: ModelSubject) -> TaskResult:
        """See `Task`."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model, tokenizer = subject.model, subject.tokenizer
        wrapped = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            prefix_token_id=tokenizer.eos_token_id,
            add_bos_token=False,
            max_length=model.config.max_position_embeddings - virtual_tokens(model),
            batch_size=BATCH,
        )
        found = simple_evaluate(
            wrapped,
            tasks=self.names,
            task_manager=self._manager,
            bootstrap_iters=RESAMPLES,
        )
        measures = {}
        for task, samples in found["samples"].items():
            directions = found["higher_is_better"].get(task, {})
            for metric in dict.fromkeys(each for sample in samples for each in sample["metrics"]):
                if measure := _measure(task, metric, samples, directions.get(metric)):
                    measures[f"{self.name}/{task}/{metric}"] = measure
        section = {"version": found["lm_eval_version"], "results": _plain(found["results"])}
        return TaskResult(measures, section)


def _measure(
    task: str, metric: str, samples: Sequence[dict], higher_is_better: bool | None
) -> Measure | None:
    """One metric of the samples of a task; None where it is not a number for each sample."""
    first = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == first]
    values = {f"{task}/{sample['doc_id']}": sample[metric] for sample in samples}
    if not all(isinstance(value, int | float) for value in values.values()):
        return None
    chance = None
    if metric in BY_LIKELIHOOD and all(len(sample["arguments"]) > 1 for sample in samples):
        chance = fmean(1 / len(sample["arguments"]) for sample in samples)
    values = {key: float(value) for key, value in values.items()}
    return Measure(values, chance, higher_is_better=higher_is_better is not False)


def _plain(value: Any) -> Any:
    """A value with numbers of Python instead of NumPy's."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value
