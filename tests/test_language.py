"""Messages are Chinese where that is configured, from a table that matches the code; else
English."""

import argparse
import ast
import io
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import document_rows, run_cli, run_script, short_run, write_model

import minimind
from minimind.common.errors import UserError, reports_user_errors
from minimind.common.language import say, table, translated

CODE = [*Path(minimind.__file__).parent.rglob("*.py"), Path(argparse.__file__)]
HAN = re.compile(r"[\u4e00-\u9fff]")
TEMPLATES = table()


@pytest.fixture
def chinese(monkeypatch):
    monkeypatch.setenv("MINIMIND_LANG", "zh")


def literals(path: Path) -> set[str]:
    """The strings in a file, each f-string with {} for its values; also with {} for what % or
    `format` fills in."""
    texts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts |= {node.value, re.sub(r"%(\(\w+\))?[rsd]|\{\w+(:[^{}]+)?\}", "{}", node.value)}
        elif isinstance(node, ast.JoinedStr):
            is_text = [isinstance(part, ast.Constant) for part in node.values]
            parts = zip(node.values, is_text, strict=True)
            texts.add("".join(part.value if text else "{}" for part, text in parts))
    return texts


def filled(template: str) -> tuple[str, list[str]]:
    """A template with its gaps filled by names that are in no template."""
    names = [f"⟨{number}⟩" for number in range(template.count("{}"))]
    words = template.split("{}")
    return "".join(word + name for word, name in zip(words, [*names, ""], strict=True)), names


def test_every_template_is_a_text_of_the_code():
    texts = set().union(*map(literals, CODE))
    assert sorted(set(TEMPLATES) - texts) == []


def test_every_template_is_translated_by_its_own_chinese_and_with_all_its_gaps(chinese):
    """Fails too where an earlier template takes the text of a later one."""
    wrong = {}
    for template, expected in TEMPLATES.items():
        text, names = filled(template)
        numbers = [field or str(index) for index, field in enumerate(gaps(expected))]
        if sorted(numbers) != [str(index) for index in range(len(names))]:
            wrong[template] = numbers
        elif translated(text) != expected.format(*names):
            wrong[template] = translated(text)
    assert wrong == {}


def gaps(chinese: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(chinese) if field is not None]


def test_english_is_untouched_and_does_not_read_the_table(monkeypatch):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.setenv("MINIMIND_LANG", "en")  # it goes before the locale
    table.cache_clear()
    assert (
        translated("interrupted: nothing more was saved") == "interrupted: nothing more was saved"
    )
    assert table.cache_info().currsize == 0


def test_the_locale_chooses_chinese_where_no_variable_does(monkeypatch):
    for name in ("MINIMIND_LANG", "LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert translated("interrupted: nothing more was saved") == "已中断：没有再保存任何内容"
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert (
        translated("interrupted: nothing more was saved") == "interrupted: nothing more was saved"
    )


def test_nested_messages_are_translated_too(chinese):
    problem = "messages[1]: found 7, expected an object with 'role' and 'content'"
    remedy = "Fix the row, or leave out bad rows with --on_bad_rows skip."
    assert (
        translated(f"error: a b.jsonl:3: {problem} (and 1 more: a b.jsonl:4)\n{remedy}")
        == "错误：a b.jsonl:3：messages[1]：读到 7，应为含有 'role' 和 'content' 的对象（另有 1"
        " 处：a b.jsonl:4）\n"
        "请修正这一行，或用 --on_bad_rows skip 跳过坏行。"
    )


def test_joined_sentences_are_translated_one_by_one(chinese):
    findings = (
        "\n  epochs: 9 passes over the data. Give more text, or train for fewer steps.\n  wide: 7"
        " of 8"
    )
    assert (
        translated(f"this run would go wrong:{findings}\nTo train it still: --on_findings warn.")
        == "这次训练会出错：\n  epochs: 数据重复 9 遍。请给出更多文本，或减少训练步数。\n  wide: 7"
        " of 8\n"
        "如仍要训练：--on_findings warn。"
    )


def test_a_text_without_a_template_stays(chinese):
    text = "nobody: has, this; text. At all\n  here"
    assert translated(text) == text


def test_an_ascii_terminal_gets_english(chinese, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    say("interrupted: nothing more was saved")
    assert terminal.buffer.getvalue() == b"interrupted: nothing more was saved\n"


def test_an_error_comes_out_in_chinese(chinese, capsys):
    @reports_user_errors
    def main():
        raise UserError(
            "runs/x exists and is not empty. Give a directory that does not exist yet, or"
            " remove it."
        )

    with pytest.raises(SystemExit):
        main()
    assert (
        capsys.readouterr().err
        == "错误：runs/x 已存在且不是空目录。请给出一个尚不存在的目录，或删除它。\n"
    )


def test_a_run_and_a_chat_speak_chinese(
    chinese, tmp_path, tokenizer_dir, write_jsonl, monkeypatch, capsys
):
    """Names of metrics and figures stay, and so does what is written to files."""
    texts = write_jsonl("texts.jsonl", document_rows())
    words = ["--train_files", texts, "--model_config", write_model(tmp_path / "model.json")]
    words += ["--tokenizer", tokenizer_dir, "--block_size", 16, "--sample_tokens", 2]
    run_script(monkeypatch, "pretrain", *short_run(tmp_path / "run", logging_steps=1), *words)
    said = capsys.readouterr().out
    for line in (
        rf"正在准备 {texts}（只此一次；保存在 \S+）",
        rf"pretrain -> {tmp_path}/run（起点：随机权重）",
        (
            r"  步数   2 步，每步 2 行（2 x 1 累积 x 1 进程），学习率"
            r" 0.0005（cosine_with_min_lr），随机种子 42"
        ),
        r"步 2/2 100.0%  loss \d.*  lr .*  已用 \S+，剩余 0:00:00",
        r"第 2 步之后的样例",
        rf"pretrain 已完成，目录 {tmp_path}/run，用时 \d+ 秒",
    ):
        assert re.search(f"^{line}$", said, re.MULTILINE), (line, said)
    for file in ("train_log.jsonl", "stage.json"):
        assert not HAN.search((tmp_path / "run" / file).read_text(encoding="utf-8"))

    monkeypatch.setattr("sys.stdin", io.StringIO("/help\n/nothing\n"))
    run_cli("chat", tmp_path / "run")
    heard = capsys.readouterr()
    assert (
        heard.out.startswith("按回车续写")
        and "/nothing：没有这个命令。请用 /help 查看。\n" in heard.out
    )
    assert heard.err.startswith("注意：") and "是基座模型" in heard.err


@pytest.mark.parametrize(
    ("language", "expected"), [("zh", "错误：缺少参数："), ("en", "error: the following arguments")]
)
def test_a_command_speaks_the_configured_language(language, expected, monkeypatch):
    monkeypatch.setenv("MINIMIND_LANG", language)
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    command = [sys.executable, "-m", "minimind.cli", "chat"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=Path(minimind.__file__).parents[1]
    )
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
