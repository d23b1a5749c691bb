"""A user's mistake: one message with place, found, expected and remedy; exit code 2; nothing
half-written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import (
    PAIR_LENGTHS,
    assistant,
    chat_rows,
    document_rows,
    failure,
    pair_rows,
    result,
    run_cli,
    run_script,
    short_run,
    user,
    write_model,
)

from minimind.common.errors import reports_user_errors

ROOT = Path(__file__).parent.parent
GOOD_CHAT = chat_rows()[0]


@pytest.fixture
def pretrain(tmp_path, monkeypatch, tokenizer_dir, capsys):
    """Run pretrain.py, which must fail, and return its message."""

    def run(files, **options):
        argv = short_run(tmp_path / "out", **{"block_size": 32, **options})
        argv += [
            "--model_config",
            write_model(tmp_path / "model.json"),
            "--tokenizer",
            str(tokenizer_dir),
        ]
        message = failure(
            capsys, run_script, monkeypatch, "pretrain", *argv, "--train_files", *files
        )
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("cache/blocks/*/manifest.json"))
        return message

    return run


@pytest.fixture
def stage(tmp_path, model, tokenizer):
    """A minimal stage directory."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def chats(tmp_path, monkeypatch, stage, write_jsonl, capsys):
    """Run finetune_sft.py on chat rows, which must fail, and return its message."""

    def run(rows, script="finetune_sft", **options):
        path = write_jsonl("rows.jsonl", rows)
        length = {"max_length": 64} if script == "finetune_sft" else PAIR_LENGTHS
        argv = short_run(options.pop("output_dir", tmp_path / "out"), **length | options)
        argv += ["--model_name_or_path", str(stage), "--train_files", path]
        message = failure(capsys, run_script, monkeypatch, script, *argv)
        assert not (tmp_path / "out").exists()
        return message

    return run


def check_words(message, *words):
    for word in words:
        assert word in message, message


def test_a_missing_file(pretrain):
    check_words(
        pretrain(["nowhere.jsonl"]),
        "nowhere.jsonl",
        "does not exist",
        "expected a file, directory or glob",
    )


def test_an_empty_file(pretrain, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    check_words(pretrain([tmp_path / "empty.jsonl"]), "empty.jsonl", "empty file")


def test_a_line_that_is_not_json(pretrain, write_jsonl):
    path = write_jsonl("docs.jsonl", [*document_rows(), "{not json"])
    check_words(
        pretrain([path]),
        f"{path}:65",
        "{not json",
        "expected one JSON object per line",
        "--on_bad_rows skip",
    )


def test_a_row_without_the_expected_field(pretrain, write_jsonl):
    path = write_jsonl("docs.jsonl", [{"body": "x"}, *document_rows()])
    check_words(pretrain([path]), f"{path}:1", 'found keys ["body"]', "expected 'text'")


def test_a_field_of_the_wrong_type(pretrain, write_jsonl):
    path = write_jsonl("docs.jsonl", [document_rows()[0], {"text": 7}])
    check_words(pretrain([path]), f"{path}:2", "7", "expected a string")


def test_invalid_utf_8(pretrain, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_bytes('{"text": "狐狸"}\n'.encode("gb18030"))
    check_words(pretrain([path]), f"{path}:1", "expected UTF-8")


def test_too_little_text_for_one_block(pretrain, write_jsonl):
    path = write_jsonl("docs.jsonl", [{"text": "fox"}])
    check_words(pretrain([path]), "expected at least block_size = 32", "smaller --block_size")


def test_a_block_beyond_the_models_positions(pretrain, write_jsonl):
    path = write_jsonl("docs.jsonl", document_rows())
    check_words(
        pretrain([path], block_size=512),
        "--block_size 512",
        "max_position_embeddings (256)",
        "Lower",
    )


def test_a_tokenizer_larger_than_the_models_vocabulary(tmp_path, monkeypatch, capsys, write_jsonl):
    model = tmp_path / "model.json"
    model.write_text(
        '{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}'
    )
    argv = [
        *short_run(tmp_path / "out"),
        "--model_config",
        model,
        "--train_files",
        write_jsonl("d", document_rows()),
    ]
    message = failure(capsys, run_script, monkeypatch, "pretrain", *argv)
    check_words(message, "the tokenizer has 6,400 tokens, the model 300")


def test_a_model_that_cannot_be(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model.json"
    model.write_text('{"num_attention_heads": 4, "num_key_value_heads": 3}')
    message = failure(capsys, run_script, monkeypatch, "pretrain", "--model_config", model)
    check_words(message, "num_attention_heads (4)", "num_key_value_heads (3)")


def test_an_unknown_key_in_a_recipe(tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rat: 1.0e-3\n")
    for script in ("pretrain", "finetune_sft", "train_dpo"):
        message = failure(capsys, run_script, monkeypatch, script, "--config", path)
        check_words(message, str(path), "unknown key learning_rat", "learning_rate?")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "no chat"}, ['found keys ["text"]', "expected"]),
        ({"messages": []}, ["messages", "[]"]),
        ({"messages": "hello"}, ["messages", '"hello"']),
        ({"messages": [{"role": "user", "content": 5}]}, ["content 5", "a string"]),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            ["expected that the last message is the assistant's"],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "hi"},
                    {"role": "user", "content": "hi"},
                ]
            },
            ["found the role 'assistant'", "expected 'user'"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            ["messages[1]", "found the role 'user'", "expected 'assistant'"],
        ),
        ({"messages": [{"role": "robot", "content": "hi"}]}, ["robot", "expected a 'role'"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "long " * 100},
                ]
            },
            ["tokens in the last turn", "--max_length 64", "Raise it"],
        ),
    ],
    ids=[
        "keys",
        "empty",
        "type",
        "content",
        "no-reply",
        "reversed",
        "twice-user",
        "role",
        "too-long",
    ],
)
def test_a_conversation_that_cannot_be_trained(chats, row, words):
    message = chats([GOOD_CHAT, GOOD_CHAT, row])
    check_words(message, "rows.jsonl:3", "found", "expected", *words)


