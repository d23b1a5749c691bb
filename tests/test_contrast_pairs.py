"""`scripts/contrast_pairs.py`: chats become pairs whose rejected reply answers another chat."""

import json
import random
import sys

from pipeline import assistant, failure, user

from minimind.data.conversations import Conversation, to_conversation
from minimind.data.preferences import to_preference
from scripts.contrast_pairs import contrast_pairs, main

TOPICS = {
    "inn": "Can you find me an inn with a breakfast room and a quiet garden",
    "film": "Which film did the director of the old western comedy make next",
    "train": "When does the night train to the northern harbour leave today",
}


def chats(count=40):
    """Chats of two turns about three topics; each reply is like no other."""
    return [
        [user(f"{text} {i}?"), assistant(f"{topic} {i} a"), user("And?"), assistant(f"{topic} {i}")]
        for i in range(count)
        for topic, text in TOPICS.items()
    ]


def pairs_of(rows, seed=0):
    return contrast_pairs([Conversation(row) for row in rows], random.Random(seed))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["contrast_pairs.py", *map(str, words)])
    main()


def test_each_reply_of_a_chat_is_chosen_once_against_a_reply_of_another_chat():
    rows = chats()
    expected = {row[place]["content"]: (row[:place], row) for row in rows for place in (1, 3)}
    pairs = pairs_of(rows)
    assert len(pairs) == len(expected)
    for pair in pairs:
        (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
        prompt, own = expected.pop(chosen["content"])
        assert pair["prompt"] == prompt
        assert rejected not in own and rejected["role"] == "assistant"
    assert not expected


def test_the_rejected_reply_is_about_what_the_chat_is_about():
    pairs = pairs_of(chats())
    same = [p["chosen"][0]["content"][:3] == p["rejected"][0]["content"][:3] for p in pairs]
    assert sum(same) > 0.99 * len(same)  # of 17 chats, 1 in 1,000 times none has the same topic


def test_replies_that_call_tools_or_follow_one_are_left_out_and_tools_are_kept():
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    call = assistant(
        "Let me look.", tool_calls=[{"type": "function", "function": {"name": "clock"}}]
    )
    calling = [user("When?"), call, {"role": "tool", "content": "5"}, assistant("At five.")]
    last = [user("Thanks"), assistant("With pleasure.")]
    chats = [Conversation(calling + last, tools), Conversation([user("Hi"), assistant("Hello.")])]
    found = {pair["chosen"][0]["content"]: pair for pair in contrast_pairs(chats, random.Random(0))}
    assert found.keys() == {"With pleasure.", "Hello."}
    assert found["With pleasure."]["tools"] == tools and "tools" not in found["Hello."]


def test_the_chats_of_held_out_pairs_are_left_out_and_the_rest_trains(
    monkeypatch, tmp_path, capsys
):
    rows, out = chats(), tmp_path / "contrast.jsonl"
    held_out = {"prompt": rows[0][:3], "chosen": rows[0][3:], "rejected": rows[1][3:]}
    files = write(tmp_path / "chats.jsonl", [{"messages": row} for row in rows]), out
    kept = tmp_path / "kept.jsonl"
    without = write(tmp_path / "held_out.jsonl", [held_out])
    run(monkeypatch, *files, "--without", without, "--kept", kept)
    said = capsys.readouterr().out
    assert "238 pairs from 119 of 120 chats" in said
    assert "chats left out: 1, for 1 of the 1 pairs of --without" in said
    assert not any(message["content"] in out.read_text() for message in rows[0][1::2])
    for line in out.read_text().splitlines():
        pair = json.loads(line)
        assert to_preference(pair)["chosen"] == pair["chosen"]
    written = [to_conversation(json.loads(line)) for line in kept.read_text().splitlines()]
    assert written == [Conversation(row) for row in rows[1:]]


def test_chats_that_give_no_pair_are_refused_and_nothing_is_written(monkeypatch, tmp_path, capsys):
    files = write(tmp_path / "chats.jsonl", [{"messages": chats(1)[0]}]), tmp_path / "out.jsonl"
    assert "no two chats" in failure(capsys, run, monkeypatch, *files)
    assert not files[1].exists()


def test_neither_the_chats_nor_one_of_two_results_is_overwritten(monkeypatch, tmp_path, capsys):
    file = write(tmp_path / "chats.jsonl", [{"messages": row} for row in chats()])
    before, out = file.read_bytes(), tmp_path / "new" / "out.jsonl"
    assert "is read by this command" in failure(capsys, run, monkeypatch, file, file)
    assert "is read by this command" in failure(capsys, run, monkeypatch, file, out, "--kept", file)
    assert "Name another" in failure(capsys, run, monkeypatch, file, out, "--kept", out)
    assert file.read_bytes() == before and not out.parent.exists()
    run(monkeypatch, file, out)
    assert out.exists()
