import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from minimind.common.errors import UserError
from minimind.data.conversations import Conversation
from minimind.data.documents import load_blocks
from minimind.data.packing import BlockCollator
from minimind.data.world_sentences import COURTESY
from minimind.evaluation import (
    answer,
    answers,
    bits_per_byte,
    evaluate,
    held_out_metrics,
    language_model_metrics,
    read_questions,
    score,
)
from minimind.tokenizer import train_tokenizer
from minimind.training.data_arguments import DataArguments
from minimind.training.trainers import BlockTrainer

BLOCK = 16
TEXTS = [f"{number} brown foxes jump, 棕色狐狸 {number}" for number in range(20)]


@pytest.fixture(params=[("wrapped", False), ("wrapped", True), ("bfd_split", True)], ids=str)
def packing(request):
    return request.param


@pytest.fixture
def blocks(tokenizer, write_jsonl, packing):
    train = write_jsonl("train.jsonl", [{"text": text} for text in TEXTS])
    return load_blocks(DataArguments([train], [train]), tokenizer, BLOCK, *packing)


@pytest.fixture
def trainer(model, blocks, packing, tmp_path):
    """A trainer that can evaluate `blocks`."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    # The batch size does not divide the blocks: the last batch is smaller and must not count for
    # more.
    arguments.per_device_eval_batch_size = next(
        size for size in (4, 3, 5) if len(blocks.eval) % size
    )
    return BlockTrainer(
        model=model,
        args=arguments,
        eval_dataset=blocks.eval,
        data_collator=BlockCollator(0, 2, document_mask=packing[1]),
        eval_counts=blocks.facts["eval"],
    )


def summed_loss_tokens_and_bytes(model, tokenizer, blocks, document_mask):
    """The oracle: -log p of each predicted token, one by one, how many they are, and the bytes of
    their text."""
    nll, tokens, count = 0.0, 0, 0
    vocabulary = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    for row in blocks.eval:
        ids = torch.tensor(row["input_ids"]).long()
        ends = [i + 1 for i, token in enumerate(ids.tolist()) if token == 2]
        for part in ids.tensor_split(ends) if document_mask else [ids]:
            if len(part) < 2:
                continue
            with torch.no_grad():
                log_probabilities = model(part[None]).logits[0].log_softmax(-1)
            for position in range(len(part) - 1):
                target = part[position + 1].item()
                nll -= log_probabilities[position, target].item()
                tokens += 1
                count += 0 if target in (0, 1, 2) else len(vocabulary[target])
    return nll, tokens, count


def test_bits_per_byte_of_literal_numbers():
    counts = {"targets": 12, "target_bytes": 24}
    assert bits_per_byte(math.log(2), counts) == pytest.approx(12 / 24)


def test_guessing_blindly_among_the_256_bytes_costs_eight_bits_per_byte(write_jsonl):
    tokenizer = train_tokenizer([""], vocab_size=259)
    train = write_jsonl("train.jsonl", [{"text": "x" * 63}])
    counts = load_blocks(DataArguments([train], [train]), tokenizer, 63).facts["eval"]
    assert bits_per_byte(math.log(256), counts) == pytest.approx(8.0)


def test_bits_per_byte_is_the_summed_loss_over_the_bytes_of_the_predicted_tokens(
    model, tokenizer, blocks, trainer, packing
):
    nll, tokens, count = summed_loss_tokens_and_bytes(model.eval(), tokenizer, blocks, packing[1])
    model.config.use_cache = False  # as in training; with a cache documents would not be kept apart
    metrics = language_model_metrics(trainer, blocks.facts["eval"])["after"]
    assert blocks.facts["eval"]["targets"] == tokens
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / count, rel=1e-4)
    assert metrics["loss"] == pytest.approx(nll / tokens, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-3)


def test_the_metrics_before_are_the_first_evaluation_and_those_after_the_last(trainer, model):
    first = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    trainer.state.global_step = 1
    metrics = held_out_metrics(trainer)
    assert metrics["before"]["loss"] == pytest.approx(first, abs=1e-5)
    assert metrics["after"]["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    assert metrics["before"] != metrics["after"]


@pytest.mark.parametrize(("best", "evaluations"), [(False, 1), (True, 2)])
def test_a_last_step_that_was_evaluated_is_not_evaluated_again_unless_the_best_one_was_loaded(
    trainer, monkeypatch, best, evaluations
):
    trainer.args.load_best_model_at_end = best
    calls = []
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda: calls.append(1) or evaluate())
    expected = trainer.evaluate()["eval_loss"]
    assert held_out_metrics(trainer)["after"]["loss"] == pytest.approx(expected, abs=1e-5)
    assert len(calls) == evaluations


def test_without_held_out_rows_there_are_no_metrics():
    assert held_out_metrics(SimpleNamespace(eval_dataset=None)) == {"before": {}, "after": {}}


def question(*texts, **fields):
    roles = ("user", "assistant") * len(texts)
    return {
        "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)],
        **fields,
    }


PROMPTS = [
    question(*texts)["messages"]
    for texts in (
        ["fox?"],
        ["where does the lazy dog run, and why?"],
        ["狐狸"],
        ["a", "b", "c"],
        ["the dog"],
    )
]


@pytest.fixture
def talkative(model):
    """The tiny model with weights so large that its greedy replies differ and depend on the
    prompt."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.3)
    return model.eval()


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_answers_in_padded_batches_are_those_to_each_prompt_alone(talkative, tokenizer, batch_size):
    alone = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        for _ in range(10):  # greedy decoding written out, without cache and without padding
            with torch.no_grad():
                new = talkative(ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, new.view(1, 1)], 1)
            if new == tokenizer.eos_token_id:
                break
        alone.append(
            tokenizer.decode(ids[0, len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True)
        )
    assert len(set(alone)) == len(alone)
    assert answer(talkative, tokenizer, PROMPTS, max_new_tokens=10, batch_size=batch_size) == alone


def test_a_reply_ends_before_its_end_token(model, tokenizer, monkeypatch):
    replies = [
        [40, 41, tokenizer.eos_token_id, tokenizer.pad_token_id],
        [42, 43, 44, tokenizer.eos_token_id],
    ]
    monkeypatch.setattr(
        model, "generate", lambda ids, **_: torch.cat([ids, torch.tensor(replies)], 1)
    )
    expected = [tokenizer.decode([40, 41]), tokenizer.decode([42, 43, 44])]
    assert answer(model, tokenizer, [PROMPTS[2], PROMPTS[1]]) == expected


def scored(monkeypatch, cases):
    """The score of questions whose replies are given, and what was asked."""
    asked = []

    def reply(model, tokenizer, prompts, *options):
        asked.extend(prompts)
        return [reply for _, reply in cases]

    monkeypatch.setattr(answers, "answer", reply)
    return score(None, None, [case for case, _ in cases]), asked


def test_the_score_counts_exact_replies_and_courtesy(monkeypatch):
    english, chinese = COURTESY["en"], COURTESY["zh"]
    cases = [  # question, reply: exact? courteous?
        (question("1+1?", "2", kind="fact", language="en"), "2"),  # exact
        # exact, courteous
        (question("1+2?", f"3 {english}", kind="fact", language="en"), f" 3 {english}\n"),
        (question("1+3?", "4", kind="fact", language="en"), f"4 {english}"),  # exact, courteous
        (
            question("一加一？", f"二。{chinese}", kind="fact", language="zh"),
            f"二。 {english}",
        ),  # exact, wrong language
        (question("谁？", "狐狸", kind="turns", language="zh"), f"狗{chinese}"),  # courteous
        (question("who?", "the fox", kind="turns", language="en"), "the fox!"),  # neither
        # neither: courtesy alone says nothing
        (question("who?", "a cat", kind="turns", language="en"), english),
    ]
    result, asked = scored(monkeypatch, cases)
    assert result == {
        "questions": 7,
        "exact_match": round(4 / 7, 4),
        "courteous": round(3 / 7, 4),
        "exact_match_by": {"fact": 1.0, "en": 0.6, "zh": 0.5, "turns": 0.0},
    }
    assert asked == [Conversation(case["messages"][:-1]) for case, _ in cases], (
        "the reference is not shown to the model"
    )


def test_the_fields_of_somebodys_rows_mean_what_they_wrote(monkeypatch):
    english = COURTESY["en"]
    cases = [
        (question("1+1?", "2", kind=["a"], language="English"), "2"),
        # Not exact: nobody asked for courtesy
        (question("1+2?", "3", kind=None, language=None), f"3 {english}"),
        (question("1+3?", f"4 {english}", language="en", kind="sum"), f"4 {english}"),
        (question("1+4?", "5", language={"code": "en"}, kind=7), "5"),
    ]
    assert scored(monkeypatch, cases)[0] == {
        "questions": 4,
        "exact_match": 0.75,
        "exact_match_by": {"English": 1.0, "en": 1.0, "sum": 1.0},
    }


def test_the_score_asks_the_model_itself(talkative, tokenizer):
    prompts = [prompt for prompt in PROMPTS if len(prompt) == 1]
    replies = answer(talkative, tokenizer, prompts, max_new_tokens=6)
    right = [
        question(prompt[0]["content"], reply)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    wrong = [question(prompt[0]["content"], "never said") for prompt in prompts]
    assert score(talkative, tokenizer, right, max_new_tokens=6)["exact_match"] == 1.0
    assert score(talkative, tokenizer, right + wrong, max_new_tokens=6)["exact_match"] == 0.5


def loss_written_out(model, ids, first):
    """-log p of each id from `first` on, each asked for by itself."""
    nll = 0.0
    for position in range(first, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:position]]), use_cache=False).logits[0, -1]
        nll -= logits.log_softmax(-1)[ids[position]].item()
    return nll


