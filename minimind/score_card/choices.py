"""Multiple choice by likelihood: which of a question's choices does the model find most probable?

Two forms. Letters: the question with its choices listed as A, B, C, D, then the letter, as MMLU and
C-Eval are scored; it needs a model that understands the letters, and small ones do not: they choose
one letter whatever the question is. Cloze: the question, then the text of a choice; it can be above
chance much earlier, and needs a correction for the choices' lengths. The prompts and sums are those
of lm-evaluation-harness's output type "multiple_choice".
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.bad_rows import shown
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.columns import Columns, Fields
from minimind.data.conversations import LETTERS
from minimind.data.messages import Message
from minimind.data.sources import File, expand
from minimind.data.units import HAN_CHARACTER
from minimind.evaluation.scoring import Request, Subject
from minimind.evaluation.statistics import Measure, estimate
from minimind.score_card.minimal_pairs import TIE
from minimind.score_card.prompts import beginning
from minimind.score_card.rows import groups_of, named, read_choices, read_items, take_text
from minimind.score_card.tasks import TaskResult
from minimind.tokenizer import text_encoder

ANSWER = {"en": "Answer:", "zh": "答案："}
# The first stands for the task: acc_norm of lm-evaluation-harness. "cloze_sum" is its acc.
ANSWERS = ("answer", "answerkey", "label")  # before other columns with a response
FORMS = ("cloze_characters", "letters", "cloze_sum", "cloze_tokens", "cloze_bytes")
SPLITS = ("val", "validation", "valid", "test")  # scored; examples come from "dev" beside them


class ChoiceQuestion(NamedTuple):
    """A question, its choices, and the index of the right one; `language` is "en" or "zh"."""

    key: str
    groups: tuple[str, ...]
    subject: str  # of the examples in front of it
    language: str
    text: str
    choices: tuple[str, ...]
    answer: int


class Line(NamedTuple):
    """A prompt in one form and its possible continuations; `right` is the index of the answer."""

    prompt: str
    continuations: tuple[str, ...]
    space: str  # between the two
    right: int

    @property
    def answered(self) -> str:
        """The prompt with its right continuation."""
        return f"{self.prompt}{self.space}{self.continuations[self.right]}"


# Files


def read_multiple_choice(
    files: Sequence[str],
    num_shots: int = 0,
    on_bad_rows: str | None = None,
    columns: Columns | None = None,
) -> tuple[list[ChoiceQuestion], dict[str, list[ChoiceQuestion]]]:
    """The questions of files, and for each subject the examples that precede them: the first
    `num_shots` of the split "dev" beside the file.

    A folder of C-Eval or CMMLU stands for its split "val" or, without one, "test". A row has the
    question, its choices (see `rows.read_choices`) and the answer (see `read_answer`); with a
    `context`, that is in front of the question. The subject is the row's `subject`, else the
    file's name without its split.

    Raises:
        UserError: see `files.read_rows`; a row that is not such a question, or an `id` that occurs
            twice in a file; there are too few examples.
    """
    questions, shots = [], {}
    for file, name in named(_files_of(files)):
        found = read_items([(file, name)], to_question, on_bad_rows, columns)
        questions += found
        if num_shots:
            beside = _dev_file(Path(str(file)))
            examples = defaultdict(list)
            for each in read_items([(beside, name)], to_question, on_bad_rows, columns):
                examples[each.subject].append(each)
            for subject in {question.subject for question in found}:
                if len(examples[subject]) < num_shots:
                    raise UserError(
                        f"--num_shots {num_shots}: {beside} has {len(examples[subject])} examples"
                        f" of {subject}. Give a smaller number."
                    )
                shots[subject] = examples[subject][:num_shots]
    return questions, shots


def _files_of(paths: Sequence[str]) -> list[File]:
    """The files to read; a folder with a split "dev" stands for the split that is scored."""
    chosen: list[str | Path] = []
    for path in paths:
        splits = [Path(path) / name for name in SPLITS if (Path(path) / "dev").is_dir()]
        split = next((each for each in splits if each.is_dir()), None)
        chosen += [split or path]
    return expand(chosen)


def _dev_file(file: Path) -> Path:
    """The file of examples that belongs to a file of questions.

    For ceval/val/law_val.csv it is ceval/dev/law_dev.csv, for questions_test.jsonl
    questions_dev.jsonl; raises UserError.
    """
    stem, split = _split_name(file.stem)
    name = f"{stem}_dev{file.suffix}" if split else file.name
    folder = file.parent.with_name("dev") if file.parent.name in SPLITS else file.parent
    if (found := folder / name) != file and found.is_file():
        return found
    raise UserError(
        f"--num_shots: no examples belong to {file}: {found} does not exist. Write them there, or"
        " leave the option out."
    )


def _split_name(stem: str) -> tuple[str, str]:
    """A file's name without its split, and the split: ("law", "val") of "law_val"."""
    name, _, split = stem.rpartition("_")
    return (name, split) if name and split in (*SPLITS, "dev") else (stem, "")


