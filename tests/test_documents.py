import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from conftest import CHINESE, ENGLISH
from pipeline import PATIENCE

from minimind.common.errors import UserError
from minimind.data import block_writer, documents
from minimind.data.documents import load_blocks
from minimind.tokenizer import text_encoder, train_tokenizer
from minimind.training.data_arguments import DataArguments

EOS = 2
DOCUMENTS = [f"{number}: {text}" for number in range(12) for text in (ENGLISH, CHINESE)]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(block_writer, "BATCH", 50)


@pytest.fixture
def builds(monkeypatch):
    """Counts how often data is prepared."""
    calls = []
    build = documents._prepare
    monkeypatch.setattr(
        documents,
        "_prepare",
        lambda *args, **options: calls.append(args) or build(*args, **options),
    )
    return calls


@pytest.fixture
def load(tokenizer, write_jsonl):
    """Load `texts` as the training file, in blocks of `block_size`; the options are those of
    DataArguments."""

    def load(texts=DOCUMENTS, block_size=16, tokenizer=tokenizer, name="train.jsonl", **options):
        train = write_jsonl(name, [{"text": text} for text in texts])
        return load_blocks(
            DataArguments([train], **{"eval_ratio": 0.0, **options}), tokenizer, block_size
        )

    return load


def stream(texts, tokenizer):
    """The oracle: the ids of each document and EOS, one document after the other."""
    encoder = text_encoder(tokenizer)
    return [i for text in texts for i in [*encoder.encode(text, add_special_tokens=False).ids, EOS]]


def rows(dataset):
    return [row["input_ids"].tolist() for row in dataset]


def joined(dataset):
    return [i for row in rows(dataset) for i in row]


def test_another_end_token_of_the_same_tokenizer_is_another_preparation(load):
    tokenizer = train_tokenizer([ENGLISH], vocab_size=300)
    load(tokenizer=tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    ids = joined(load(tokenizer=tokenizer).train)
    assert 0 in ids
    assert EOS not in ids


def test_a_tokenizer_without_an_end_token_cannot_separate_documents(load):
    tokenizer = train_tokenizer([ENGLISH], vocab_size=300)
    tokenizer.eos_token = None
    with pytest.raises(
        UserError, match="the tokenizer has no eos_token, so documents cannot be separated"
    ):
        load(tokenizer=tokenizer)


def test_the_blocks_of_a_file_are_its_tokens_one_after_the_other(load, tokenizer, small_batches):
    blocks = load()
    expected = stream(DOCUMENTS, tokenizer)
    whole = len(expected) // 16 * 16
    assert joined(blocks.train) == expected[:whole]
    assert {len(row) for row in rows(blocks.train)} == {16}
    assert blocks.eval is None
    facts = {
        "documents": 24,
        "tokens": len(expected),
        "blocks": whole // 16,
        "dropped_tokens": len(expected) - whole,
    }
    assert {name: blocks.facts["train"][name] for name in facts} == facts
    assert 0 < facts["dropped_tokens"] < 16


def test_every_document_is_followed_by_eos_and_no_other_eos_is_written(load, tokenizer):
    texts = ["one<|im_end|>two", "<|endoftext|>", "<|im_start|>user"] * 8
    blocks = load(texts, block_size=4, boundary_markers="keep")
    ids = joined(blocks.train)
    assert ids == stream(texts, tokenizer)[: len(ids)]
    parts = np.split(np.array(ids), np.flatnonzero(np.array(ids) == EOS) + 1)
    decoded = [tokenizer.decode(part[:-1].tolist()) for part in parts[:-1]]
    assert decoded == texts[: len(decoded)]
    assert len(decoded) >= 23
    assert not {0, 1} & set(ids)


@pytest.mark.parametrize("text", ["中文 mixed 🙂", "abc"])
def test_the_target_bytes_are_the_bytes_of_all_tokens_but_each_blocks_first(load, tokenizer, text):
    blocks = load([text] * 20, block_size=8)
    # In this tokenizer most tokens are single bytes; an independent count goes through the text of
    # the tokens.
    alphabet = {i: token for token, i in tokenizer.get_vocab().items()}
    expected = sum(len(alphabet[i]) for row in rows(blocks.train) for i in row[1:] if i > 2)
    assert blocks.facts["train"]["target_bytes"] == expected


def test_the_target_bytes_of_a_literal_corpus_are_counted_by_hand(load):
    tokenizer = train_tokenizer([""], vocab_size=259)  # every byte is a token
    blocks = load(["éa", "bcd", "e"], block_size=4, tokenizer=tokenizer)
    # C3 A9 a EOS | b c d EOS | e EOS: of the first block A9 and a are predicted, of the second c
    # and d, EOS is no byte
    assert blocks.facts["train"]["target_bytes"] == 4
    assert blocks.facts["train"]["dropped_tokens"] == 2


def test_the_second_call_finds_the_prepared_blocks(load, builds):
    first, second = load(), load()
    assert len(builds) == 1
    assert rows(first.train) == rows(second.train)
    assert first.facts == second.facts


def test_the_same_content_under_another_name_is_found_again_and_reported_by_its_name(
    load, builds, tmp_path
):
    load()
    facts = load(name="copy.jsonl").facts
    assert len(builds) == 1
    assert facts["train"]["files"] == [str(tmp_path / "copy.jsonl")]


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [*DOCUMENTS[:-1], "another last document"]},
        {"texts": DOCUMENTS[::-1]},
        {"block_size": 8},
        {"tokenizer": train_tokenizer([CHINESE] * 20, vocab_size=270)},
        {"eval_ratio": 0.5},
        {"on_bad_rows": "skip"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_file_size_tokenizer_or_option_is_prepared_anew(load, builds, change):
    load()
    load(**change)
    assert len(builds) == 2


def test_a_preparation_that_died_is_started_again(load, tokenizer, monkeypatch):
    def die(part):
        part.sink.write(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block_writer.BlockWriter, "finish", die)
        load()
    ids = joined(load().train)
    assert ids == stream(DOCUMENTS, tokenizer)[: len(ids)]
    assert len(ids) > 100


def held_out_of(texts, ratio, limit):
    """The oracle: of the different texts whose hash is in the first `ratio` of all hashes, the
    `limit` smallest."""
    hashes = {xxhash.xxh3_64_intdigest(text.encode()): text for text in texts}
    return {
        hashes[digest]
        for digest in sorted(digest for digest in hashes if digest < ratio * 2**64)[:limit]
    }


@pytest.mark.parametrize("limit", [1000, 5, 0])
def test_held_out_documents_and_their_copies_are_in_no_training_block(load, tokenizer, limit):
    texts = [f"document number {number}" for number in range(60)] * 2
    held_out = held_out_of(texts, 0.3, limit)
    assert len(held_out) == min(limit, len(held_out_of(texts, 0.3, 1000))) != 60
    blocks = load(texts, block_size=1, eval_ratio=0.3, max_eval_rows=limit)
    found = {}
    for part, dataset in (("train", blocks.train), ("eval", blocks.eval)):
        ids = np.array(joined(dataset) if dataset else [])
        documents = np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]
        found[part] = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert sorted(found["eval"]) == sorted(text for text in texts if text in held_out)
    assert sorted(found["train"]) == sorted(text for text in texts if text not in held_out)


