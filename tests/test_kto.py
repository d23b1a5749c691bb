"""Rated replies: how they are read, and KTO's loss against the formula of its paper."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from one_step import loss_of, move
from peft import LoraConfig
from pipeline import assistant, run_script, short_run, user
from torch.nn.functional import log_softmax

from minimind.common.errors import BadRowError
from minimind.data.packing import IGNORED
from minimind.data.rated import split_reply, to_rated
from minimind.training.arguments import KTOStageConfig
from minimind.training.kto_trainer import KTOStageTrainer
from minimind.training.starting_point import reference_model

# TRL 1.16 asks for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Prompts, replies of different lengths, and whether they are desirable
REPLIES = [
    ([5, 6, 7, 8], [9, 10, 11, 12, 13], True),
    ([20, 21], [22, 23], False),
    ([30, 31, 32], [33, 34, 35, 36], True),
]
B, D, U = 0.7, 1.5, 0.8  # beta, the weights of desirable and undesirable replies


def rows():
    return [
        {
            "input_ids": prompt + reply + [2],
            "labels": [IGNORED] * len(prompt) + reply + [IGNORED],
            "label": label,
        }
        for prompt, reply, label in REPLIES
    ]


@pytest.fixture
def make(tokenizer, tmp_path):
    """Make a trainer whose model is not its reference any more, unless `same`."""

    def make(model, peft=None, same=False, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            args = KTOStageConfig(
                **{"output_dir": str(tmp_path / "run"), "bf16": False, "report_to": "none"}
                | {"disable_tqdm": True, "per_device_train_batch_size": 3, "beta": B}
                | {"desirable_weight": D, "undesirable_weight": U, **options}
            )
        reference = reference_model(model, args, SimpleNamespace(use_peft=peft is not None))
        trainer = KTOStageTrainer(
            model=model,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
            peft_config=peft,
        )
        if not same:
            move(trainer.model, seed=2, scale=0.05)  # with it the KL estimate is above 0
        return trainer

    return make


@torch.no_grad()
def log_prob(model, prompt, reply):
    logits = model(torch.tensor([prompt + reply])).logits[0].double()
    predictions = log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
    return sum(predictions[place, token].item() for place, token in enumerate(reply))


def sigma(x):
    return 1 / (1 + math.exp(-x))


def formula(trainer, ratio, with_kl=True):
    """Ethayarajh et al., 2024, equation 7, and z: `ratio` is log pi - log pi_ref of a reply,
    and z estimates the KL divergence from each prompt with its neighbour's reply."""
    pairs = [(row["prompt_ids"], row["completion_ids"]) for row in trainer.train_dataset]
    neighbours = [pairs[index - 1][1] for index in range(len(pairs))]
    mismatched = [ratio(p[0], reply) for p, reply in zip(pairs, neighbours, strict=True)]
    z = max(0, sum(mismatched) / len(pairs)) if with_kl else 0.0
    losses = [
        D * (1 - sigma(B * (ratio(*pair) - z)))
        if label
        else U * (1 - sigma(B * (z - ratio(*pair))))
        for pair, label in zip(pairs, trainer.train_dataset["label"], strict=True)
    ]
    return sum(losses) / len(losses), z


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("precomputed", [True, False], ids=["precomputed", "memory"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_the_loss_is_the_formula_of_the_paper(model, make, loss, precomputed, adapter):
    peft = LoraConfig(target_modules=["q_proj", "down_proj"]) if adapter else None
    options = {"loss_type": loss, "precompute_ref_log_probs": precomputed}
    before = {
        (tuple(prompt), tuple(reply)): log_prob(model, prompt, reply)
        for prompt, *_ in REPLIES
        for _, reply, _ in REPLIES
    }
    trainer = make(model, peft, **options)

    def ratio(prompt, reply):
        return log_prob(trainer.model, prompt, reply) - before[tuple(prompt), tuple(reply)]

    expected, z = formula(trainer, ratio, with_kl=loss == "kto")
    assert (z > 0) == (loss == "kto")
    assert loss_of(trainer).item() == pytest.approx(expected, rel=1e-4)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(z, abs=1e-4)


def test_the_first_loss_is_one_half_of_the_weights(model, make):
    labels = [label for *_, label in REPLIES]
    expected = sum(D if label else U for label in labels) / len(labels) / 2
    assert loss_of(make(model, same=True)).item() == pytest.approx(expected, rel=1e-5)


def test_rows_are_shuffled_once_and_neighbours_are_of_one_batch(model, make):
    trainer = make(model, per_device_train_batch_size=2)
    replies = trainer.train_dataset["completion_ids"][:]
    neighbours = trainer.train_dataset["KL_completion_ids"][:]
    assert sorted(replies) == sorted(reply for _, reply, _ in REPLIES)
    assert neighbours == [replies[1], replies[0], replies[2]]


def test_what_follows_the_reply_is_not_trained():
    assert split_reply(rows()[1]) == {"prompt_ids": [20, 21], "completion_ids": [22, 23]}


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"label": True}, True),
        ({"label": "false"}, False),
        ({"label": 0}, False),
        ({"kto_tag": True}, True),
        ({"rating": 5, "desirable": False}, False),
        ({"thumbs_down": 1}, False),
        ({"feedback": "thumbs up"}, True),
        ({"feedback": "Thumbs_Down"}, False),
        ({"votes": -3}, False),
        ({"label": True, "feedback": "It could be longer."}, True),
        ({"label": 1, "rejected": False}, True),
    ],
    ids=str,
)
def test_a_rating_is_read_from_the_usual_columns(columns, label):
    for row in (
        {"prompt": "hi", "completion": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"messages": [user("hi"), assistant("hello")]},
    ):
        (rated,) = to_rated({**row, **columns})
        assert rated.label is label
        assert rated.conversation.messages == [user("hi"), assistant("hello")]