def to_question(row: Fields, key: str, stem: str) -> ChoiceQuestion:
    """A question of a row; raises BadRowError."""
    text = take_text(row, "prompt")
    if row.get(row.find("context")):
        text = f"{take_text(row, 'context')}\n{text}"
    choices, labels = read_choices(row)
    answer = read_answer(row, choices, labels)
    language = row.get("language")
    if language is None:
        language = "zh" if HAN_CHARACTER.search("".join((text, *choices))) else "en"
    if language not in ANSWER:
        raise BadRowError(f"language: found {shown(language)}, expected en or zh")
    groups = groups_of(row, _split_name(stem)[0], language)
    return ChoiceQuestion(key, groups, groups[0], language, text, choices, answer)


def read_answer(row: Fields, choices: Sequence[str], labels: Sequence[str] | None) -> int:
    """The index of the right choice: given as its label, or else as its index from 0, its letter or
    its text.

    Raises:
        BadRowError: it is none of these, or is two of them that differ, such as 1 for the choices
            "0", "1".
    """
    name = next((name for name in ANSWERS if name in row), row.find("response"))
    value = row.take(name) if name else None
    if value is None or value == "":
        raise BadRowError(f"found keys {row.names} and no answer, expected 'answer'")
    is_index = isinstance(value, int) and not isinstance(value, bool)
    is_index |= isinstance(value, float) and value.is_integer()
    text = str(int(value)) if is_index else value.strip() if isinstance(value, str) else None

    # All that it may mean
    letters, indices = LETTERS[: len(choices)], [*map(str, range(len(choices)))]
    if labels and text in labels:
        return labels.index(text)
    readings = {index for index, choice in enumerate(choices) if choice == text and not is_index}
    lists = [indices] if is_index else [] if labels else [letters, letters.lower(), indices]
    readings |= {names.index(text) for names in map(list, lists) if text in names}
    if len(readings) == 1:
        return readings.pop()

    names = ", ".join(labels or letters)
    expected = f"one of {names}, or the text of a choice"
    if not labels:
        last = len(choices) - 1
        expected = f"an index from 0 to {last}, one of {names}, or the text of a choice"
    if readings:
        raise BadRowError(
            f"{name}: found {shown(value)}, which is the text of one choice and stands for another,"
            f" expected {expected}, with one meaning"
        )
    raise BadRowError(f"{name}: found {shown(value)}, expected {expected}")


# Prompts


def lines_of(question: ChoiceQuestion) -> dict[str, Line]:
    """The prompt and continuations of a question in both forms.

    Between them is a space, as lm-evaluation-harness has it, but none before a choice in Chinese.
    """
    letters = LETTERS[: len(question.choices)]
    listed = [f"{letter}. {text}" for letter, text in zip(letters, question.choices, strict=True)]
    asked = "\n".join((question.text, *listed, ANSWER[question.language]))
    space = "" if question.language == "zh" else " "
    return {
        "letters": Line(asked, tuple(letters), " ", question.answer),
        "cloze": Line(question.text, question.choices, space, question.answer),
    }