def test_held_out_files_are_evaluated_on_and_nothing_of_the_training_files_is_held_out(
    load, tokenizer, write_jsonl
):
    held_out = [f"held out {number}" for number in range(9)]
    path = write_jsonl("eval.jsonl", [{"text": text} for text in held_out])
    blocks = load(eval_files=[path], eval_ratio=0.5, max_eval_rows=5, block_size=4)
    ids = joined(blocks.eval)
    assert ids == stream(held_out[:5], tokenizer)[: len(ids)]
    assert blocks.facts["eval"]["documents"] == 5
    assert blocks.facts["eval"]["files"] == [path]
    assert blocks.facts["train"]["documents"] == len(DOCUMENTS)


def test_too_little_text_is_refused_with_both_numbers(load, tokenizer, tmp_path):
    tokens = len(stream(["hello"], tokenizer))
    for _ in range(2):  # the refusal is not taken for prepared data
        with pytest.raises(
            UserError, match=rf"found {tokens} tokens, expected at least block_size = 1,000\b"
        ) as caught:
            load(["hello"], block_size=1000)
    assert str(tmp_path / "train.jsonl") in str(caught.value)


def test_a_bad_row_is_named_with_its_file_and_line(load, tmp_path):
    with pytest.raises(UserError) as caught:
        load([ENGLISH, None], on_bad_rows="error")
    assert str(caught.value).startswith(f"{tmp_path / 'train.jsonl'}:2: ")


def test_two_that_prepare_at_the_same_time_build_once_and_read_the_same(
    load, tokenizer, builds, monkeypatch
):
    build, start = documents._prepare, threading.Barrier(2)

    def slow(*args, **options):
        time.sleep(0.3)  # long enough for the other to arrive
        return build(*args, **options)

    def arrive(name):
        start.wait(PATIENCE)
        return joined(load(name=name).train)

    # Two threads stand for two processes: each opens the lock file by itself, which is what the
    # lock goes by.
    monkeypatch.setattr(documents, "_prepare", slow)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(arrive, ["a.jsonl", "b.jsonl"]))
    expected = stream(DOCUMENTS, tokenizer)
    assert results == [expected[: len(expected) // 16 * 16]] * 2
    assert len(builds) == 1
