"""What is trained: counts made by hand, and one planted fault for each finding about the mask."""

from collections import Counter

import numpy as np
import pytest
from inspecting import (
    CONVERSATIONS,
    END,
    START,
    chat,
    finding,
    inspected,
    names,
    tokenized,
    tokens_of,
)

from minimind.data.packing import IGNORED
from minimind.inspection.messages import Messages
from minimind.tokenizer import load_tokenizer, text_bytes, text_encoder, train_tokenizer


def counted_by_hand(conversations):
    """Role -> (tokens, trained), for one token a byte: <start> role newline words <end>, and a
    newline between."""
    tokens, trained = Counter(), Counter()
    for messages in conversations:
        for index, message in enumerate(messages):
            words = len(message["content"].encode())
            tokens[message["role"]] += (
                1 + len(message["role"]) + 1 + words + 1 + (index < len(messages) - 1)
            )
            trained[message["role"]] += (words + 1) * (message["role"] == "assistant")
    return {role: (tokens[role], trained[role]) for role in tokens}


def test_roles_and_replies_are_those_counted_by_hand(bytewise):
    report = inspected(tokenized(CONVERSATIONS, bytewise), bytewise)
    by_hand = counted_by_hand(CONVERSATIONS)
    assert {
        role: (counts["tokens"], counts["trained"]) for role, counts in report["roles"].items()
    } == by_hand
    assert report["tokens"] == sum(tokens for tokens, _ in by_hand.values())
    assert report["trained_tokens"] == sum(trained for _, trained in by_hand.values())
    assert report["trained_share"] == round(report["trained_tokens"] / report["tokens"], 4)
    assert (report["rows"], report["rows_without_trained_token"]) == (4, 0)
    assert report["replies"] == report["replies_trained"] == report["replies_with_end_trained"] == 6
    assert names(report) == []


def test_a_message_spans_its_header_its_words_and_its_end(bytewise):
    rows = tokenized(CONVERSATIONS, bytewise)
    tokens = tokens_of(rows)
    found = Messages(tokens, bytewise)
    flat = [message for messages in CONVERSATIONS for message in messages]
    assert found.names[found.role].tolist() == [message["role"] for message in flat]
    for index, message in enumerate(flat):
        ids = tokens.ids[found.start[index] : found.end[index]].tolist()
        assert (
            bytewise.decode(ids).removesuffix("\n")
            == f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>"
        )
        words = tokens.ids[found.content[index] : found.stop[index]]
        assert bytewise.decode(words) == message["content"]


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(name, tokenizer):
    tokenizer = load_tokenizer() if name == "default" else tokenizer
    text = "the fox 狐狸\n\n🦊 \x00\x7f é 1234 \t<think>"
    ids = text_encoder(tokenizer).encode(text).ids
    assert b"".join(text_bytes(tokenizer)[i] for i in ids) == text.encode()
    assert text_bytes(tokenizer)[END] == b""


def shifted(ids, labels, by):
    """The mask moved by some places, the labels still those of their own tokens."""
    mask = np.roll([label != IGNORED for label in labels], by)
    return [token if trained else IGNORED for token, trained in zip(ids, mask, strict=True)]


def without_ends(ids, labels):
    return [IGNORED if label == END else label for label in labels]


def user_trained(ids, labels):
    begin = ids.index(START)
    return [*ids[: begin + 7], *labels[begin + 7 :]]


FAULTS = {
    "nothing": (lambda ids, labels: [IGNORED] * len(ids), "nothing_trained"),
    "everything": (lambda ids, labels: list(ids), "other_roles_trained"),
    "user": (user_trained, "other_roles_trained"),
    "no end": (without_ends, "end_never_trained"),
    "next token's labels": (lambda ids, labels: [*labels[1:], IGNORED], "labels_differ"),
    "the token's before": (lambda ids, labels: [IGNORED, *labels[:-1]], "labels_differ"),
    "mask one early": (lambda ids, labels: shifted(ids, labels, -1), "border_trained"),
    "mask two early": (lambda ids, labels: shifted(ids, labels, -2), "end_never_trained"),
    "mask one late": (lambda ids, labels: shifted(ids, labels, 1), "border_trained"),
}


