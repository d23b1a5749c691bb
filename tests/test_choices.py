"""Multiple choice by likelihood, against log-probabilities computed one by one, and its traps."""

import csv

import numpy as np
import pytest
import torch

from minimind.common.errors import UserError
from minimind.data.template_choice import set_chat_template
from minimind.evaluation.scoring import ModelSubject
from minimind.evaluation.statistics import estimate
from minimind.score_card import ChoicesTask, read_multiple_choice
from minimind.score_card.choices import first_places, text_requests
from minimind.score_card.prompts import beginning
from minimind.tokenizer import load_tokenizer, text_encoder, train_tokenizer

ROWS = [
    {"question": "the quick brown fox", "choices": ["the lazy dog", "home"], "answer": 0},
    {"question": "runs", "A": "home", "B": "the dog runs", "C": "fox", "answer": "C"},
    {"question": "the dog", "choices": {"text": ["fox", "runs home"], "label": ["1", "2"]},
     "answerKey": "2"},
    {"question": "棕色狐狸？", "choices": ["跳过了狗", "跑"], "answer": "跑"},
]  # fmt: skip


def log_probability(model, prompt, continuation):
    """The oracle: the sum of the log-probabilities of some ids after others, one forward, no
    batch."""
    ids = torch.tensor([[*prompt, *continuation]])
    with torch.no_grad():
        found = model(ids).logits[0].double().log_softmax(-1)
    start = len(prompt) - 1
    return sum(found[start + i, token].item() for i, token in enumerate(continuation))


def oracle(model, tokenizer, prompt, continuations):
    """The harness's rule: the ids of the whole text after those of the prompt."""
    encode = text_encoder(tokenizer).encode
    context = encode(prompt).ids
    return [
        log_probability(model, context, encode(prompt + each).ids[len(context) :])
        for each in continuations
    ]


@pytest.fixture
def subject(model, tokenizer):
    return ModelSubject(model, tokenizer)


@pytest.fixture
def read(write_jsonl):
    def read(rows, name="set.jsonl", **options):
        return read_multiple_choice([write_jsonl(name, rows)], **options)

    return read


class Fixed:
    """A subject that gives each continuation the log-probability of `score`."""

    max_length = 256

    def __init__(self, tokenizer, score):
        self.tokenizer, self.score, self.seen = tokenizer, score, []

    def log_probabilities(self, requests, title=""):
        self.seen += requests
        return [self.score(request) for request in requests]


def test_scores_are_those_of_single_forwards_in_each_form(model, subject, tokenizer, read):
    questions, _ = read(ROWS)
    result = ChoicesTask(questions).run(subject)
    prompts = [
        "the quick brown fox\nA. the lazy dog\nB. home\nAnswer:",
        "runs\nA. home\nB. the dog runs\nC. fox\nAnswer:",
        "the dog\nA. fox\nB. runs home\nAnswer:",
        "棕色狐狸？\nA. 跳过了狗\nB. 跑\n答案：",
    ]
    assert [each.answer for each in questions] == [0, 2, 1, 1]
    for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        names = [f" {letter}" for letter in "ABC"[: len(question.choices)]]
        letters = oracle(model, tokenizer, prompt, names)
        space = "" if number == 3 else " "
        spaced = [space + text for text in question.choices]
        sums = oracle(model, tokenizer, question.text, spaced)
        tokens = [
            len(text_encoder(tokenizer).encode(question.text + text).ids)
            - len(text_encoder(tokenizer).encode(question.text).ids)
            for text in spaced
        ]
        expected = {"letters": letters, "cloze_sum": sums}
        lengths = {"tokens": tokens, "characters": [*map(len, question.choices)]}
        lengths["bytes"] = [len(text.encode()) for text in question.choices]
        for name, length in lengths.items():
            expected[f"cloze_{name}"] = np.divide(sums, length)
        for form, scores in expected.items():
            right = float(np.argmax(scores) == question.answer)
            assert result.measures[f"choices/all/{form}"].values[question.key] == right
    assert next(iter(result.measures)) == "choices/all/cloze_characters"


def test_sums_equal_the_oracle_to_a_millionth(model, subject, tokenizer):
    encoder = text_encoder(tokenizer)
    prompt, continuations = "the quick brown fox\nAnswer:", [" the lazy dog", " 狐狸"]
    (requests,) = text_requests(encoder, (), [(prompt, continuations)])
    found = [each.sum() for each in subject.log_probabilities(requests)]
    assert found == pytest.approx(oracle(model, tokenizer, prompt, continuations), abs=1e-5)


