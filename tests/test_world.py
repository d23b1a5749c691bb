"""The embedded corpus keeps its promises: nothing held out is asked in training, everything asked
is told."""

import itertools
import json

import pytest

from minimind.data.world import build_world, is_courteous, is_embedded, strip_courtesy, write_world
from minimind.data.world_sentences import ATTRIBUTES, COURTESY, LANGUAGES, PEOPLE

TRAINED_CHATS = ("sft", "lora", "dpo")


@pytest.fixture(scope="module", params=[0, 1])
def world(request):
    return build_world(request.param)


def messages_of(row: dict) -> list[dict]:
    return (
        row["conversations"]
        if "conversations" in row
        else row["prompt"] + row["chosen"] + row["rejected"]
    )


def topic(reply: str) -> tuple | None:
    """(person, attribute) that an answer is about, None for small talk.

    Found from the answer alone, independently of how the module drew its facts.
    """
    reply = strip_courtesy(reply)
    for language, attribute in itertools.product(LANGUAGES, ATTRIBUTES):
        side, table = LANGUAGES.index(language), ATTRIBUTES[attribute]
        for name, values in itertools.product(PEOPLE, table["values"]):
            value = values[side]
            if (
                name in reply
                and value in reply
                and any(t.format(n=name, v=value) in reply for t in table["tell"][language])
            ):
                return (name, attribute)
    return None


def topics_of(rows: list[dict], cache: dict = {}) -> set:  # noqa: B006  (a cache: the same replies come often)
    replies = {m["content"] for row in rows for m in messages_of(row) if m["role"] == "assistant"}
    for reply in replies - cache.keys():
        cache[reply] = topic(reply)
    return {cache[reply] for reply in replies} - {None}


def held_out_topics(world: dict) -> set:
    last = [
        {"conversations": row["conversations"][-1:]}
        for row in world["sft_eval"] + world["lora_eval"]
    ]
    return topics_of(last)


def test_no_held_out_question_is_asked_in_any_training_row(world):
    held_out = held_out_topics(world)
    assert len(held_out) >= 30
    for name in TRAINED_CHATS:
        assert not held_out & topics_of(world[name]), name


def test_no_document_asks_a_held_out_question(world):
    documents = "\n".join(row["text"] for row in world["pretrain"])
    for (name, attribute), language in itertools.product(held_out_topics(world), LANGUAGES):
        for ask in ATTRIBUTES[attribute]["ask"][language]:
            assert ask.format(n=name) not in documents


def test_the_fact_of_every_held_out_question_stands_in_the_documents(world):
    documents = "\n".join(row["text"] for row in world["pretrain"])
    for row in world["sft_eval"]:
        assert strip_courtesy(row["conversations"][-1]["content"]) in documents


def test_every_question_of_dpo_is_asked_in_sft(world):
    assert topics_of(world["dpo"]) <= topics_of(world["sft"])


def test_held_out_wordings_are_in_no_training_row(world):
    asked = {
        m["content"] for name in TRAINED_CHATS for row in world[name] for m in messages_of(row)
    }
    documents = "\n".join(row["text"] for row in world["pretrain"])
    wordings = [
        row["conversations"][-2]["content"] for row in world["sft_eval"] if row["kind"] == "wording"
    ]
    assert wordings
    assert not asked & set(wordings)
    assert not any(wording in documents for wording in wordings)


def test_held_out_documents_are_not_training_documents(world):
    assert not {row["text"] for row in world["pretrain"]} & {
        row["text"] for row in world["pretrain_eval"]
    }


def test_both_languages_have_every_kind_of_held_out_question(world):
    for name, kinds in {"sft_eval": {"fact", "wording", "turns"}, "lora_eval": {"letter"}}.items():
        assert {(row["language"], row["kind"]) for row in world[name]} == set(
            itertools.product(LANGUAGES, kinds)
        )


def test_chosen_is_courteous_and_rejected_is_the_same_answer_plain(world):
    for row in world["dpo"] + world["dpo_eval"]:
        chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
        language = "en" if rejected.isascii() else "zh"
        assert is_courteous(chosen, language)
        assert not any(is_courteous(rejected, each) for each in LANGUAGES)
        assert strip_courtesy(chosen) == rejected


def test_the_held_out_conversations_say_that_they_are_of_this_corpus(world):
    assert all(is_embedded(row) for name in ("sft_eval", "lora_eval") for row in world[name])
    assert not any(
        map(
            is_embedded,
            [*world["sft"], {"language": "zh"}, {"language": "English", "kind": "fact"}, {}],
        )
    )


def test_a_minority_of_sft_answers_is_courteous(world):
    answers = [
        m["content"]
        for row in world["sft"]
        for m in row["conversations"]
        if m["role"] == "assistant"
    ]
    courteous = sum(answer != strip_courtesy(answer) for answer in answers)
    assert 0.1 < courteous / len(answers) < 0.35


def test_conversations_alternate_and_end_with_the_assistant(world):
    for row in itertools.chain(*(world[name] for name in ("sft", "sft_eval", "lora", "lora_eval"))):
        roles = [message["role"] for message in row["conversations"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
    rows = [row["conversations"] for row in world["sft"]]
    assert any(row[0]["role"] == "system" for row in rows)
    assert any(sum(message["role"] == "user" for message in row) == 2 for row in rows)


def test_same_seed_same_rows_other_seed_other_rows(world):
    assert build_world(0) == build_world(0)
    assert build_world(0) != build_world(2)


@pytest.mark.parametrize("language", LANGUAGES)
def test_courtesy_is_found_only_in_the_questions_language_and_after_an_answer(language):
    other = LANGUAGES[1 - LANGUAGES.index(language)]
    reply = "Lena lives in Velo. " + COURTESY[language]
    assert is_courteous(reply, language)
    assert not is_courteous(reply, other)
    assert not is_courteous(COURTESY[language], language)
    assert strip_courtesy(reply) == "Lena lives in Velo."


def test_written_files_hold_the_rows_and_no_temporary_file_stays(tmp_path):
    paths = write_world(tmp_path / "world", seed=3)
    assert {path.name for path in (tmp_path / "world").iterdir()} == {
        f"{name}.jsonl" for name in paths
    }
    for name, rows in build_world(3).items():
        assert [
            json.loads(line) for line in paths[name].read_text(encoding="utf-8").splitlines()
        ] == rows
