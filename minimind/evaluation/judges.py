"""Judges: which of several replies to a prompt is the better one.

A judge gives each reply a score. The higher one is better, equal scores are a tie; scores of
replies to different prompts need not be comparable.
"""

import importlib.util
import inspect
import math
import numbers
import re
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimind.common.errors import BadRowError, UserError, first_line
from minimind.data.bad_rows import shown
from minimind.data.conversations import Conversation
from minimind.data.messages import Message, reply_message
from minimind.evaluation.replies import Model, Sampling
from minimind.evaluation.rewards import RewardModel

LENGTHS = {"shorter": -1, "longer": 1}


class Judge:
    """Scores each reply by a function of the prompt's messages and the reply's text."""

    def __init__(self, score: Callable[[list[Message], str], float]):
        self.score = score

    def scores(
        self, prompts: Sequence[Conversation], replies: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """For each prompt, the scores of its replies; raises UserError."""
        return [
            [self.score(prompt.messages, text) for text in texts]
            for prompt, texts in zip(prompts, replies, strict=True)
        ]


class RewardJudge(Judge):
    """Scores replies by a reward model."""

    def __init__(self, directory: str):
        self.directory, self.model = directory, RewardModel.load(directory)

    def scores(self, prompts, replies):
        """See `Judge.scores`."""
        answered = [
            (Conversation([*prompt.messages, reply_message(text)], prompt.tools), text)
            for prompt, texts in zip(prompts, replies, strict=True)
            for text in texts
        ]
        encoded = self.model.encode([conversation for conversation, _ in answered])
        for result, (_, text) in zip(encoded, answered, strict=True):
            if isinstance(result, BadRowError):
                raise UserError(
                    f"--reward_model {self.directory}: {result}; the reply is {shown(text)}. Give"
                    " shorter prompts, or a smaller --max_new_tokens."
                )
        scores = iter(self.model.score_ids(encoded))
        return [[next(scores) for _ in texts] for texts in replies]


class PairwiseJudge(Judge):
    """Scores a reply by its share of comparisons won against the other replies to its prompt, ties
    half; each two are compared in both orders.

    `compare` gets the messages and two replies, and returns a number above 0 where the first is
    better, below 0 where the second is.
    `agreed` of the `compared` pairs were judged alike in both orders, which unmasks a rule that
    prefers whatever it sees first.
    """

    def __init__(self, compare: Callable[[list[Message], str, str], float]):
        self.compare = compare
        self.compared = self.agreed = 0

    def scores(self, prompts, replies):
        """See `Judge.scores`."""
        return [
            self._shares(prompt.messages, texts)
            for prompt, texts in zip(prompts, replies, strict=True)
        ]

    def _shares(self, messages: list[Message], texts: Sequence[str]) -> list[float]:
        points = [0] * len(texts)  # whole numbers, so that equal ones are ties
        for one, other in combinations(range(len(texts)), 2):
            forward = int(np.sign(self.compare(messages, texts[one], texts[other])))
            backward = -int(np.sign(self.compare(messages, texts[other], texts[one])))
            self.compared += 1
            self.agreed += forward == backward
            points[one] += forward + backward
            points[other] -= forward + backward
        return [0.5 + each / (4 * max(1, len(texts) - 1)) for each in points]


# From options


def make_judge(
    reward_model: str | None = None,
    rule: str | None = None,
    pairwise_rule: str | None = None,
    rule_regex: str | None = None,
    by_length: str | None = None,
) -> Judge:
    """The judge that one of the options describes.

    Args:
        reward_model: the directory of a reward model.
        rule: "module.py:function", called with (messages, reply); returns a number, or whether the
            reply is good.
        pairwise_rule: likewise, called with (messages, first, second); returns a number above 0, or
            true, where the first reply is better, below 0, or false, where the second is; 0: a tie.
        rule_regex: a regular expression; a reply that it is found in is good.
        by_length: "shorter" or "longer", in characters.

    Raises:
        UserError: what the option names cannot be used.
    """
    if reward_model:
        return RewardJudge(reward_model)
    if rule:
        return Judge(load_rule("--rule", rule, ("messages", "reply")))
    if pairwise_rule:
        compare = load_rule("--pairwise_rule", pairwise_rule, ("messages", "first", "second"))
        return PairwiseJudge(compare)
    if rule_regex:
        try:
            pattern = to_pattern(rule_regex)
        except BadRowError as problem:
            raise UserError(f"--rule_regex {shown(rule_regex)}: {problem}") from None
        return Judge(lambda messages, reply: float(bool(pattern.search(reply))))
    sign = LENGTHS[by_length]
    return Judge(lambda messages, reply: float(sign * len(reply)))


def to_pattern(text: str) -> re.Pattern[str]:
    """A regular expression; raises BadRowError for a text that is none."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadRowError(
            f"not a regular expression ({error}). Write a special character such as ( or * as \\("
            " or \\*."
        ) from error


def load_rule(option: str, spec: str, parameters: Sequence[str]) -> Callable[..., float]:
    """The function that "module.py:function" names, which takes `parameters`; what it returns is
    checked on each call.

    Raises:
        UserError: there is no such function; and when it is called, that it raised, or returned
            neither a finite number nor true or false.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise UserError(f"{option} {spec}: expected module.py:function, such as rules.py:polite.")
    if not Path(file).is_file():
        raise UserError(f"{option} {spec}: no such file {file}. Check the path.")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{option} {spec}: {_raised(error, file)}. Fix the file.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(
            f"{option} {spec}: {file} has no function {name}. Define"
            f" {name}({', '.join(parameters)}) in it."
        )
    try:
        inspect.signature(function).bind(*parameters)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{option} {spec}: {name} cannot be called with ({', '.join(parameters)}): {error}."
            " Change its parameters."
        ) from error

    def rule(messages: list[Message], *replies: str) -> float:
        try:
            value = function(deepcopy(messages), *replies)
        except Exception as error:
            raise UserError(
                f"{option} {spec}: {_raised(error, file)} for the reply {shown(replies[0])}. Fix"
                " the function."
            ) from error
        if len(replies) == 2 and isinstance(value, bool | np.bool_):
            value = 1 if value else -1
        if isinstance(value, numbers.Real | np.bool_) and math.isfinite(value):
            return float(value)
        raise UserError(
            f"{option} {spec}: it returned {shown(value)} for the reply {shown(replies[0])},"
            " expected a finite number, or true or false. Fix the function."
        )

    return rule


def _raised(error: Exception, file: str) -> str:
    """What was raised, and the last line of `file` on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(file)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {first_line(error)}"


class Asked(NamedTuple):
    """Models, the prompts that fit all of them, and who judges their replies."""

    directories: Sequence[str]
    models: Sequence[Model]
    prompts: Sequence[Conversation]
    ids: Sequence[list[list[int]]]  # for each model, those of the prompts
    sampling: Sampling
    judge: Judge | None  # None where a person judges
    judge_option: dict[str, Any]
    too_long: int  # prompts left out