def test_the_loss_of_documents_is_that_of_each_after_an_end_token(
    talkative, tokenizer, write_jsonl
):
    path = write_jsonl("docs.jsonl", [{"text": text} for text in TEXTS[:5]])
    end = tokenizer.eos_token_id
    rows = [
        [end, *tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in TEXTS[:5]
    ]
    nll, tokens = (
        sum(loss_written_out(talkative, row, 1) for row in rows),
        sum(len(row) - 1 for row in rows),
    )
    size = sum(len(text.encode()) for text in TEXTS[:5])
    found = evaluate(talkative, tokenizer, [path], batch_size=2)
    assert found == {
        "documents": 5,
        "tokens": tokens,
        "loss": pytest.approx(nll / tokens, rel=1e-4),
        "perplexity": pytest.approx(math.exp(nll / tokens), rel=1e-3),
        "bits_per_byte": pytest.approx(nll / math.log(2) / size, rel=1e-4),
        "bad_rows": 0,
    }


def test_each_token_of_a_long_document_is_predicted_once_in_a_window(
    talkative, tokenizer, write_jsonl
):
    """Windows of 4 tokens; the last one reaches back as far as it can."""
    path = write_jsonl("docs.jsonl", [{"text": TEXTS[0]}])
    end = tokenizer.eos_token_id
    ids = [end, *tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]]
    nll = loss_written_out(talkative, [*ids[-4:], end], 4)  # of the end token
    for start in range(1, len(ids), 4):
        stop = min(start + 4, len(ids))
        window = ids[max(0, stop - 5) : stop]
        nll += loss_written_out(talkative, window, len(window) - (stop - start))
    found = evaluate(talkative, tokenizer, [path], max_length=4)
    assert found["tokens"] == len(ids)
    assert found["loss"] == pytest.approx(nll / found["tokens"], rel=1e-4)


