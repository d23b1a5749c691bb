"""What is trained of a conversation or a pair, and how much it counts."""

import pytest
from example_chats import IGNORED, LONG, RENDERED, SHORT, fits, marked, rows_of, runs
from pipeline import assistant, user

from minimind.common.errors import BadRowError
from minimind.data.conversations import Conversation
from minimind.data.loss_mask import preference_labels
from minimind.data.template_choice import set_chat_template


@pytest.mark.parametrize(
    ("template", "index"), [(t, i) for t, cases in RENDERED.items() for i in range(len(cases))]
)
def test_exactly_what_the_assistant_emits_is_trained(either, template, index):
    set_chat_template(either, template)
    conversation, expected = RENDERED[template][index]
    try:
        (row,), _ = rows_of(conversation, either)
    finally:
        set_chat_template(either, "chatml")
    assert all(
        label in (token, IGNORED)
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assert marked(row, either) == expected


def trained(conversation, tokenizer, **options):
    return [
        tokenizer.decode(ids).removesuffix("<|im_end|>")
        for row in rows_of(conversation, tokenizer, **options)[0]
        for is_trained, ids in runs(row)
        if is_trained
    ]


def test_all_the_last_or_the_flagged_replies_are_trained(tokenizer):
    flagged = [
        user("a"),
        assistant("b", weight=1.0),
        user("c"),
        assistant("d", weight=0.0),
        user("e"),
        assistant("f"),
    ]
    assert trained(LONG, tokenizer) == ["jumps over the dog", "跑回家！", "home."]
    assert trained(flagged, tokenizer) == ["b", "f"]
    assert trained(flagged, tokenizer, train_turns="last") == ["f"]
    assert trained(flagged, tokenizer, train_turns="flags") == ["b"]
    assert rows_of(LONG, tokenizer, train_turns="flags") == ([], {"untrained": 1})


def test_the_last_reply_is_the_last_of_the_conversation_not_of_each_row_of_a_split(tokenizer):
    window = fits(LONG[:4], tokenizer)
    assert trained(
        LONG, tokenizer, max_length=window, long_conversations="split", train_turns="last"
    ) == ["home."]


def test_weights_other_than_0_and_1_must_be_used_or_ignored_explicitly(tokenizer):
    weighted = [user("a"), assistant("b", weight=0.5)]
    for conversation in (Conversation(weighted), Conversation(SHORT, weight=2.0)):
        with pytest.raises(
            BadRowError, match=r"found weights other than 0 and 1 .*--weighted_loss true"
        ):
            rows_of(conversation, tokenizer)
        (row,), _ = rows_of(conversation, tokenizer, weighted_loss=False)
        assert "loss_weights" not in row
    (row,), _ = rows_of(Conversation(weighted, weight=3.0), tokenizer, weighted_loss=True)
    assert row["loss_weights"] == [0.0 if label == IGNORED else 1.5 for label in row["labels"]]


def test_of_a_pair_only_the_replies_are_trained():
    row = {"prompt_ids": [1, 5, 2, 1], "chosen_ids": [6, 7, 2], "rejected_ids": [8, 2]}
    row |= {"chosen_mask": [1, 1, 1], "rejected_mask": [1, 1]}
    assert preference_labels([row]) == [
        {"input_ids": [1, 5, 2, 1, 6, 7, 2], "labels": [-100, -100, -100, -100, 6, 7, 2]},
        {"input_ids": [1, 5, 2, 1, 8, 2], "labels": [-100, -100, -100, -100, 8, 2]},
    ]
