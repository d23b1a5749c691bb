import json
import logging
from contextlib import nullcontext

import pytest
from pipeline import failure, run_cli

from minimind.common.errors import UserError
from minimind.data.documents import load_blocks
from minimind.data.markers import rendered_turn, split_documents
from minimind.tokenizer import text_encoder
from minimind.tokenizer_evaluation.texts import read_texts
from minimind.training.data_arguments import DataArguments

EOS = 2
CHATML = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>\n"
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nwho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nthe fox<|eot_id|>"
)
CHATS = [
    CHATML,
    LLAMA3,
    "<s>[INST] who? [/INST] the fox </s>",
    "<bos><start_of_turn>user\nwho?<end_of_turn>\n<start_of_turn>model\nthe fox<end_of_turn>\n",
    "<|user|>\nwho?<|end|>\n<|assistant|>\nthe fox<|end|>\n",
    "<｜begin▁of▁sentence｜><｜User｜>who?<｜Assistant｜>the fox<｜end▁of▁sentence｜>",
]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("<|im_start|>甲。<|im_end|> <|im_start|>乙。<|im_end|>", ["甲。", "乙。"]),
        ("<s>a</s> <s>b</s>", ["a", "b"]),
        ("<s>a</s> <s>b, cut of", ["a", "b, cut of"]),
        ("a</s>b</s>", ["a", "b"]),
        ("a<|endoftext|>b", ["a", "b"]),
        ("tail<|im_end|>\n<|im_start|>head", ["tail", "head"]),
        ("<|begin_of_text|>a<|end_of_text|><|begin_of_text|>b", ["a", "b"]),
        ("<bos>a<eos><bos>b<eos>", ["a", "b"]),
        ("[BOS]a[EOS] [BOS]b[EOS]", ["a", "b"]),
        ("<｜begin▁of▁sentence｜>a<｜end▁of▁sentence｜>b", ["a", "b"]),
        ('<|im_start|>"a" is<|im_end|> <|im_start|>"b"<|im_end|>', ['"a" is', '"b"']),
        ('he said "a"<|endoftext|>"b" is next', ['he said "a"', '"b" is next']),
        ("<|im_start|> <|im_end|>", []),
    ],
)
def test_a_text_is_split_where_markers_can_only_be_boundaries(text, documents):
    assert split_documents(text) == documents


@pytest.mark.parametrize(
    "text",
    [
        "plain [1] text <b>with</b> brackets",
        "was <s>10</s> now <s>8</s> 5",
        "<s>10</s> 8",
        "<p><s>10</s></p>",
        '<s n="1">a sentence</s>',
        'the token "<|endoftext|>" ends a document',
        "`<|im_end|>` ends a turn, and 「<|endoftext|>」 a document",
        "prompt = f'<|im_start|>user\\n{question}<|im_end|>\\n'",
        f"A chat is written so:\n{CHATML}and goes on.",
        "an <eos> in the middle",
    ],
)
def test_what_may_be_html_or_speaks_of_a_marker_is_left_as_it_is(text):
    assert split_documents(text) == [text]


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_spelled_out_is_one_document_of_its_words(chat):
    assert split_documents(chat) == ["who?\nthe fox"]
    assert rendered_turn([chat])


@pytest.mark.parametrize("text", ["the fox<|im_end|>", "the fox</s>", "the fox<|eot_id|>\n"])
def test_a_reply_with_the_end_of_a_turn_is_rendered_and_words_about_one_are_not(text):
    assert rendered_turn(["who?", text]) in text
    for said in ("<s>10</s>", "what does <|im_end|> mean?", "use <|im_start|>user"):
        assert rendered_turn([said]) is None


def marked(write_jsonl):
    return write_jsonl(
        "docs.jsonl", [{"text": f"<s>fox {i}</s> <s>dog {i}</s>"} for i in range(20)]
    )


def joined(blocks):
    return [token for row in blocks.train for token in row["input_ids"].tolist()]