def text_requests(
    encoder: Tokenizer, begin: tuple[int, ...], items: Sequence[tuple[str, Sequence[str]]]
) -> list[list[Request]]:
    """For each prompt and its continuations, the requests of these as text.

    Prompt and continuation are encoded as one text, as in training: the space between them belongs
    to the continuation's first token. Where a token reaches across the border, in any of the
    continuations, what is scored begins at this token in all of them: no token is lost, and all are
    scored by the same part of the text.

    Args:
        begin: the ids that begin a text; one at least, if a prompt has no token of its own.
    """
    texts = [
        text
        for prompt, continuations in items
        for text in (prompt.rstrip(), *(prompt + each for each in continuations))
    ]
    encoded = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
    requests = []
    for _, continuations in items:
        alone, *wholes = [next(encoded).ids for _ in range(len(continuations) + 1)]
        same = [len(set(ids)) == 1 for ids in zip(alone, *wholes, strict=False)]
        border = [*same, False].index(False)
        requests.append([Request((*begin, *ids[:border]), tuple(ids[border:])) for ids in wholes])
    return requests


def exchange(question: str, answer: str | None = None) -> list[Message]:
    """A user's message, and the reply to it."""
    messages = [{"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def fitting(requests: Sequence[Request], max_length: int, key: str) -> tuple[list[Request], bool]:
    """The requests of a question without the start of their context, where that is too long for an
    input of `max_length`, and whether it was.

    Raises:
        UserError: a continuation alone is too long, or has no token.
    """
    longest = max(len(request.continuation) for request in requests)
    if longest > max_length or not all(request.continuation for request in requests):
        raise UserError(
            f"--choices: a choice of {key} has {longest:,} tokens, expected 1 to {max_length:,}, so"
            " that it fits behind a question. Leave the row out."
        )
    room = max_length + 1 - longest  # the last token is predicted, not read
    cut = len(requests[0].context) > room
    return [Request(context[-room:], each) for context, each in requests], cut


def first_places(scores: Sequence[float]) -> list[float]:
    """The share of each score in the first place: 1 for the highest; k equal ones have 1 / k. The
    same numbers added in another order are equal too."""
    first = np.asarray(scores) >= max(scores) - TIE
    return (first / first.sum()).tolist()


class ChoicesTask:
    """Shares of questions whose right choice is the most probable one, in the forms of `FORMS`.

    A choice that ties with k - 1 others for the first place counts 1 / k if it is the right one.
    Chance is the mean of 1 / the number of choices.

    Args:
        shots: for each subject, examples that precede its questions.
        chat: whether the questions are a user's messages in the model's chat template.
    """

    name = "choices"

    def __init__(
        self,
        questions: Sequence[ChoiceQuestion],
        shots: Mapping[str, Sequence[ChoiceQuestion]] | None = None,
        chat: bool = False,
    ):
        self.questions, self.shots, self.chat = questions, dict(shots or {}), chat

    @property
    def needs_chat(self) -> bool:
        """Whether it asks questions of a chat model."""
        return self.chat

    def run(self, subject: Subject) -> TaskResult:
        """See `Task`; raises UserError where a choice does not fit into the model's positions."""
        requests, truncated = [], 0
        for form in ("letters", "cloze"):
            made = self._requests(subject.tokenizer, form)
            for question, each in zip(self.questions, made, strict=True):
                fitted, cut = fitting(each, subject.max_length, question.key)
                requests.append(fitted)
                truncated += cut
        flat = [request for each in requests for request in each]
        found = iter(subject.log_probabilities(flat, "multiple choice"))

        # The probabilities of the choices, and what each form makes of them
        scores = [[next(found) for _ in each] for each in requests]
        letters, cloze = scores[: len(self.questions)], scores[len(self.questions) :]
        right: dict[str, dict[str, float]] = {form: {} for form in FORMS}
        chosen: dict[str, list[float]] = {}
        details = {}
        for question, by_letter, by_text in zip(self.questions, letters, cloze, strict=True):
            shares = first_places([each.sum() for each in by_letter])
            right["letters"][question.key] = shares[question.answer]
            chosen[question.key] = shares
            sums = np.array([each.sum() for each in by_text])
            details[question.key] = {
                "answer": LETTERS[question.answer],
                "letters": [float(each.sum()) for each in by_letter],
                "cloze": sums.tolist(),
            }
            lengths = {
                "sum": np.ones(len(sums)),
                "tokens": np.array([len(each) for each in by_text]),
                "characters": np.array([len(text) for text in question.choices]),
                "bytes": np.array([len(text.encode()) for text in question.choices]),
            }
            for name, length in lengths.items():
                shares = first_places(sums / length)
                right[f"cloze_{name}"][question.key] = shares[question.answer]
        return self._result(right, chosen, truncated)._replace(details=details)

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """See `Task`."""
        return {question.key: (question.text,) for question in self.questions}

    def shuffled(self, generator: np.random.Generator) -> "ChoicesTask":
        """See `Task`: which choice is the right one is drawn anew."""
        drawn = [int(generator.integers(len(each.choices))) for each in self.questions]
        pairs = zip(self.questions, drawn, strict=True)
        questions = [question._replace(answer=answer) for question, answer in pairs]
        return ChoicesTask(questions, self.shots, self.chat)

    def _requests(self, tokenizer: PreTrainedTokenizerFast, form: str) -> list[list[Request]]:
        """The requests of each question, after its examples."""
        lines = [lines_of(question)[form] for question in self.questions]
        examples = [
            [lines_of(shot)[form] for shot in self.shots.get(question.subject, ())]
            for question in self.questions
        ]
        encoder = text_encoder(tokenizer)
        if not self.chat:
            prompts = [
                "".join([*(f"{shot.answered}\n\n" for shot in shots), line.prompt])
                for line, shots in zip(lines, examples, strict=True)
            ]
            spaced = [[line.space + each for each in line.continuations] for line in lines]
            items = list(zip(prompts, spaced, strict=True))
            requests = text_requests(encoder, beginning(tokenizer), items)
            # A text without anything in front of it is a document, which follows an end token
            end = (tokenizer.eos_token_id,)
            return [[Request(context or end, ids) for context, ids in each] for each in requests]

        # A reply follows the header that the template writes, which ends with a border of tokens
        prompts = []
        for line, shots in zip(lines, examples, strict=True):
            turns = [(shot.prompt, shot.continuations[shot.right]) for shot in shots]
            messages = [message for turn in turns for message in exchange(*turn)]
            prompts.append([*messages, *exchange(line.prompt)])
        contexts = encode_prompts(prompts, ChatEncoder(tokenizer))
        texts = [text for line in lines for text in line.continuations]
        encoded = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
        return [
            [Request(tuple(context), tuple(next(encoded).ids)) for _ in line.continuations]
            for line, context in zip(lines, contexts, strict=True)
        ]

    def _result(self, right: Mapping, chosen: Mapping, truncated: int) -> TaskResult:
        groups = defaultdict(list)
        for question in self.questions:
            for group in ("all", *question.groups):
                groups[group].append(question)
        section, measures = {}, {}
        for group, questions in groups.items():
            if group != "all" and len(questions) == len(self.questions):
                continue  # the same once more
            chance = fmean(1 / len(question.choices) for question in questions)
            entry = {"n": len(questions), "chance": chance}
            for form in FORMS:
                values = {question.key: right[form][question.key] for question in questions}
                measure = measures[f"choices/{group}/{form}"] = Measure(values, chance)
                found = estimate(measure)
                entry |= {form: found["score"], f"{form}_interval": found["interval"]}
            picked = zip_longest(*(chosen[question.key] for question in questions), fillvalue=0.0)
            entry["letters_chosen"] = dict(zip(LETTERS, map(fmean, picked), strict=False))
            section[group] = entry
        section["all"]["truncated"] = truncated
        return TaskResult(measures, section)