def test_conversations_and_pairs_of_which_none_fits(chats):
    long = "long " * 100
    check_words(
        chats([{"prompt": "a", "completion": long}] * 2),
        "no row is left to train (2 dropped)",
        "Raise the limit of length",
    )
    pairs = [{"prompt": "a", "chosen": "b", "rejected": long}]
    options = {"max_completion_length": 16, "long_completions": "drop"}
    check_words(
        chats(pairs, script="train_dpo", **options),
        "no row is left to train (1 dropped)",
        "Raise the limit of length",
    )


def test_bad_rows_can_be_skipped_but_not_all_of_them(chats):
    check_words(chats([{"text": "no chat"}], on_bad_rows="skip"), "No usable row is left of 1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, ["expected 'chosen' and 'rejected'"]),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["found chosen equal to rejected"]),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, ["prompt", "found 3"]),
    ],
    ids=["field", "equal", "type"],
)
def test_a_pair_that_cannot_be_trained(chats, row, words):
    check_words(
        chats([pair_rows()[0], row], script="train_dpo"),
        "rows.jsonl:2",
        "found",
        "expected",
        *words,
    )


def test_pairs_for_a_base_model_without_a_template(chats, stage):
    (stage / "chat_template.jinja").unlink()
    message = chats(pair_rows(), script="train_dpo")
    check_words(message, "the tokenizer has no chat template", "--chat_template chatml")


def test_a_parent_that_is_no_stage_directory(tmp_path, monkeypatch, capsys):
    for script in ("finetune_sft", "train_dpo"):
        message = failure(capsys, run_script, monkeypatch, script, "--model_name_or_path", tmp_path)
        check_words(
            message,
            str(tmp_path),
            "is not a complete stage directory",
            "Expected the output of pretrain.py",
        )


def test_an_output_that_would_overwrite_the_parent(chats, stage, tmp_path):
    (stage / "stage.json").write_text('{"stage": "pretrain", "weights": ""}')
    message = chats([GOOD_CHAT] * 3, output_dir=stage)
    check_words(message, f"--output_dir {stage} is the stage this run starts from")


def test_a_window_beyond_the_models_positions(chats):
    check_words(
        chats([GOOD_CHAT], max_length=512), "--max_length 512", "max_position_embeddings (256)"
    )


def test_a_vocabulary_too_small_for_bytes(capsys, write_jsonl, tmp_path):
    path = write_jsonl("docs.jsonl", document_rows())
    argv = ["tokenizer", "train", path, "--vocab_size", 100, "--output_dir", tmp_path / "tokenizer"]
    check_words(failure(capsys, run_cli, *argv), "--vocab_size 100 is too small", "259")
    assert not (tmp_path / "tokenizer").exists()


def test_an_unknown_command(capsys):
    check_words(failure(capsys, run_cli, "fly"), "invalid choice: 'fly'", "minimind --help")


