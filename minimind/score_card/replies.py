"""How a model writes: repetition, variety, ends and length of its replies, and their overlap with
references."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import check_text, shown
from minimind.data.calls import parse_literal
from minimind.data.columns import Columns, Fields
from minimind.data.content import split_reasoning
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.files import to_document
from minimind.data.formats import format_of
from minimind.data.sources import expand
from minimind.data.units import units_of
from minimind.evaluation.comparison import describe_replies, repeated_runs, rounded
from minimind.evaluation.replies import Sampling
from minimind.evaluation.scoring import Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.generation import Reply
from minimind.score_card.overlap import corpus_scores, ngrams, require_sacrebleu, rouge
from minimind.score_card.prompts import TaskPrompt, fitting_replies, read_prompt
from minimind.score_card.rows import groups_of, named, read_items
from minimind.score_card.tasks import TaskResult

BOUNDS = {"temperature": (0, 10), "top_p": (0, 1), "seed": (0, 2**32 - 1)}


class ReferencedPrompt(NamedTuple):
    """A prompt, and what good replies to it are, if that is known."""

    key: str
    groups: tuple[str, ...]
    prompt: TaskPrompt
    references: tuple[str, ...]


def read_referenced_prompts(
    files: Sequence[str], on_bad_rows: str | None = None, columns: Columns | None = None
) -> list[ReferencedPrompt]:
    """Prompts (see `prompts.read_prompt`; each line of a txt file is one) with their references:
    the columns `references` or `reference`, else the last reply of a chat.

    Raises:
        UserError: see `files.read_rows`; a row without a prompt, with an empty reference or with
            an `id` that was there before; there are references and sacrebleu is not installed.
    """
    rows = []
    for file, name in named(expand(files)):
        is_text = isinstance(file, Path) and format_of(file)[0] == ".txt"
        convert = to_asked if is_text else to_referenced_prompt
        rows += read_items([(file, name)], convert, on_bad_rows, columns)
    if any(row.references for row in rows):
        require_sacrebleu()
    return rows


def to_referenced_prompt(row: Fields, key: str, stem: str) -> ReferencedPrompt:
    """The prompt and references of a row; raises BadRowError."""
    prompt = read_prompt(row)
    name = next((name for name in ("references", "reference") if name in row), None)
    if name:
        value = row.take(name)
        is_list = isinstance(value, str) and value.lstrip().startswith("[")
        value = parse_literal(value, name) if is_list and name == "references" else value
        references = value if isinstance(value, list) and value else [value]
    else:
        references = last_reply(row)
    for reference in references:
        if not isinstance(reference, str) or not reference.strip():
            raise BadRowError(f"{name}: found {shown(reference)}, expected a text")
        check_text(reference, name)
    return ReferencedPrompt(key, groups_of(row, stem), prompt, tuple(references))


def to_asked(row: Fields, key: str, stem: str) -> ReferencedPrompt:
    """A line of a txt file as a prompt; raises BadRowError."""
    conversation = Conversation([{"role": "user", "content": to_document(row)}])
    return ReferencedPrompt(key, (stem,), TaskPrompt(conversation), ())


def last_reply(row: Fields) -> list[str]:
    """The last reply of a chat, without its reasoning, if the row has one with words."""
    with suppress(BadRowError):  # a prompt alone
        last = to_conversation(row).messages[-1]
        return [last["content"]] if last["content"].strip() else []
    return []


# Decoding


class Decoding(NamedTuple):
    """How the tokens of replies are chosen; temperature 0 takes the most likely one."""

    name: str
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 42


GREEDY = Decoding("greedy", temperature=0.0)


def parse_decodings(texts: Sequence[str]) -> list[Decoding]:
    """Settings of `--decoding`: "greedy", or such as "temperature=0.7,top_p=0.9,seed=1".

    Raises:
        UserError: a setting has another form, name or range, or is there twice.
    """
    found: dict[str, Decoding] = {}
    for text in texts:
        values = {}
        for word in text.split(",") if text != GREEDY.name else ():
            name, _, number = word.partition("=")
            try:
                values[name] = (int if name == "seed" else float)(number)
                low, high = BOUNDS[name]
                in_range = low <= values[name] <= high and (name != "top_p" or values[name] > 0)
            except (KeyError, ValueError):
                in_range = False
            if not in_range or text.count(f"{name}=") > 1:
                raise UserError(
                    f"--decoding {text}: found {word!r}, expected greedy, or temperature (0 to 10),"
                    " top_p (above 0, to 1) and seed, such as temperature=0.7,top_p=0.9."
                )
        if text in found:
            raise UserError(f"--decoding {text}: found it twice, expected different settings.")
        found[text] = Decoding(text, **values) if values else GREEDY
    return [*found.values()]


# The task


class RepliesTask:
    """What replies are like, for each decoding and group: see `described`."""

    name = "replies"

    def __init__(
        self,
        rows: Sequence[ReferencedPrompt],
        decodings: Sequence[Decoding] = (GREEDY,),
        max_new_tokens: int = 256,
        batch_size: int = 64,
    ):
        self.rows, self.decodings = rows, decodings
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @property
    def needs_chat(self) -> bool:
        """Whether it asks questions of a chat model."""
        return any(row.prompt.conversation for row in self.rows)

    def run(self, subject: Subject) -> TaskResult:
        """See `Task`; raises UserError, see `fitting_replies`."""
        section: dict[str, dict] = {}
        measures: dict[str, Measure] = {}
        details: dict[str, dict] = {}
        for name, *choice in self.decodings:
            sampling = Sampling(1, self.max_new_tokens, *choice, self.batch_size)
            prompts = [row.prompt for row in self.rows]
            replies = fitting_replies(subject, prompts, sampling, "--replies")
            groups = defaultdict(list)
            for index, reply in replies.items():
                row = self.rows[index]
                details.setdefault(row.key, {"replies": {}})["replies"][name] = reply.text
                for group in ("all", *row.groups):
                    groups[group].append((row, reply))
            section[name] = {}
            for group, pairs in groups.items():
                if group != "all" and len(pairs) == len(replies):
                    continue  # the same once more
                entry, found = described(pairs)
                section[name][group] = entry
                measures |= {f"replies/{name}/{group}/{each}": found[each] for each in found}
            section[name]["all"]["too_long"] = len(self.rows) - len(replies)
        return TaskResult(measures, section, details=details)

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {row.key: (row.prompt.asked, *row.references) for row in self.rows}


def described(pairs: Sequence[tuple[ReferencedPrompt, Reply]]) -> tuple[dict, dict[str, Measure]]:
    """What some replies are like, and what of it is measured item by item.

    Besides `describe_replies`: `distinct_1`, `distinct_2` and `distinct_3`, the share of different
    ones among all runs of so many words or Chinese characters (Li et al., 2016, arXiv 1510.03055).
    Of those with `references`: the means of `rouge_1`, `rouge_2` and `rouge_l`, and by corpus
    `chrf`, `bleu_en` and `bleu_zh`, the latter for items with Chinese references.
    """
    texts = [split_reasoning(reply.text)[1].strip() for _, reply in pairs]
    entry = describe_replies([[reply] for _, reply in pairs])
    units = [units_of(text) for text in texts]
    for n in (1, 2, 3):
        counts = [ngrams(each, n) for each in units]
        total = sum(each.total() for each in counts)
        entry[f"distinct_{n}"] = len(set().union(*counts)) / total if total else 0.0

    # Overlap with references
    measures: dict[str, Measure] = {}
    compared = [(row, text) for (row, _), text in zip(pairs, texts, strict=True) if row.references]
    if compared:
        scores = {row.key: rouge(text, row.references) for row, text in compared}
        for name in ("rouge_l", "rouge_1", "rouge_2"):
            measures[name] = Measure({key: each[name] for key, each in scores.items()})
        references = [row.references for row, _ in compared]
        overlap = corpus_scores([text for _, text in compared], references)
        entry |= {"references": len(compared), **overlap}

    runs = {row.key: repeated_runs(reply.tokens) for row, reply in pairs}
    runs = {key: counts for key, counts in runs.items() if counts[1]}
    if runs:
        shares = {key: repeated / total for key, (repeated, total) in runs.items()}
        weights = {key: total for key, (_, total) in runs.items()}
        measures["repetition"] = Measure(shares, weights=weights, higher_is_better=False)
    measures["stopped"] = Measure({row.key: float(reply.stopped) for row, reply in pairs})
    for name, measure in measures.items():
        found = estimate(measure)
        entry |= {name: found["score"], f"{name}_interval": found["interval"]}
    return rounded(entry), measures
