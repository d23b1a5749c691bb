"""Samples of fixed prompts: which prompts, what is written, and that training is not changed."""

import json

import pytest
from pipeline import MODEL, chat_rows, document_rows, failure, run_script, short_run
from safetensors.torch import load_file
from torch import equal

from minimind.common.errors import UserError
from minimind.training.arguments import StageConfig
from minimind.training.samples import (
    CHAT_PROMPTS,
    TEXT_PROMPTS,
    one_line,
    prepare_prompts,
    read_prompts,
)


def is_chinese(text):
    return any("\u4e00" <= character <= "\u9fff" for character in text)


@pytest.mark.parametrize("prompts", [TEXT_PROMPTS, CHAT_PROMPTS])
def test_the_default_prompts_are_in_both_languages(prompts):
    assert {is_chinese(prompt) for prompt in prompts} == {True, False}


def test_a_line_of_a_prompt_file_is_a_text_or_a_json_object(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('The fox\n\n{"prompt": "从前\\n有"}\n42\n')
    assert read_prompts(path, chat=False) == ["The fox", "从前\n有", "42"]
    assert read_prompts(path, chat=True)[1] == [{"role": "user", "content": "从前\n有"}]


def test_a_prompt_may_be_a_conversation_whose_last_reply_is_left_out(tmp_path):
    path = tmp_path / "prompts.jsonl"
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hi!"),
        ("user", "Bye"),
        ("assistant", "Bye!"),
    ]
    path.write_text(
        json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    )
    (messages,) = read_prompts(path, chat=True)
    assert [(message["role"], message["content"]) for message in messages] == turns[:-1]


@pytest.mark.parametrize(
    ("text", "chat", "message"),
    [
        (None, False, "Give a UTF-8 file with one prompt a line"),
        ("\n", False, "is empty"),
        ('a\n{"text": 1}', False, ":2: found"),
        ('{"messages": []}', True, ":1: messages: found"),
        (
            (
                '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content":'
                ' "y"}]}'
            ),
            True,
            "role",
        ),
    ],
)
def test_a_wrong_prompt_file_is_refused_before_anything_runs(tmp_path, text, chat, message):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(str(path), chat)


@pytest.mark.parametrize(
    ("line", "tokens", "message"),
    [
        ('{"prompt": ""}', 4, ":1: found an empty prompt"),
        ('{"prompt": "\\ud83d"}', 4, ":1: found half a surrogate pair"),
        (
            '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
            4,
            ":1: found half a surrogate pair",
        ),
        (
            "fox " * 100,
            4,
            "'fox fox fox .*': found [0-9]+ tokens, expected 1 to 63: the model's positions",
        ),
        ("[" * 100_000, 4, "expected 1 to 63"),
        ("the fox", 0, "--sample_tokens 0: expected 1 to 64"),
        ("the fox", -5, "--sample_tokens -5: expected 1 to 64"),
        ("the fox", 10**9, "--sample_tokens 1,000,000,000: expected 1 to 64"),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_be_sampled_is_refused(tmp_path, tokenizer, line, tokens, message, chat):
    (tmp_path / "prompts.txt").write_text(f"{line}\n")
    args = StageConfig.__new__(StageConfig)
    args.sample_prompts, args.sample_tokens = str(tmp_path / "prompts.txt"), tokens
    if "messages" in line and not chat:
        message = ":1: found"
    with pytest.raises(UserError, match=message):
        prepare_prompts(args, chat, tokenizer, positions=64)


def test_a_line_of_prompts_ends_at_a_line_feed_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028line\r\n\n \u2029\ntwo".encode())
    assert read_prompts(path, chat=False) == ["one\u2028line", "two"]


def test_a_toy_with_few_positions_leaves_out_the_default_prompts_that_it_cannot_take(tokenizer):
    args = StageConfig.__new__(StageConfig)
    args.sample_prompts, args.sample_tokens = None, 48
    assert prepare_prompts(args, False, tokenizer, positions=4) == []
    assert len(prepare_prompts(args, False, tokenizer, positions=256)) == len(TEXT_PROMPTS)


def test_a_terminal_gets_no_control_characters():
    assert one_line("a\nb\x1b[31mc\u202e") == "a⏎b·[31mc·"
    assert len(one_line("x" * 1000)) < 200


@pytest.fixture
def run(monkeypatch, tmp_path, tokenizer_dir, write_jsonl):
    documents = write_jsonl("docs.jsonl", document_rows())
    model = tmp_path / "model.json"
    # So that the random numbers matter
    model.write_text(json.dumps(MODEL | {"attention_dropout": 0.2}))

    def start(name, script="pretrain", **options):
        data = [
            "--train_files",
            documents,
            "--model_config",
            model,
            "--tokenizer",
            tokenizer_dir,
            "--block_size",
            32,
        ]
        if script == "finetune_sft":
            data = [
                "--train_files",
                write_jsonl("chats.jsonl", chat_rows()),
                "--model_name_or_path",
                tmp_path / "base",
            ]
        options = {"max_steps": 4, "logging_steps": 1, "sample_tokens": 5} | options
        run_script(
            monkeypatch, script, *short_run(tmp_path / name, **options), *data, "--eval_ratio", 0.2
        )
        return tmp_path / name

    return start


def test_samples_do_not_change_the_training(run):
    plain, sampled = run("plain", sample_steps=-1), run("sampled", sample_steps=1)
    assert not (plain / "samples.jsonl").exists()
    weights = [load_file(stage / "model.safetensors") for stage in (plain, sampled)]
    assert all(equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [
        [
            json.loads(line).get("loss")
            for line in (stage / "train_log.jsonl").read_text().splitlines()
        ]
        for stage in (plain, sampled)
    ]
    assert losses[0] == losses[1]


def test_samples_are_taken_every_n_steps_and_at_the_end_of_every_stage(run, capsys, tmp_path):
    run("base", sample_steps=3)
    rows = [
        json.loads(line) for line in (tmp_path / "base" / "samples.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [3] * 4 + [4] * 4
    assert [row["prompt"] for row in rows[:4]] == list(TEXT_PROMPTS)
    assert "samples after step 3" in capsys.readouterr().out
    chat = run("chat", "finetune_sft", max_length=64)
    rows = [json.loads(line) for line in (chat / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (4, prompt) for prompt in CHAT_PROMPTS
    ]
    page = (chat / "report.html").read_text()
    assert CHAT_PROMPTS[0] in page


def test_a_wrong_prompt_file_is_one_message(run, capsys):
    assert "no/such" in failure(capsys, lambda: run("x", sample_prompts="no/such"))