# --- names, outputs, streams
# ---------------------------------------------------------------------------------------

GBK = os.fsdecode("狐狸".encode("gbk"))  # a name as an archive from Windows has it


def test_data_of_any_name_is_read_and_reported(tmp_path, capsys):
    for name, rows in ((f"{GBK}.jsonl", document_rows()), (f"{GBK}2.jsonl", chat_rows())):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_cli("inspect", tmp_path / f"{GBK}2.jsonl", "--html", tmp_path / f"{GBK}.html", "--json")
    output = capsys.readouterr().out
    assert json.loads(output)
    assert f"{tmp_path}/\\udcba" in output
    assert "\\udcba" in (tmp_path / f"{GBK}.html").read_text()
    run_cli(
        "tokenizer",
        "train",
        tmp_path / f"{GBK}.jsonl",
        "--vocab_size",
        270,
        "--output_dir",
        tmp_path / "out",
    )
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["tokenizer", "train", "docs", "--output_dir", GBK], "--output_dir"),
        (["export", GBK, "out", "--format", "qwen3"], "directory"),
        (["generate", GBK, "--prompt", "x"], "directory"),
    ],
    ids=["tokenizer", "export", "generate"],
)
def test_what_the_libraries_cannot_name_is_refused(command, option, capsys):
    message = failure(capsys, run_cli, *command)
    assert message.startswith(f"{option} \\udcba")
    assert "not UTF-8" in message


OUTPUTS = {
    "a file in place of its directory": ("file/out", "is not a directory"),
    "a name too long": ("n" * 300, "File name too long"),
    "a link to nothing": ("dangling", "a link to nothing"),
    "a NUL character": ("a\0b", "NUL character"),
    "what may not be written": ("/proc/nothing/out", "/proc"),
}


@pytest.mark.parametrize(
    "words",
    [
        ["score", "nowhere", "rows.jsonl", "--out", "rows.jsonl"],
        ["pairs", "nowhere", "rows.jsonl", "./rows.jsonl", "--by_length", "longer"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_is_read_is_not_written_over(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chat_rows()))
    before = file.read_bytes()
    assert "is read by this command" in failure(capsys, run_cli, *words)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "command", ["inspect", "tokenizer", "clean", "world", "export", "import", "merge"]
)
@pytest.mark.parametrize(("out", "problem"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused(
    command, out, problem, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/x")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows()))
    before = set(tmp_path.iterdir())
    words = {
        "inspect": ["inspect", "rows.jsonl", "--html", out],
        "tokenizer": ["tokenizer", "train", "rows.jsonl", "--output_dir", out],
        "clean": [
            "clean",
            "rows.jsonl",
            out,
            "--recipe",
            ROOT / "configs" / "data" / "pretrain.yaml",
        ],
        "world": ["world", out],
        "export": ["export", "nowhere", out, "--format", "qwen3"],
        "import": ["import", "nowhere", out],
        "merge": ["merge", "nowhere", out],
    }
    message = failure(capsys, run_cli, *words[command])
    assert problem in message or "nowhere" in message  # what there is to read may be missed first
    assert set(tmp_path.iterdir()) - {tmp_path / "cache"} == before


def test_an_error_about_a_file_is_one_message_and_any_other_a_traceback(tmp_path, capsys):
    @reports_user_errors
    def main(error):
        raise error

    message = failure(
        capsys, main, FileNotFoundError(errno.ENOENT, "No such file or directory", "gone.jsonl")
    )
    assert message.startswith("gone.jsonl: no such file or directory.")
    assert "Free some space" in failure(
        capsys, main, OSError(errno.ENOSPC, "No space left on device")
    )
    for error in (OSError("of a library"), ConnectionError(), KeyError("x")):
        with pytest.raises(type(error)):
            main(error)


@pytest.mark.parametrize("option", ["--help_all", "--help"])  # more and less than a buffer holds
def test_a_reader_that_leaves_ends_a_command_quietly(option):
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "minimind.cli", option]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141  # as a shell tells of SIGPIPE


def test_json_in_a_string_is_nested_no_deeper_than_a_row(tmp_path, capsys):
    arguments = '{"a":' * 600 + "1" + "}" * 600
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [user("hi"), assistant("", tool_calls=[call]), result("r"), assistant("ok")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    for command in (["inspect", path], ["tokenizer", "evaluate", "default", path]):
        assert "nested more than 100 deep" in failure(capsys, run_cli, *command)
