"""The inspection before a run: what stops it, and what it leaves."""

import json
import re
from pathlib import Path

import pytest
from inspecting import chat, finding, rows_of
from pipeline import failure, run_script, short_run

from minimind.tokenizer import save_tokenizer


@pytest.fixture
def stage_dir(tokenizer, model, tmp_path):
    directory = tmp_path / "base"
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory


GOOD = rows_of(*(chat(f"who runs? {i}", f"the fox {i}") for i in range(8)))
BAD = [{"nothing": i} for i in range(3)]


def sft(monkeypatch, out, stage_dir, path, *argv):
    options = ["--model_name_or_path", stage_dir, "--train_files", path, "--eval_ratio", 0, *argv]
    run_script(monkeypatch, "finetune_sft", *short_run(out, max_length=64, max_steps=1), *options)


def test_a_run_that_would_lose_a_fifth_of_its_rows_stops_before_it_writes(
    monkeypatch, capsys, tmp_path, stage_dir, write_jsonl
):
    path = write_jsonl("chats.jsonl", GOOD + BAD)
    said = failure(
        capsys, sft, monkeypatch, tmp_path / "out", stage_dir, path, "--on_bad_rows", "skip"
    )
    assert "rows_lost: 3 of 11 rows (27.3%) are left out" in said
    assert f"{path}:9\n" in said
    assert "--on_findings warn" in said
    assert not (tmp_path / "out").exists()
    sft(
        monkeypatch,
        tmp_path / "out",
        stage_dir,
        path,
        "--on_bad_rows",
        "skip",
        "--on_findings",
        "warn",
    )
    saved = json.loads((tmp_path / "out" / "mask_report.json").read_text())
    assert finding(saved, "rows_lost")["count"] == 3
    assert (saved["rows"], saved["roles"]["user"]["trained"]) == (8, 0)


@pytest.mark.parametrize("fault", [None, "end_never_trained", "border_trained"])
def test_a_run_whose_template_marks_the_wrong_tokens_stops(
    fault, monkeypatch, capsys, tmp_path, stage_dir, write_jsonl
):
    reply = {
        None: "{{ head }}{% generation %}{{ text }}<|im_end|>{% endgeneration %}",
        "end_never_trained": "{{ head }}{% generation %}{{ text }}{% endgeneration %}<|im_end|>",
        "border_trained": "{% generation %}{{ head }}{{ text }}<|im_end|>{% endgeneration %}",
    }[fault]
    template = (
        "{% for m in messages %}{% set text = m['content'] %}{% set head = '<|im_start|>' +"
        " m['role'] + '\n' %}{% if m['role'] == 'assistant' %}"
        + reply
        + "{% else %}{{ head }}{{ text }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    )
    (stage_dir / "chat_template.jinja").write_text(template)
    argv = (tmp_path / "out", stage_dir, write_jsonl("chats.jsonl", GOOD))
    if fault:
        assert {"end_never_trained": "never learn to stop"}.get(fault, fault) in failure(
            capsys, sft, monkeypatch, *argv
        )
        assert not (tmp_path / "out").exists()
    else:
        sft(monkeypatch, *argv)
        assert (tmp_path / "out" / "stage.json").exists()


def test_a_run_that_would_train_nothing_stops(
    monkeypatch, capsys, tmp_path, stage_dir, write_jsonl
):
    rows = [
        {
            "messages": [
                m | {"train": False} if m["role"] == "assistant" else m for m in r["messages"]
            ]
        }
        for r in GOOD
    ]
    said = failure(
        capsys, sft, monkeypatch, tmp_path / "out", stage_dir, write_jsonl("chats.jsonl", rows)
    )
    assert "no row is left to train" in said


def test_the_report_is_logged_to_wandb_as_tables(
    monkeypatch, capsys, tmp_path, stage_dir, write_jsonl
):
    for name in ("WANDB_API_KEY", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_BASE_URL", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    path = write_jsonl("chats.jsonl", GOOD + GOOD[:1])
    sft(monkeypatch, tmp_path / "out", stage_dir, path, "--report_to", "wandb")
    import wandb

    wandb.finish()
    wandb.teardown()  # the process would keep this test's directory
    tables = {}
    run = Path(re.search(r"wandb sync (.*)", capsys.readouterr().out)[1])
    for file in (run / "files" / "media" / "table" / "inspection").glob("*.table.json"):
        told = json.loads(file.read_text())
        tables[file.name.split("_")[0]] = [
            dict(zip(told["columns"], row, strict=True)) for row in told["data"]
        ]
    saved = json.loads((tmp_path / "out" / "mask_report.json").read_text())
    roles = {row["role"]: (row["tokens"], row["trained"]) for row in tables["roles"]}
    assert roles == {
        name: (counts["tokens"], counts["trained"]) for name, counts in saved["roles"].items()
    }
    assert tables["lengths"] == saved["lengths"]["windows"]
    assert [row["name"] for row in tables["findings"]] == ["duplicate_rows"]
    assert tables["findings"][0]["places"] == f"{path}:9 (as {path}:1)"
