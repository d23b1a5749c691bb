import pytest
from pipeline import assistant, user
from reading import TALK

from minimind.common.errors import BadRowError
from minimind.data.columns import Columns
from minimind.data.conversations import to_messages


@pytest.mark.parametrize(
    "mark",
    [
        *({name: False} for name in ("train", "training", "trainable", "train_on_turn", "loss")),
        *(
            {"loss": "false"},
            {"loss": 0},
            {"loss_weight": 0.0},
            {"weight": "0"},
            {"masked": True},
            {"loss_mask": 0},
        ),
        *({"weight": 1, "train": False}, {"loss_weight": 1.0, "loss": False}),
    ],
)
def test_a_reply_marked_as_not_trained_has_the_weight_0(mark):
    row = {"messages": [user("a"), assistant("bad", **mark), user("b"), assistant("good")]}
    assert [m.get("weight") for m in to_messages(row) if m["role"] == "assistant"] == [0.0, None]


@pytest.mark.parametrize(
    "mark",
    [
        *({"label": value} for value in (False, 0, "false", "0")),
        *(
            {"kto_tag": False},
            {"desirable": "no"},
            {"is_correct": False},
            {"rejected": True},
            {"chosen": False},
        ),
        *(
            {"score": -1},
            {"score": 0},
            {"reward": False},
            {"rating": "rejected"},
            {"feedback": "thumbs_down"},
        ),
        *({"votes": -3}, {"label": "dispreferred"}),
    ],
)
def test_a_row_marked_as_rejected_is_refused_unless_its_mark_is_left_out(mark):
    (name,) = mark
    row = {"prompt": "hi", "completion": "hello", **mark}
    with pytest.raises(BadRowError, match=f"found '{name}': .*, the mark of a rejected reply"):
        to_messages(row)
    assert to_messages(Columns(unread=[name]).fields(row)) == TALK
    kept = {
        "label": True,
        "kto_tag": 1,
        "score": 3,
        "rating": 0.5,
        "reward": -1.5,
        "votes": 0,
        "feedback": "good",
    }
    assert to_messages({"prompt": "hi", "completion": "hello", **kept}) == TALK