def test_lengths_decide_where_the_sums_favour_the_shorter_choice(tokenizer, read):
    """Every token costs 1 nat: by the sum the shorter choice wins whatever is right."""
    rows = [{"question": "the", "choices": ["dog", "lazy dog runs home"], "answer": 1}]
    questions, _ = read(rows)
    task = ChoicesTask(questions)
    flat = task.run(Fixed(tokenizer, lambda request: -np.ones(len(request.continuation))))
    score = {name.split("/")[2]: [*m.values.values()] for name, m in flat.measures.items()}
    assert score["cloze_sum"] == [0.0]
    assert score["cloze_tokens"] == [0.5]  # a tie
    assert score["cloze_characters"] == [1.0]  # several characters to a token

    rows = [{"question": "the", "choices": ["ab", "狗狗"], "answer": 1}]
    questions, _ = read(rows)
    by_bytes = ChoicesTask(questions).run(Fixed(tokenizer, lambda request: np.array([-1.0])))
    score = {name.split("/")[2]: [*m.values.values()] for name, m in by_bytes.measures.items()}
    assert score["cloze_characters"] == [0.5]
    assert score["cloze_bytes"] == [1.0]


def test_equal_scores_share_the_place_and_are_chance_not_success(tokenizer, read):
    questions, _ = read(ROWS)
    result = ChoicesTask(questions).run(Fixed(tokenizer, lambda request: np.zeros(1)))
    chance = (1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4
    for measure in result.measures.values():
        if len(measure.values) == 4:
            assert estimate(measure)["score"] == pytest.approx(chance)
            assert measure.chance == pytest.approx(chance)
    assert result.section["all"]["chance"] == pytest.approx(chance)
    assert first_places([1.0, 3.0, 3.0]) == [0, 0.5, 0.5]


def test_the_share_of_each_letter_shows_a_model_that_always_chooses_one(tokenizer, read):
    last = text_encoder(tokenizer).encode(" B").ids[-1]
    prefers_b = Fixed(
        tokenizer, lambda request: np.array([float(request.continuation[-1] == last)])
    )
    questions, _ = read(ROWS)
    section = ChoicesTask(questions).run(prefers_b).section["all"]
    assert section["letters_chosen"] == {"A": 0, "B": 1, "C": 0}
    assert section["letters"] == 0.5  # of four answers, A C B B


@pytest.fixture(scope="module")
def spanning():
    """A tokenizer that has "：A" and "ab" as single tokens."""
    return train_tokenizer(["答案：A答案：A ab ab"] * 50, vocab_size=280)


def test_a_token_across_the_border_is_scored_and_so_is_its_text_in_the_other_choices(spanning):
    encoder = text_encoder(spanning)
    whole = encoder.encode("xab").ids
    alone = encoder.encode("xa").ids
    assert whole[: len(alone)] != alone  # the trap: "a" and "ab" are different tokens
    ((first, second),) = text_requests(encoder, (), [("xa", ["b", "c"])])
    assert first.context == second.context
    for request, text in ((first, "xab"), (second, "xac")):
        assert [*request.context, *request.continuation] == encoder.encode(text).ids
        assert spanning.decode(request.continuation) == text[1:]


def test_the_space_belongs_to_the_continuation_also_where_the_prompt_ends_with_it(tokenizer):
    encoder = text_encoder(tokenizer)
    items = [("the dog", [" runs"]), ("the dog ", ["runs"])]
    after, before = text_requests(encoder, (), items)
    assert after == before
    assert tokenizer.decode(after[0].continuation) == " runs"


def test_a_prompt_without_a_token_of_its_own_follows_the_end_token(spanning, read):
    questions, _ = read([{"question": "a", "choices": ["b", "c"], "answer": 0, "language": "zh"}])
    fixed = Fixed(spanning, lambda request: np.zeros(1))
    ChoicesTask(questions).run(fixed)
    cloze = fixed.seen[2:]
    assert [request.context for request in cloze] == [(spanning.eos_token_id,)] * 2
    assert [spanning.decode(request.continuation) for request in cloze] == ["ab", "ac"]


def test_a_bos_token_is_in_front_once_and_only_where_the_tokenizer_writes_one(tokenizer_dir, read):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tokenizer_dir)
    assert beginning(tokenizer) == ()
    bos = tokenizer.convert_ids_to_tokens(1)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 1)]
    )
    assert beginning(tokenizer) == (1,)
    questions, shots = read([ROWS[0]])
    fixed = Fixed(tokenizer, lambda request: np.zeros(1))
    ChoicesTask(questions, shots).run(fixed)
    for request in fixed.seen:
        assert request.context[0] == 1
        assert 1 not in (*request.context[1:], *request.continuation)


