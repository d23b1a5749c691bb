import pytest

from minimind.data.chats import IGNORED, tokenize_conversation
from minimind.data.masks import mask_report
from minimind.errors import UserError
from minimind.tokenizer import load_tokenizer, train_tokenizer

START, END = 1, 2


def chat(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture(params=["default", "tiny"])
def either(request, tokenizer):
    return load_tokenizer() if request.param == "default" else tokenizer


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer in which each byte is a token, so that tokens can be counted by hand."""
    return train_tokenizer([""], vocab_size=259)


def tokenized(conversations, tokenizer, max_length=512):
    rows = [tokenize_conversation(messages, tokenizer, max_length) for messages in conversations]
    return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]


def test_the_mask_report_counts_tokens_by_role(bytewise):
    rows = tokenized([chat("ab", "cde", "f", "g", system="hij"), chat("k", "lm")], bytewise)
    rows.append({"input_ids": rows[1]["input_ids"], "labels": [IGNORED] * len(rows[1]["input_ids"])})
    # <start> role \n words <end> and, but for a row's last message, the \n after it
    system, user = 1 + 7 + 3 + 1 + 1, (1 + 5 + 2 + 1 + 1) + (1 + 5 + 1 + 1 + 1) + 2 * (1 + 5 + 1 + 1 + 1)
    assistant = (1 + 10 + 3 + 1 + 1) + (1 + 10 + 1 + 1) + 2 * (1 + 10 + 2 + 1)
    trained = (3 + 1) + (1 + 1) + (2 + 1)
    assert mask_report(rows, bytewise) == {
        "rows": 3,
        "rows_without_trained_token": 1,
        "replies": 4,
        "replies_with_end_trained": 3,
        "tokens": system + user + assistant,
        "trained_tokens": trained,
        "trained_share": round(trained / (system + user + assistant), 4),
        "roles": {
            "assistant": {
                "tokens": assistant,
                "trained_tokens": trained,
                "trained_share": round(trained / assistant, 4),
            },
            "system": {"tokens": system, "trained_tokens": 0, "trained_share": 0.0},
            "user": {"tokens": user, "trained_tokens": 0, "trained_share": 0.0},
        },
    }


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nothing", "no token has a loss, so nothing would be learnt"),
        ("no end", "no reply's end token '<|im_end|>' has a loss, so the model would never learn to stop"),
        ("everything", "words of system, user have a loss"),
        ("user", "words of user have a loss"),
    ],
)
def test_a_mask_that_would_teach_the_wrong_thing_is_refused(either, fault, reason):
    (row,) = tokenized([chat("ab", "cd", system="ef")], either)
    ids, labels = row["input_ids"], row["labels"]
    user_words = [i for i, token in enumerate(ids) if token == START][1] + 1
    labels = {
        "nothing": [IGNORED] * len(ids),
        "no end": [IGNORED if label == END else label for label in labels],
        "everything": list(ids),
        "user": [
            token if i == user_words else label for i, (token, label) in enumerate(zip(ids, labels, strict=True))
        ],
    }[fault]
    with pytest.raises(UserError) as caught:
        mask_report([{"input_ids": ids, "labels": labels}], either)
    assert f"the loss mask is wrong: {reason}" in str(caught.value)