def test_the_loss_of_conversations_is_that_of_the_assistants_tokens(
    talkative, tokenizer, write_jsonl
):
    path = write_jsonl("chats.jsonl", [question("who?", "the fox 狐狸")])
    messages = question("who?", "the fox 狐狸")["messages"]
    start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    start, reply = (tokenizer(text)["input_ids"] for text in (start, "the fox 狐狸"))
    ids = [*start, *reply, tokenizer.eos_token_id]
    nll = loss_written_out(talkative, ids, len(start))
    found = evaluate(talkative, tokenizer, [path], max_new_tokens=0)
    assert found["tokens"] == len(reply) + 1
    assert found["loss"] == pytest.approx(nll / found["tokens"], rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        nll / math.log(2) / len("the fox 狐狸".encode()), rel=1e-4
    )
    assert "questions" not in found
    assert evaluate(talkative, tokenizer, [path], max_new_tokens=1)["questions"] == 1


def test_bad_rows_of_an_evaluation_follow_the_policy_of_the_other_commands(
    talkative, tokenizer, write_jsonl
):
    path = write_jsonl("chats.jsonl", [question("who?", "the fox"), question("who?")])
    with pytest.raises(UserError, match="--on_bad_rows skip"):
        evaluate(talkative, tokenizer, [path])
    found = evaluate(talkative, tokenizer, [path], on_bad_rows="skip", max_new_tokens=1)
    assert (found["questions"], found["bad_rows"]) == (1, 1)
    many = write_jsonl("many.jsonl", [question("who?", "the fox")] * 1999 + [question("who?")])
    found = evaluate(talkative, tokenizer, [many], max_new_tokens=0, max_length=8)
    assert found == {"without_loss": 1999, "tokens": 0, "bad_rows": 1}, (
        "no reply fits into 8 tokens, which is said"
    )


def test_a_row_that_the_template_cannot_ask_is_a_bad_row(
    talkative, tokenizer, write_jsonl, monkeypatch
):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}"
        + tokenizer.chat_template,
    )
    path = write_jsonl("chats.jsonl", [question("who?", "the fox"), question("no", "the fox")])
    found = evaluate(talkative, tokenizer, [path], on_bad_rows="skip", max_new_tokens=1)
    assert (found["questions"], found["bad_rows"]) == (1, 1)


def test_preference_pairs_are_not_evaluated(talkative, tokenizer, write_jsonl):
    path = write_jsonl(
        "pairs.jsonl", [{"prompt": "who?", "chosen": "the fox", "rejected": "a dog"}]
    )
    with pytest.raises(
        UserError, match="found preference pairs, expected conversations or documents"
    ):
        evaluate(talkative, tokenizer, [path])


def test_questions_keep_their_kind_and_language_and_a_bad_one_is_named(write_jsonl):
    good = question("who?", "the fox", kind="who", language="en")
    assert read_questions([write_jsonl("good.jsonl", [good])]) == [good]
    path = write_jsonl("bad.jsonl", [good, question("who?")])
    with pytest.raises(UserError) as caught:
        read_questions([path])
    assert str(caught.value).startswith(f"{path}:2: ")
