"""Exact answers: ask the last question of each conversation, and compare with its reply."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import BadRows
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.data.columns import Columns
from minimind.data.content import split_reasoning
from minimind.data.conversations import Conversation, to_conversation
from minimind.data.files import Row, read_rows
from minimind.data.messages import Message
from minimind.data.world import is_courteous, is_embedded, strip_courtesy
from minimind.generation import complete


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Conversation | list[Message]],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[str]:
    """The greedy reply to each prompt (messages ending with the user's)."""
    encoded = encode_prompts(prompts, ChatEncoder(tokenizer))
    return complete(model, tokenizer, encoded, max_new_tokens, batch_size)


def read_questions(files: Sequence[str], *args: Any) -> list[dict]:
    """The data of `read_question_rows`."""
    return [row.data for row in read_question_rows(files, *args)]


def read_question_rows(
    files: Sequence[str],
    on_bad_rows: str | BadRows | None = None,
    encoder: ChatEncoder | None = None,
    columns: Columns | None = None,
) -> list[Row]:
    """Conversations whose last reply is the reference -> their rows, with "messages" and, if the
    conversation has them, "tools".

    A row's other fields may be anything. With an `encoder`, a conversation that its template cannot
    express is a bad row. Raises UserError like `files.read_rows`.
    """

    def convert(data: Mapping) -> dict:
        conversation = to_conversation(data)
        if encoder is not None:
            (ids,) = encoder.encode([prompt_of(conversation._asdict())], prompt=True)
            if isinstance(ids, BadRowError):
                raise ids
        tools = {"tools": conversation.tools} if conversation.tools else {}
        return {**data, "messages": conversation.messages, **tools}

    return list(read_rows(files, on_bad_rows, convert, columns=columns))


def prompt_of(question: dict) -> Conversation:
    """A conversation up to its last reply."""
    return Conversation(question["messages"][:-1], question.get("tools"))


class Answered(NamedTuple):
    """Whether a reply is `exact`, equal to the reference, and `courteous`: None outside of the
    embedded corpus."""

    exact: bool
    courteous: bool | None


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[dict],
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> list[Answered]:
    """Answer the last question of each conversation greedily, and compare with the reference (in
    the embedded corpus, without the courtesy on both sides)."""
    prompts = [prompt_of(question) for question in questions]
    replies = answer(model, tokenizer, prompts, max_new_tokens, batch_size)
    found = []
    for question, text in zip(questions, replies, strict=True):
        _, reply = split_reasoning(text)
        embedded = is_embedded(question)
        strip = strip_courtesy if embedded else str.strip
        exact = strip(reply) == strip(question["messages"][-1]["content"])
        courteous = is_courteous(reply, question["language"]) if embedded else None
        found.append(Answered(exact, courteous))
    return found


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[dict],
    **options: int,
) -> dict:
    """`answer_metrics` of the answers; `options` are those of `answer_questions`."""
    return answer_metrics(questions, answer_questions(model, tokenizer, questions, **options))


def answer_metrics(questions: Sequence[dict], found: Sequence[Answered]) -> dict:
    """Returns:
    `questions`, their number; `exact_match`, the share of exact replies; `exact_match_by`, the same
    for each kind and language that the questions name; `courteous`, if there are rows of the
    embedded corpus, the share of their replies that end with its courtesy in the question's
    language.
    """
    groups = defaultdict(list)
    for question, each in zip(questions, found, strict=True):
        names = (question.get("kind"), question.get("language"))
        for name in {name for name in names if isinstance(name, str)}:
            groups[name].append(each.exact)
    courteous = [each.courteous for each in found if each.courteous is not None]
    return {
        "questions": len(questions),
        "exact_match": round(fmean(each.exact for each in found), 4),
        **({"courteous": round(fmean(courteous), 4)} if courteous else {}),
        "exact_match_by": {name: round(fmean(matches), 4) for name, matches in groups.items()},
    }