def test_a_run_separates_the_documents_of_marked_rows_and_reports_it_each_time(
    tokenizer, write_jsonl, capsys
):
    encoder = text_encoder(tokenizer)
    expected = []
    for number in range(20):
        for name in ("fox", "dog"):
            expected += [*encoder.encode(f"{name} {number}", add_special_tokens=False).ids, EOS]
    args = DataArguments([marked(write_jsonl)], eval_ratio=0.0)
    for _ in ("prepared", "found again"):
        blocks = load_blocks(args, tokenizer, 16)
        assert joined(blocks) == expected[: len(expected) // 16 * 16]
        assert "split 20 rows at '<s>' into 40 documents" in capsys.readouterr().out
    assert blocks.facts["train"]["boundary_markers"] == "split 20 rows at '<s>' into 40 documents"


def test_the_option_keeps_or_refuses_markers(tokenizer, write_jsonl):
    path = marked(write_jsonl)
    split = load_blocks(DataArguments([path], eval_ratio=0.0), tokenizer, 16)
    kept = load_blocks(
        DataArguments([path], eval_ratio=0.0, boundary_markers="keep"), tokenizer, 16
    )
    assert (split.facts["train"]["documents"], kept.facts["train"]["documents"]) == (40, 20)
    assert tokenizer.decode(joined(kept)).startswith("<s>fox 0</s> <s>dog 0</s>")
    with pytest.raises(
        UserError, match=r"docs.jsonl:1: found the boundary marker '<s>' spelled out"
    ):
        load_blocks(DataArguments([path], boundary_markers="error"), tokenizer, 16)
    with pytest.raises(UserError, match="--boundary_markers cut: expected split, keep, error"):
        load_blocks(DataArguments([path], boundary_markers="cut"), tokenizer, 16)


@pytest.mark.parametrize(("policy", "severity"), [("split", "info"), ("keep", "warning")])
def test_an_inspection_counts_marked_rows_and_chats_among_documents(
    policy, severity, tokenizer_dir, write_jsonl, capsys
):
    path = write_jsonl(
        "docs.jsonl",
        [{"text": "<s>a fox</s> <s>a dog</s>"}, *[{"text": CHATML}, {"text": "plain"}] * 20],
    )
    argv = (
        "--stage",
        "pretrain",
        "--tokenizer",
        tokenizer_dir,
        "--max_length",
        16,
        "--boundary_markers",
        policy,
    )
    run_cli("inspect", path, *argv, "--json")
    report = json.loads(capsys.readouterr().out)
    (found,) = [found for found in report["findings"] if found["name"] == "boundary_markers"]
    assert (found["severity"], found["count"], found["places"][:2]) == (
        severity,
        21,
        [f"{path}:1", f"{path}:2"],
    )
    if policy == "split":
        assert (
            "split 21 rows at '<s>', '<|im_start|>' into 22 documents; 20 rows are chats"
            in found["text"]
        )
    assert report["documents"] == (42 if policy == "split" else 41)


def test_a_tokenizer_is_trained_on_the_split_documents_and_cleaning_splits_before_its_first_step(
    write_jsonl, tmp_path, capsys, caplog
):
    path = marked(write_jsonl)
    with caplog.at_level(logging.WARNING):
        assert [text.text for text in read_texts([path])][:3] == ["fox 0", "dog 0", "fox 1"]
    assert "split 20 rows at '<s>' into 40 documents" in caplog.text
    (tmp_path / "recipe.yaml").write_text("steps:\n  - remove_markup:\n  - exact_dedup:\n")
    run_cli("clean", path, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--num_proc", 1)
    said = capsys.readouterr().out
    assert "20 rows in + 20 by splitting = 40 out + 0 removed + 0 bad" in said
    assert "split 20 rows at <s> into 40" in said
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "data-00000.jsonl").read_text().splitlines()
    ]
    assert [row["text"] for row in rows][:3] == ["fox 0", "dog 0", "fox 1"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["boundary_markers"], report["rows"]["added"]) == ({"<s>": 20}, 20)


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": CHATML.removesuffix("the fox<|im_end|>\n"),
            "completion": "the fox {}<|im_end|>",
        },
        {"prompt": "who? {}", "completion": "the fox</s>"},
        {"prompt": "<s>[INST] who? {} [/INST]", "chosen": "the fox</s>", "rejected": "a dog</s>"},
    ],
    ids=["prompt and reply", "reply", "pair"],
)
def test_chats_that_are_rendered_already_are_an_error_where_most_rows_are(
    row, tokenizer_dir, write_jsonl, capsys
):
    plain = {name: "who {}?" if name == "prompt" else f"{name} {{}}" for name in row}
    for rendered, code in ((7, 1), (3, 0)):
        rows = [row] * rendered + [plain] * (10 - rendered)
        path = write_jsonl(
            "chats.jsonl",
            [{k: v.replace("{}", str(i)) for k, v in each.items()} for i, each in enumerate(rows)],
        )
        with pytest.raises(SystemExit) if code else nullcontext() as stop:
            run_cli("inspect", path, "--tokenizer", tokenizer_dir, "--json")
        report = json.loads(capsys.readouterr().out)
        (found,) = [found for found in report["findings"] if found["name"] == "rendered_chats"]
        assert (found["severity"], found["count"]) == ("error" if code else "warning", rendered)
        assert found["places"][0] == f"{path}:1"
        assert not code or stop.value.code == code


def test_a_text_that_is_a_rendered_chat_is_refused_by_what_it_is(
    tokenizer_dir, write_jsonl, capsys
):
    path = write_jsonl("chats.jsonl", [{"text": CHATML}] * 3)
    said = failure(capsys, run_cli, "inspect", path, "--stage", "sft", "--tokenizer", tokenizer_dir)
    assert f"{path}:1: found a chat that is rendered already, with '<|im_start|>user'" in said
    assert '"messages"' in said