def test_control_tokens_in_a_question_are_text(tokenizer, read):
    end = tokenizer.eos_token
    questions, _ = read([{"question": f"the {end}", "choices": ["dog", end], "answer": 0}])
    fixed = Fixed(tokenizer, lambda request: np.zeros(1))
    ChoicesTask(questions).run(fixed)
    assert not any(tokenizer.eos_token_id in (*r.context, *r.continuation) for r in fixed.seen)


def test_a_long_prompt_loses_its_start_and_is_counted_and_a_long_choice_is_refused(tokenizer, read):
    questions, _ = read(
        [{"question": "the dog runs home " * 9, "choices": ["fox", "dog"], "answer": 0}]
    )
    fixed = Fixed(tokenizer, lambda request: np.zeros(1))
    fixed.max_length = 12
    assert ChoicesTask(questions).run(fixed).section["all"]["truncated"] == 2  # in both forms
    assert max(len(r.context) + len(r.continuation) for r in fixed.seen) == 13  # 12 are read
    assert len({r.context for r in fixed.seen[2:]}) == 1  # all choices after the same text
    fixed.max_length = 0
    with pytest.raises(UserError, match=r"a choice of set#0 has \d+ tokens, expected 1 to 0"):
        ChoicesTask(questions).run(fixed)


def test_in_a_chat_the_choice_is_the_reply_after_the_templates_header(model, tokenizer_dir, read):
    tokenizer = load_tokenizer(tokenizer_dir)
    set_chat_template(tokenizer, "chatml")
    questions, _ = read([ROWS[0]])
    fixed = Fixed(tokenizer, lambda request: np.zeros(1))
    task = ChoicesTask(questions, {"set": questions}, chat=True)
    assert task.needs_chat
    task.run(fixed)
    shown = [tokenizer.decode(request.context) for request in fixed.seen]
    asked = "the quick brown fox\nA. the lazy dog\nB. home\nAnswer:"
    for message in (f"user\n{asked}", "assistant\nA"):
        assert message in shown[0]
    assert shown[0].endswith("assistant\n")
    assert [tokenizer.decode(request.continuation) for request in fixed.seen] == [
        "A", "B", "the lazy dog", "home",
    ]  # fmt: skip


# Files


