"""Controls: the same card where it must come out at chance.

    random    the model's architecture with random weights
    length    every token is equally probable: of two texts, the sum of the log-probabilities
              prefers the one of fewer tokens
    unigram   each token is as probable as in the training text, whatever is before it
    shuffled  the model itself, and labels that say nothing

Where one of the first three scores better than chance, a part of a task can be solved without
knowing the language: by the length of texts or by the frequency of words. A model's score has to be
read against that score, not against chance. Shuffled labels check the procedure itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from minimind.evaluation.replies import Sampling
from minimind.evaluation.scoring import ModelSubject, Request, Subject
from minimind.evaluation.statistics import estimate
from minimind.generation import Reply
from minimind.score_card.report import VERDICTS
from minimind.score_card.tasks import Task, TaskResult
from minimind.score_card.training_text import read_row_texts, training_files
from minimind.stage_directory import Ancestor, auto_class
from minimind.tokenizer.encoding import DocumentEncoder, WrongIdsError

SEED = 0
MOST_TEXT, MOST_OF_ROW = 2**26, 2**18  # characters in which tokens are counted
# Standard errors from chance on which a remark is made: by chance 1 of 1,000 controls gets one. A
# card has many controls, and of 20 one is outside of its 95 % interval by chance.
CLEAR = 3.29
CONTROLS = {  # who scores, and what it means if that is not chance
    "random": (
        "a model with random weights",
        "lengths, or tokens that always decide, are not balanced between right and wrong",
    ),
    "length": (
        "a model for which all tokens are equally probable",
        "the lengths of the texts are not balanced between right and wrong",
    ),
    "unigram": (
        "a model of the frequencies of tokens",
        "frequencies or lengths give a part of the answers away",
    ),
    "shuffled": (
        "the model with shuffled labels",
        "the right answers are not spread evenly over the choices",
    ),
}


class UnigramSubject:
    """A `Subject` for which a token's probability is its share of a text, whatever is before it.

    Args:
        counts: (vocabulary,), how often each token occurs. One is added to each (Laplace), so
            that none is impossible; zeros make all tokens equally probable.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, counts: np.ndarray):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.log_shares = np.log((counts + 1.0) / (counts + 1.0).sum())

    def log_probabilities(
        self, requests: Sequence[Request], title: str = "scoring"
    ) -> list[np.ndarray]:
        """See `Subject`."""
        return [self.log_shares[list(request.continuation)] for request in requests]

    def replies(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Reply]:
        """See `Subject`: tokens drawn by their shares, whatever the sampling."""
        generator = np.random.default_rng(SEED)
        shares, replies = np.exp(self.log_shares), []
        for _ in prompts:
            size, p = sampling.max_new_tokens, shares / shares.sum()
            tokens = generator.choice(len(shares), size, p=p).tolist()
            stopped = self.tokenizer.eos_token_id in tokens
            tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)] if stopped else tokens
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            replies.append(Reply(text, tokens, stopped))
        return replies


class RememberingSubject:
    """A `Subject` that computes each log-probability once; else it is the subject that it is made
    of."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._known: dict[Request, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def log_probabilities(
        self, requests: Sequence[Request], title: str = "scoring"
    ) -> list[np.ndarray]:
        """See `Subject`."""
        new = [each for each in dict.fromkeys(requests) if each not in self._known]
        if new:
            scores = self._subject.log_probabilities(new, title)
            self._known.update(zip(new, scores, strict=True))
        return [self._known[each] for each in requests]


def random_subject(subject: ModelSubject, seed: int = SEED) -> ModelSubject:
    """A model's architecture with random weights, drawn from a seed, in the model's place."""
    config = subject.model.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config)
    return ModelSubject(model.to(subject.model.device), subject.tokenizer)


def count_tokens(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], vocab_size: int
) -> np.ndarray:
    """How often each token occurs in texts, with the end token after each: (vocab_size,). Only the
    first `MOST_TEXT` characters are counted, and `MOST_OF_ROW` of one text."""
    counts, room = np.zeros(vocab_size, np.int64), MOST_TEXT
    encoder, texts = DocumentEncoder(tokenizer), iter(texts)
    while room > 0 and (batch := [text[:MOST_OF_ROW] for text in islice(texts, 256)]):
        try:
            ids = encoder(batch)
        except WrongIdsError:
            encoder = DocumentEncoder(tokenizer, fast=False)
            ids = encoder(batch)
        counts += np.bincount(ids, minlength=vocab_size)
        room -= sum(map(len, batch))
    return counts


def controls(
    load: Callable[[], ModelSubject], tasks: Sequence[Task], ancestors: Sequence[Ancestor]
) -> TaskResult:
    """The results of the tasks for each control in the place of a model.

    Args:
        load: returns the model.
        ancestors: its lineage; without training files, tokens are counted in the tasks' texts.

    Raises:
        UserError: a training file is broken.
    """
    subject = load()
    tasks = [task for task in tasks if hasattr(task, "shuffled")]
    files = training_files(ancestors)
    if files:
        texts = (text for _, text in read_row_texts(files, "token frequencies"))
    else:
        texts = (text for task in tasks for parts in task.item_texts().values() for text in parts)
    counts = count_tokens(subject.tokenizer, texts, subject.model.config.vocab_size)

    limits = subject.tokenizer, subject.max_length
    subjects: dict[str, Subject] = {
        "random": random_subject(subject),
        "length": UnigramSubject(*limits, np.zeros_like(counts)),
        "unigram": UnigramSubject(*limits, counts),
    }
    results = {
        name: {task.name: task.run(control) for task in tasks} for name, control in subjects.items()
    }
    generator = np.random.default_rng(SEED)
    shuffled = [each for task in tasks if (each := task.shuffled(generator))]
    results["shuffled"] = {task.name: task.run(subject) for task in shuffled}

    # The first measure of each task is shown, all are in the section
    measures, section = {}, {"unigrams_of": list(map(str, files)) or "the tasks' own texts"}
    remarks = []
    for name, found in results.items():
        section[name] = {task: result.section for task, result in found.items()}
        for result in found.values():
            measure = next(iter(result.measures))
            measures[f"controls/{name}/{measure}"] = result.measures[measure]
            remarks += _remarks(name, measure, estimate(result.measures[measure]))
    return TaskResult(measures, section | {"remarks": remarks})


def _remarks(control: str, measure: str, found: dict) -> Iterator[str]:
    """In words, where a control is not at chance."""
    chance = found.get("chance") or 0.0
    error = math.sqrt(chance * (1 - chance) / found["n"])
    if not error or abs(found["score"] - chance) < CLEAR * error:
        return
    (who, cause), verdict = CONTROLS[control], VERDICTS[found["score"] > chance]
    yield f"{measure}: {who} scores {found['score']:.1%}, {verdict} ({chance:.1%}): {cause}"