def test_a_pair_is_a_desirable_and_an_undesirable_reply():
    good, bad = to_rated({"prompt": "hi", "chosen": "hello", "rejected": "go away"})
    assert (good.label, bad.label) == (True, False)
    assert good.conversation.messages == [user("hi"), assistant("hello")]
    assert bad.conversation.messages == [user("hi"), assistant("go away")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "expected a rating of the reply in 'label'"),
        ({"label": "maybe"}, "found 'label': \"maybe\", expected true or false"),
        ({"label": 3}, "found 'label': 3, expected true or false"),
        ({"label": True, "rejected": True}, "contradict each other, in label, rejected"),
    ],
    ids=str,
)
def test_a_rating_that_says_nothing_is_refused(columns, message):
    with pytest.raises(BadRowError, match=message):
        to_rated({"prompt": "hi", "completion": "hello", **columns})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1}, "raise --per_device_train_batch_size above 1"),
        ({"train_sampling_strategy": "random"}, "needs --train_sampling_strategy sequential"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "are both 0"),
        ({"sync_ref_model": True}, "--sync_ref_model needs --precompute_ref_log_probs false"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        KTOStageConfig(output_dir=str(tmp_path), **options)


def test_a_run_from_a_file_of_ratings_writes_a_stage(
    tmp_path, model, tokenizer, write_jsonl, monkeypatch
):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    chats = [
        {"prompt": f"the fox {number}", "completion": "runs home", "label": number % 3 > 0}
        for number in range(20)
    ]
    file = write_jsonl("rated.jsonl", chats)
    words = short_run(tmp_path / "kto", max_length=64, eval_ratio=0.5)
    run_script(
        monkeypatch,
        "train_kto",
        "--model_name_or_path",
        tmp_path / "base",
        "--train_files",
        file,
        *words,
    )
    record = json.loads((tmp_path / "kto" / "stage.json").read_text())
    assert record["stage"] == "kto"
    train, held_out = (record["data"][part] for part in ("train", "eval"))
    assert sum(part.get("desirable", 0) for part in (train, held_out)) == 13
    assert record["metrics"]["after"].keys() >= {"loss", "rewards/chosen", "kl"}
    assert [finding["name"] for finding in record["reading"]] == ["rewards_did_not_move"]
