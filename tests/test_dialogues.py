import pytest
from pipeline import assistant, user
from reading import TALK

from minimind.common.errors import BadRowError
from minimind.data.conversations import to_messages
from minimind.data.preferences import to_preference


@pytest.mark.parametrize(
    "row",
    [
        {
            "instruction": "Human: hi\nAssistant: hello\nHuman: more?\nAssistant:",
            "input": "",
            "output": "no",
        },
        {"prompt": "User: hi\n\nAssistant: hello\n\nUser: more?", "completion": " no"},
        {"text": "用户：hi\n助手：hello\n用户：more?\n助手：no"},
    ],
)
def test_a_dialogue_in_one_string_is_parsed(row):
    assert to_messages(row) == [*TALK, user("more?"), assistant("no")]


def test_dialogues_of_pairs_are_parsed():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more?\n\nAssistant:"
    expected = {
        "prompt": [*TALK, user("more?")],
        "chosen": [assistant("yes")],
        "rejected": [assistant("no")],
    }
    assert to_preference({"chosen": f"{start} yes", "rejected": f"{start} no"}) == expected
    assert to_preference({"prompt": start, "chosen": " yes", "rejected": " no"}) == expected


def test_a_dialogue_whose_voices_do_not_alternate_is_refused():
    with pytest.raises(
        BadRowError, match="prompt: found a dialogue in one string with the voices Human:, Human:"
    ):
        to_messages({"prompt": "Human: a\nHuman: b\nAssistant: c", "completion": "d"})
