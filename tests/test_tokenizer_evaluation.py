"""The evaluation of tokenizers, against numbers worked out by hand on tiny vocabularies."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import CHINESE, ENGLISH
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from benchmarks.tokenizer import split
from minimind.cli import main
from minimind.common.errors import UserError
from minimind.tokenizer import DEFAULT_TOKENIZER, PRE_TOKENIZERS, load_tokenizer, train_tokenizer
from minimind.tokenizer.loading import BYTE_OF, token_bytes
from minimind.tokenizer_evaluation.comparison import Candidate, compare, evaluate
from minimind.tokenizer_evaluation.probes import PROBES
from minimind.tokenizer_evaluation.report import comparison_tables, evaluation_tables
from minimind.tokenizer_evaluation.texts import Text, read_texts, script, weighted

CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def written(data):
    """Bytes, as a byte-level vocabulary writes them."""
    return "".join(CHARACTER_OF[byte] for byte in data)


@pytest.fixture
def directory(tmp_path):
    """Write a byte-level tokenizer that splits as GPT-2 does and knows the merges given, each a
    pair of texts."""

    def write(name, merges, **options):
        pairs = [
            tuple(written(part if isinstance(part, bytes) else part.encode()) for part in pair)
            for pair in merges
        ]
        tokens = [CHARACTER_OF[byte] for byte in range(256)] + ["".join(pair) for pair in pairs]
        tokenizer = Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, pairs, **options)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        return str(tmp_path / name)

    return write


GOOD_CAT = [(" ", "c"), (" c", "a"), (" ca", "t"), ("c", "a"), ("ca", "t")]
HELLO = [
    (b"\xe4", b"\xbd"),
    (b"\xe4\xbd", b"\xa0"),
    (b"\xe5", b"\xa5"),
    (b"\xe5\xa5", b"\xbd"),
    ("你", "好"),
]
TEXTS = [
    Text("cat cat dog", "animals"),  # [cat][ cat][ ][d][o][g]: 6 tokens, 11 bytes, 3 words
    Text("你好好龘", "talk"),  # [你好][好] and three bytes of 龘: 5 tokens, 12 bytes, 4 characters
    Text("42", "talk"),  # 2 tokens, no letters
]


def test_sizes_fertility_and_use_are_those_worked_out_by_hand(directory):
    found = evaluate(directory("tiny", GOOD_CAT + HELLO), TEXTS)
    assert found["total"] == {
        "documents": 3,
        "characters": 17,
        "bytes": 25,
        "tokens": 13,
        "bytes_per_token": 25 / 13,
        "characters_per_token": 17 / 13,
        "tokens_per_document": 13 / 3,
    }
    tokens = {name: group["tokens"] for name, group in found["languages"].items()}
    assert tokens == {"zh": 5, "en": 6, "other": 2}
    assert {name: group["bytes"] for name, group in found["domains"].items()} == {
        "talk": 14,
        "animals": 11,
    }
    # English: [cat] [ cat] [d] [o] [g] have letters. Chinese: [你好] [好] and the three bytes.
    assert found["fertility"] == {"en": 5 / 3, "zh": 5 / 4}
    assert found["pieces"] == found["byte_tokens"] == 3 / 13
    # 266 tokens; each of the 13 is another one.
    assert found["vocabulary"]["tokens"] == 266
    assert found["vocabulary"]["used"] == pytest.approx(13 / 266)
    assert found["vocabulary"]["used_fewer_than"] == {
        "1": pytest.approx(253 / 266),
        "10": 1,
        "100": 1,
    }
    assert found["vocabulary"]["tokens_that_cover"] == {
        "0.5": 7, "0.8": 11, "0.9": 12, "0.95": 13, "0.99": 13, "0.999": 13
    }  # fmt: skip
    assert found["longest"][0] == {"token": "你好", "bytes": 6, "uses": 1}
    assert found["longest"][1] == {"token": " cat", "bytes": 4, "uses": 1}


def test_tokens_are_sorted_by_what_they_write(directory):
    kinds = evaluate(directory("tiny", GOOD_CAT + HELLO), TEXTS)["kinds"]
    # Chinese 你, 好 and 你好; pieces: the 128 bytes above 0x7f and two first bytes of 你 and 好.
    assert {kind: found["tokens"] for kind, found in kinds.items()} == {
        "Chinese": 3,
        "English": 52 + 5,
        "digits": 10,
        "white space": 10,  # of ASCII, U+001C to U+001F included, as str.isspace has it
        "punctuation": 128 - 52 - 10 - 10,
        "piece": 128 + 2,
    }
    assert {kind: round(found["text"] * 13) for kind, found in kinds.items()} == {
        "Chinese": 2, "English": 5, "digits": 2, "white space": 1, "punctuation": 0, "piece": 3
    }  # fmt: skip


def test_the_comparison_counts_tokens_by_language_and_domain_and_names_the_winner(directory):
    cat, hello, none = directory("cat", GOOD_CAT), directory("hello", HELLO), directory("none", [])
    found = compare([cat, hello, none], TEXTS)
    assert found["total"]["tokens"] == [6 + 12 + 2, 11 + 5 + 2, 25]
    assert found["total"]["ratio"] == [1, 20 / 18, 20 / 25]
    assert found["total"]["winner"] == hello
    assert found["languages"]["en"]["tokens"] == [6, 11, 11]
    assert found["languages"]["en"]["winner"] == cat
    assert found["domains"]["talk"]["bytes_per_token"] == [1, 2, 1]
    assert found["languages"]["other"]["winner"] is None


@pytest.mark.parametrize(
    ("text", "counts", "language"),
    [
        ("the cat's 3 paws", (0, 3, 0), "en"),
        ("用 Python 写代码", (4, 1, 0), "zh"),
        ("𠮷野家 〇々", (5, 0, 0), "zh"),
        ("日本語のテキストです", (3, 0, 7), "other"),
        ("Привет world", (0, 1, 6), "other"),
        ("naïve café", (0, 2, 0), "en"),
        ("42 !? 😀", (0, 0, 0), "other"),
        ("", (0, 0, 0), "other"),
    ],
)
def test_the_language_of_a_text_is_that_of_most_of_its_writing(text, counts, language):
    assert tuple(script(text)) == counts
    assert script(text).language == language


def test_the_domain_is_the_rows_source_or_the_name_of_its_file(write_jsonl):
    rows = [
        {"text": "a", "source": "wiki"},
        {"text": "b"},
        {"text": "c", "source": ""},
        {"text": "d", "source": 3},
    ]
    chat = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        "source": "talk",
    }
    found = list(read_texts([write_jsonl("a:b.jsonl", rows), write_jsonl("chat.jsonl", [chat])]))
    assert [text.domain for text in found] == [
        "wiki",
        "a:b.jsonl",
        "a:b.jsonl",
        "a:b.jsonl",
        "talk",
    ]
    assert found[-1].text == "Hi\nHo"


def test_a_weight_is_the_share_of_a_domains_texts_or_how_often_each_is_taken():
    texts = [Text(f"{domain} {i}", domain) for domain in "abcd" for i in range(1000)]
    taken = Counter(text.domain for text in weighted(texts, {"a": 0.25, "b": 2, "c": 0}))
    assert taken == {"a": pytest.approx(250, abs=60), "b": 2000, "d": 1000}
    assert list(weighted(texts, {"a": 0.25})) == list(weighted(texts, {"a": 0.25}))
    more = Counter(weighted(texts, {"a": 1.25}))
    assert {text for text in texts[:1000] if more[text] == 2} == set(
        weighted(texts[:1000], {"a": 0.25})
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": 1}, "--weights x: no text has this source. Found a, b"),
        ({"a": -1.0}, "--weights a=-1.0: expected"),
    ],
)
def test_a_weight_that_means_nothing_is_refused(weights, message):
    with pytest.raises(UserError, match=message):
        list(weighted([Text("t", "a"), Text("t", "b")], weights))


def test_every_probe_comes_back_from_the_default_tokenizer_and_none_becomes_a_control_token(
    tmp_path,
):
    load_tokenizer().save_pretrained(tmp_path)
    found = evaluate(tmp_path, [Text("a", "a")])["round_trip"]
    assert found["exact"]
    assert found["changed"] == []
    assert set(found["probes"]) == set(PROBES)
    assert sum(probe["control_tokens"] for probe in found["probes"].values()) == 0
    for name, probe in found["probes"].items():
        assert probe["bytes"] == sum(len(text.encode()) for text in PROBES[name])
        assert probe["exact"] == probe["texts"] == len(PROBES[name])
        assert 0 < probe["tokens"] <= probe["bytes"]


def test_a_tokenizer_that_loses_text_is_found_out(directory):
    name = directory("lossy", [])
    tokenizer = Tokenizer.from_file(f"{name}/tokenizer.json")
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(f"{name}/tokenizer.json")
    found = evaluate(name, [Text("a", "a")])["round_trip"]
    assert not found["exact"]
    assert {
        "probe": "numbers",
        "text": PROBES["numbers"][1],
        "back": PROBES["numbers"][1].lower(),
    } in found["changed"]
    assert all(change["back"] == change["text"].lower() for change in found["changed"])
    assert found["probes"]["emoji"]["exact"] == found["probes"]["emoji"]["texts"]


def test_tokens_that_any_text_can_call_by_name_are_named(directory):
    name = directory("callable", [])
    tokenizer = Tokenizer.from_file(f"{name}/tokenizer.json")
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(f"{name}/tokenizer.json")
    facts = evaluate(name, [Text("<s><think>", "a")])
    assert facts["tokenizer"]["added_tokens"] == ["<think>"]
    assert facts["tokenizer"]["control_tokens"] == ["<s>"]
    assert facts["total"]["tokens"] == 4  # the three characters of <s> and the token <think>
    assert facts["tokenizer"]["pre_tokenizer"] == "gpt-2"


def test_tokens_of_other_makes_stand_for_the_bytes_they_write():
    pieces = {"<unk>": 0, "<0x0A>": 1, "<0xE4>": 2, "▁cat": 3, "好": 4, "s": 6}
    tokenizer = Tokenizer(models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>"))
    assert token_bytes(tokenizer) == [
        b"<unk>", b"\n", b"\xe4", b" cat", "好".encode(), None, b"s"
    ]  # fmt: skip
    assert token_bytes(Tokenizer(models.WordPiece({"cat": 0, "##s": 1}, unk_token="cat"))) == [
        b"cat",
        b"s",
    ]


DEFAULT = Candidate(DEFAULT_TOKENIZER)


@settings(
    deadline=None, max_examples=300, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("".join(map(chr, [*range(0x3000), *range(0xE000, 0xE100), *range(0xFE00, 0x10000)])))
@example(
    "".join(chr(i) for i in range(0x1F000, 0x20000)) + "".join(map(chr, range(0x2A600, 0x33480)))
)
def test_any_text_comes_back_from_the_default_tokenizer_and_its_tokens_have_its_bytes(text):
    (ids,) = DEFAULT.encode([text])
    assert DEFAULT.decode(ids) == text
    assert b"".join(DEFAULT.bytes[index] for index in ids) == text.encode()
    assert not set(ids) & {0, 1, 2}


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_the_splitting_rule_keeps_signs_and_digits_as_its_table_says(rule):
    head = ["，但是", " I", "'ve", " ", "1", "2", "3", "4", "\n\n"]
    apart = ["，", "但是", " I", "'ve"]
    pieces = {
        "qwen2": [*head, "e", "\u0301t"],
        "qwen35": [*head, "e\u0301t"],
        "smollm": [*apart, " ", "1", "2", "3", "4", "\n", "\n", "e", "\u0301", "t"],
        "gpt-2": [*apart, " 1234", "\n", "\n", "e", "\u0301", "t"],
    }
    split = PRE_TOKENIZERS[rule].pre_tokenize_str("，但是 I've 1234\n\ne\u0301t")
    assert [decoders.ByteLevel().decode([piece]) for piece, _ in split] == pieces[rule]


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_every_splitting_rule_trains_a_tokenizer_from_which_all_probes_come_back(rule, tmp_path):
    text = " ".join([ENGLISH, CHINESE] * 3)
    train_tokenizer([text, text], vocab_size=300, pre_tokenizer=rule).save_pretrained(tmp_path)
    candidate = Candidate(tmp_path)
    assert candidate.facts()["pre_tokenizer"] == rule
    for texts in PROBES.values():
        assert [candidate.decode(ids) for ids in candidate.encode(texts)] == list(texts)


def test_a_rare_pair_is_not_merged_and_an_unknown_rule_is_refused():
    assert len(train_tokenizer(["aa bb bb"], min_frequency=2)) == len(train_tokenizer(["bb bb"]))
    with pytest.raises(UserError, match="--pre_tokenizer gpt-5: expected one of qwen2, "):
        train_tokenizer([ENGLISH], pre_tokenizer="gpt-5")


def test_a_tokenizer_that_makes_nothing_of_a_text_has_no_bytes_per_token(tmp_path):
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    found = evaluate(tmp_path, [Text("你", "x")])
    assert (found["total"]["tokens"], found["total"]["bytes_per_token"], found["pieces"]) == (
        0,
        None,
        None,
    )
    assert evaluation_tables(found)
    assert comparison_tables(compare([tmp_path, DEFAULT_TOKENIZER], [Text("你", "x")]))


# The commands


@pytest.fixture
def corpus(write_jsonl):
    return write_jsonl(
        "corpus.jsonl", [{"text": text.text, "source": text.domain} for text in TEXTS]
    )


def test_evaluate_prints_one_json_object_with_what_the_function_returns(directory, corpus, capsys):
    name = directory("tiny", GOOD_CAT + HELLO)
    main(["tokenizer", "evaluate", name, corpus, "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(evaluate(name, TEXTS)))


def test_compare_prints_one_json_object_and_tables_that_name_both(
    directory, corpus, capsys, tmp_path
):
    names = [directory("first", GOOD_CAT + HELLO), directory("second", [])]
    main(["tokenizer", "compare", *names, "--files", corpus, "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(compare(names, TEXTS)))
    for suffix in (".svg", ".html", ".txt"):
        main(
            [
                "tokenizer",
                "compare",
                *names,
                "--files",
                corpus,
                "--save",
                str(tmp_path / f"report{suffix}"),
            ]
        )
        assert "-48.0%" in capsys.readouterr().out  # 13 tokens against 25
        assert "48.0%" in (tmp_path / f"report{suffix}").read_text(encoding="utf-8")
    main(["tokenizer", "evaluate", names[0], corpus])
    assert "13" in capsys.readouterr().out


def test_default_is_the_tokenizer_that_ships(corpus, capsys):
    main(["tokenizer", "evaluate", "default", corpus, "--json"])
    assert json.loads(capsys.readouterr().out)["tokenizer"]["vocab_size"] == 6400


def test_train_takes_weights_and_the_rule_and_writes_a_tokenizer(corpus, tmp_path, capsys):
    options = [
        "--vocab_size",
        "300",
        "--pre_tokenizer",
        "smollm",
        "--weights",
        "animals=3",
        "talk=0",
    ]
    main(["tokenizer", "train", corpus, *options, "--output_dir", str(tmp_path / "out")])
    assert "(the text has no more pairs to merge)" in capsys.readouterr().out
    made = load_tokenizer(tmp_path / "out")
    assert Candidate(tmp_path / "out").facts()["pre_tokenizer"] == "smollm"
    assert made.get_vocab() == train_tokenizer([TEXTS[0].text] * 3, 300, "smollm").get_vocab()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "{missing}", "{corpus}"],
            "missing holds no tokenizer: tokenizer.json was not found",
        ),
        (["evaluate", "{broken}", "{corpus}"], "broken/tokenizer.json: not JSON"),
        (
            ["evaluate", "default", "{corpus}", "--save", "report.pdf"],
            "--save report.pdf: expected a name that ends",
        ),
        (
            ["evaluate", "default", "{corpus}", "--save", "no/x.svg"],
            "--save no/x.svg: the directory no does not exist",
        ),
        (["compare", "default", "--files", "{corpus}"], "expected at least two"),
        (
            ["train", "{corpus}", "--weights", "wiki", "--output_dir", "{missing}"],
            "argument --weights: invalid",
        ),
        (
            ["train", "{corpus}", "--weights", "wiki=a", "--output_dir", "{missing}"],
            "argument --weights: invalid",
        ),
        (
            ["train", "{corpus}", "--weights", "wiki=2", "--output_dir", "{missing}"],
            "--weights wiki: no text has",
        ),
        (
            ["train", "{corpus}", "--min_frequency", "-1", "--output_dir", "{missing}"],
            "--min_frequency -1: expected",
        ),
        (
            ["train", "{corpus}", "--pre_tokenizer", "x", "--output_dir", "{missing}"],
            "--pre_tokenizer x: expected",
        ),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(
    arguments, message, corpus, tmp_path, capsys
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    names = {"missing": tmp_path / "missing", "broken": tmp_path / "broken", "corpus": corpus}
    with pytest.raises(SystemExit) as stopped:
        main(["tokenizer", *(argument.format_map(names) for argument in arguments)])
    assert stopped.value.code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "missing").exists()


# The held-out part on which the default tokenizer is measured


def test_the_split_keeps_every_row_and_all_pieces_of_a_document_on_one_side(write_jsonl, tmp_path):
    documents = [f"book/{number}.txt#{part}" for number in range(100) for part in range(2)]
    rows = [
        {"text": f"{key} {i}", "doc": f"{key}:{i}", "source": "book"}
        for key in documents
        for i in range(5)
    ]
    chat = {"conversations": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "Ho"}]}
    files = [Path(write_jsonl("books.jsonl", rows)), Path(write_jsonl("chats.jsonl", [chat] * 3))]
    split(tmp_path / "out", files)
    parts = {name: read_jsonl(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "held_out")}
    keys = {name: {row["text"].rsplit(" ", 1)[0] for row in found} for name, found in parts.items()}
    assert not keys["train"] & keys["held_out"]
    assert 5 <= len(keys["held_out"] & set(documents)) <= 40
    written = sorted(row["text"] for found in parts.values() for row in found)
    assert written == sorted([row["text"] for row in rows] + ["Hi\nHo"] * 3)
    assert {row["source"] for found in parts.values() for row in found} == {"book", "chats"}


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