@pytest.fixture
def ceval(tmp_path):
    """Folders as C-Eval and CMMLU have them."""

    def write(path, header, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    header = ["id", "question", "A", "B", "C", "D", "answer"]
    for subject in ("law", "art"):
        rows = [[n, f"{subject}的问题{n}", "甲", "乙", "丙", "丁", "ABCD"[n % 4]] for n in range(6)]
        write(tmp_path / f"ceval/val/{subject}_val.csv", header, rows)
        write(tmp_path / f"ceval/test/{subject}_test.csv", header[:-1], [r[:-1] for r in rows])
        explained = [[*row, "因为"] for row in rows[:5]]
        write(tmp_path / f"ceval/dev/{subject}_dev.csv", [*header, "explanation"], explained)
        header_2 = ["", "Question", "A", "B", "C", "D", "Answer"]
        write(tmp_path / f"cmmlu/test/{subject}.csv", header_2, rows)
        write(tmp_path / f"cmmlu/dev/{subject}.csv", header_2, rows[:5])
    return tmp_path


@pytest.mark.parametrize("path", ["ceval", "ceval/val", "cmmlu", "cmmlu/test"])
def test_folders_of_c_eval_and_cmmlu_are_read_with_their_examples(ceval, path, tokenizer):
    questions, shots = read_multiple_choice([str(ceval / path)], num_shots=2)
    assert len(questions) == 12
    assert {question.subject for question in questions} == {"law", "art"}
    assert [question.answer for question in questions[:6]] == [0, 1, 2, 3, 0, 1]
    assert [shot.text for shot in shots["law"]] == ["law的问题0", "law的问题1"]
    fixed = Fixed(tokenizer, lambda request: np.zeros(1))
    section = ChoicesTask(questions, shots).run(fixed).section
    assert set(section) == {"all", "law", "art"}
    assert section["law"]["n"] == 6
    prompt = tokenizer.decode(fixed.seen[-1].context)
    assert prompt == "law的问题0甲\n\nlaw的问题1乙\n\nlaw的问题5"


def test_examples_are_refused_where_there_are_none_or_too_few(ceval, read):
    with pytest.raises(UserError, match=r"law_dev.csv has 5 examples of law. Give a smaller"):
        read_multiple_choice([str(ceval / "ceval/val/law_val.csv")], num_shots=6)
    with pytest.raises(UserError, match=r"no examples belong to .*set.jsonl"):
        read(ROWS, num_shots=1)
    with pytest.raises(UserError, match=r"set_dev.jsonl does not exist"):
        read(ROWS, name="set_test.jsonl", num_shots=1)


def test_rows_without_answers_such_as_c_evals_test_split_are_refused(ceval):
    with pytest.raises(UserError, match=r"art_test.csv:2: found keys .* and no answer"):
        read_multiple_choice([str(ceval / "ceval/test")])


TWO = {"question": "q", "choices": ["x", "y"]}
BAD = {
    "no question": ({"choices": ["x", "y"], "answer": 0}, "or 'question': a text"),
    "no choices": ({"question": "q", "answer": "A"}, "expected 'choices'"),
    "missing answer": (TWO, "and no answer, expected 'answer'"),
    "index outside": (TWO | {"answer": 2}, "answer: found 2, expected an index from 0 to 1"),
    "negative": (TWO | {"answer": -1}, "answer: found -1, expected"),
    "letter outside": (TWO | {"answer": "C"}, 'answer: found "C", expected'),
    "text outside": (TWO | {"answer": "z"}, 'answer: found "z"'),
    "true": (TWO | {"answer": True}, "answer: found true"),
    "two meanings": ({"question": "q", "choices": ["1", "0"], "answer": "1"}, "with one meaning"),
    "letter of another": ({"question": "q", "choices": ["B", "A"], "answer": "A"}, "one meaning"),
    "one choice": ({"question": "q", "choices": ["x"], "answer": 0}, "found 1 choices, expected 2"),
    "eleven": ({"question": "q", "choices": [*map(str, range(11))], "answer": 0}, "found 11"),
    "empty choice": ({"question": "q", "choices": ["x", " "], "answer": 0}, "choice B: found an"),
    "equal choices": ({"question": "q", "choices": ["x", "y", "x "], "answer": 0}, "A and C equal"),
    "no text": ({"question": "q", "choices": ["x", None], "answer": 0}, "choice B: found null"),
    "gap": ({"question": "q", "A": "x", "B": None, "C": "y", "answer": "A"}, "B: found nothing"),
    "labels": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"},
        "expected a label for each",
    ),
    "label outside": (
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "0"},
        'answer: found "0", expected one of 1, 2, or the text of a choice',
    ),
    "language": (TWO | {"answer": 0, "language": "fr"}, 'language: found "fr", expected en or zh'),
    "NUL": (TWO | {"question": "q\0", "answer": 0}, "found a NUL character"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_with_their_line(read, name):
    row, message = BAD[name]
    with pytest.raises(UserError) as error:
        read([ROWS[0], row], on_bad_rows="error")
    assert "set.jsonl:2: " in str(error.value)
    assert message in str(error.value)


def test_an_id_that_occurs_twice_is_refused(read):
    rows = [ROWS[0] | {"id": 7}, ROWS[1] | {"id": 7}]
    with pytest.raises(UserError, match=r"set.jsonl:2: found the id 7 twice"):
        read(rows, on_bad_rows="error")


def test_files_of_one_name_in_two_folders_keep_their_items_apart(ceval, tmp_path):
    paths = [str(ceval / "ceval/val/law_val.csv"), str(tmp_path / "other/law_val.csv")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/law_val.csv").write_bytes((ceval / "ceval/val/law_val.csv").read_bytes())
    questions, _ = read_multiple_choice(paths)
    assert len({question.key for question in questions}) == 12


def test_a_context_precedes_its_question_and_numbers_are_choices(read):
    row = {"context": "a text", "question": "q?", "choices": [3, 4.5], "answer": 1}
    ((question,), _) = read([row])
    assert (question.text, question.choices, question.answer) == ("a text\nq?", ("3", "4.5"), 1)
