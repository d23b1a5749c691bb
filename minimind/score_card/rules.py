"""Facts and formats: does the greedy reply follow rules that a program can check?"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import shown
from minimind.data.calls import parse_literal
from minimind.data.columns import Columns, Fields
from minimind.data.content import split_reasoning
from minimind.data.sources import expand
from minimind.evaluation.replies import Sampling
from minimind.evaluation.scoring import Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.score_card.checks import RULES, follows, read_rules
from minimind.score_card.prompts import TaskPrompt, fitting_replies, read_prompt
from minimind.score_card.rows import groups_of, named, read_items
from minimind.score_card.tasks import TaskResult

# Rules that may be columns of a row; "language" is a group
COLUMNS = tuple(name for name in RULES if name != "language")


class RuledPrompt(NamedTuple):
    """A prompt and the rules for its reply: names and values."""

    key: str
    groups: tuple[str, ...]
    prompt: TaskPrompt
    rules: tuple[tuple[str, Any], ...]


def read_ruled_prompts(
    files: Sequence[str], on_bad_rows: str | None = None, columns: Columns | None = None
) -> list[RuledPrompt]:
    """Rows with a prompt (see `prompts.read_prompt`) and rules: in the column `rules`, an object of
    names in `checks.RULES` and values, or in the columns `COLUMNS`.

    The kind of a row is its `kind`, else the first rule.

    Raises:
        UserError: see `files.read_rows`; a row without prompt or rule, with an unknown rule or a
            wrong value, or with an `id` that was there before.
    """
    return read_items(named(expand(files)), to_ruled_prompt, on_bad_rows, columns)


def to_ruled_prompt(row: Fields, key: str, stem: str) -> RuledPrompt:
    """The prompt and rules of a row; raises BadRowError."""
    given = row.take("rules")
    given = {} if given in (None, "") else parse_literal(given, "rules")
    if not isinstance(given, Mapping):
        raise BadRowError(f"rules: found {shown(given)}, expected an object of rules")
    values = {name: row.take(name) for name in COLUMNS if row.get(name) not in (None, "")}
    if both := sorted(values.keys() & given.keys()):
        raise BadRowError(f"found the rule {both[0]} twice, in a column and in 'rules'")
    rules = read_rules(values | {name: each for name, each in given.items() if each is not None})
    return RuledPrompt(key, groups_of(row, rules[0][0]), read_prompt(row), rules)


class RulesTask:
    """Shares of greedy replies that follow all their rules, and of rules that are followed.

    Of a reply, its reasoning is left out; of the continuation of a text, only the first line
    counts, because a base model does not stop.
    """

    name = "rules"

    def __init__(
        self, rows: Sequence[RuledPrompt], max_new_tokens: int = 256, batch_size: int = 64
    ):
        self.rows = rows
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @property
    def needs_chat(self) -> bool:
        """Whether it asks questions of a chat model."""
        return any(row.prompt.conversation for row in self.rows)

    def run(self, subject: Subject) -> TaskResult:
        """See `Task`; raises UserError, see `fitting_replies`."""
        sampling = Sampling(1, self.max_new_tokens, 0.0, 1.0, 0, self.batch_size)
        prompts = [row.prompt for row in self.rows]
        replies = fitting_replies(subject, prompts, sampling, "--rules")

        # Which rules each reply follows
        groups: dict[str, dict[str, float]] = defaultdict(dict)
        by_rule: dict[str, list[bool]] = defaultdict(list)
        details = {}
        for index, reply in replies.items():
            row = self.rows[index]
            text = split_reasoning(reply.text)[1].strip()
            if row.prompt.conversation is None:
                text = text.partition("\n")[0]
            followed = [follows(text, name, value) for name, value in row.rules]
            for (name, _), good in zip(row.rules, followed, strict=True):
                by_rule[name].append(good)
            for group in ("all", *row.groups):
                groups[group][row.key] = float(all(followed))
            broken = [name for (name, _), good in zip(row.rules, followed, strict=True) if not good]
            details[row.key] = {"reply": reply.text, "broken": broken}

        section, measures = {}, {}
        for group, values in groups.items():
            if group != "all" and len(values) == len(replies):
                continue  # the same once more
            measure = measures[f"rules/{group}"] = Measure(values)
            found = estimate(measure)
            section[group] = {"n": found["n"], "score": found["score"]}
            section[group] |= {"interval": found["interval"]}
        every = [good for each in by_rule.values() for good in each]
        section["all"] |= {
            "rules": fmean(every),
            "by_rule": {
                name: {"n": len(each), "score": fmean(each)} for name, each in by_rule.items()
            },
            "too_long": len(self.rows) - len(replies),
        }
        return TaskResult(measures, section, details=details)

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {row.key: (row.prompt.asked,) for row in self.rows}