@pytest.mark.parametrize("either", ["default", "bytewise"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_is_an_error_by_name(fault, either, bytewise):
    tokenizer = load_tokenizer() if either == "default" else bytewise
    change, expected = FAULTS[fault]
    rows = tokenized(CONVERSATIONS[:2], tokenizer)
    rows = [{**row, "labels": change(row["input_ids"], row["labels"])} for row in rows]
    assert expected in names(inspected(rows, tokenizer), "error")


def test_some_ends_some_words_some_rows_without_a_label_are_warnings_with_their_places(bytewise):
    rows = tokenized(
        [chat("a", "bcd", "e", "fgh"), *(chat(f"q{i}", "xyz") for i in range(4))], bytewise
    )
    rows[1]["labels"] = without_ends(rows[1]["input_ids"], rows[1]["labels"])
    first = next(i for i, label in enumerate(rows[2]["labels"]) if label != IGNORED)
    rows[2]["labels"][first] = IGNORED
    rows[3]["labels"] = [IGNORED] * len(rows[3]["labels"])
    second = [i for i, token in enumerate(rows[0]["input_ids"]) if token == START][2]
    rows[0]["labels"][:second] = [IGNORED] * second
    report = inspected(rows, bytewise, where=[f"chats.jsonl:{i}" for i in range(1, 6)])
    found = {f["name"]: (f["severity"], f["count"], f["places"]) for f in report["findings"]}
    assert found == {
        "end_not_trained": ("warning", 1, ["chats.jsonl:2"]),
        "replies_partly_trained": ("warning", 1, ["chats.jsonl:3"]),
        "rows_without_trained_token": ("warning", 1, ["chats.jsonl:4"]),
        "replies_not_trained": ("info", 1, ["chats.jsonl:1"]),
    }
    assert (report["replies"], report["replies_trained"], report["replies_with_end_trained"]) == (
        6,
        4,
        3,
    )


def test_a_reply_cut_before_its_end_is_found(bytewise):
    rows = tokenized([chat("a", "bcd"), chat("b", "cde")], bytewise)
    rows[1] = {name: values[:-1] for name, values in rows[1].items()}
    report = inspected(rows, bytewise)
    assert (report["replies"], report["replies_with_end_trained"]) == (2, 1)
    assert finding(report, "end_not_trained")["places"] == ["row 2"]


def test_rows_without_chatml_are_judged_by_their_trained_runs():
    tokenizer = load_tokenizer()
    encode = text_encoder(tokenizer).encode
    prompt, reply = encode("[INST] hi [/INST]").ids, encode(" hello").ids
    rows = [
        {"input_ids": prompt + reply + [END], "labels": [IGNORED] * len(prompt) + reply + [END]}
    ]
    report = inspected(rows, tokenizer)
    counts = report["roles"].pop("other")
    assert (counts["tokens"], counts["trained"]) == (len(prompt) + len(reply) + 1, len(reply) + 1)
    assert report["roles"] == {}
    assert (report["replies"], report["replies_with_end_trained"]) == (1, 1)
    assert names(report, "error") == []
    rows[0]["labels"][-1] = IGNORED
    assert names(inspected(rows, tokenizer), "error") == ["end_never_trained"]


def test_padding_with_the_end_token_is_named_and_a_missing_one_is_an_error(bytewise):
    rows = tokenized(CONVERSATIONS, bytewise)
    same = train_tokenizer([""], vocab_size=259)
    same.pad_token = same.eos_token
    assert "padding_is_end_token" in names(inspected(rows, same), "info")
    missing = train_tokenizer([""], vocab_size=259)
    missing.eos_token = None
    assert "no_end_token" in names(inspected(rows, missing), "error")


def test_a_template_without_an_end_token_is_an_error(bytewise):
    rows = tokenized(CONVERSATIONS, bytewise)
    kept = [[i for i, token in enumerate(row["input_ids"]) if token != END] for row in rows]
    rows = [
        {name: [row[name][i] for i in places] for name in row}
        for row, places in zip(rows, kept, strict=True)
    ]
    assert "end_never_trained" in names(inspected(rows, bytewise), "error")
