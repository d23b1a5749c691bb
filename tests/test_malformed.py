"""Every malformed file of `malformed.py` at the readers, and some of them at whole commands."""

import re

import pytest
from malformed import Case, malformed
from pipeline import failure, run_cli, run_script, short_run, write_model

from minimind.common.errors import UserError
from minimind.data.bad_rows import BAD_ROW_SHARE
from minimind.data.conversations import to_messages
from minimind.data.files import read_rows, to_document
from minimind.data.preferences import to_preference

CONVERT = {"document": to_document, "conversation": to_messages, "preference": to_preference}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    return malformed(tmp_path_factory.mktemp("malformed"))


def read(case: Case, policy: str | None) -> int | str:
    """How many rows come out, or the message that refuses them."""
    try:
        return sum(1 for _ in read_rows(case.paths, policy, CONVERT[case.kind]))
    except UserError as error:
        return str(error)


def test_there_are_many_cases_and_each_has_a_name_of_its_own(cases):
    assert len({case.name for case in cases}) == len(cases) >= 60


@pytest.mark.parametrize("policy", ["error", "skip", None])
def test_every_malformed_file_has_its_expected_outcome(cases, policy, caplog, subtests):
    for case in cases:
        caplog.clear()
        with subtests.test(case.name):
            came, total = read(case, policy), case.skipped + case.kept
            if case.expected == "error" or policy == "error":
                assert re.match(case.pattern, str(came)), came
            elif not case.kept:
                assert re.match(case.pattern, str(came)), came
                assert f"No usable row is left of {total:,}." in came
            elif policy == "skip" or case.skipped <= BAD_ROW_SHARE * total:
                assert came == case.kept
                (record,) = caplog.records
                told = record.getMessage()
                assert told.startswith(f"skipped {case.skipped:,} of {total:,} rows: ")
                assert re.match(case.pattern, told.split("rows: ", 1)[1]), told
            else:
                assert re.match(case.pattern, str(came)), came
                assert f"{case.skipped:,} of {total:,} rows are bad" in came


REFUSED_BY_COMMANDS = [
    "truncated object",
    "a key twice",
    "escape of a high surrogate",
    "a long line cut off",
    "UTF-16 with a mark",
    "gzip cut off",
    "zstd cut off",
    "a list cut off",
    "a csv with an open quote",
    "parquet cut off",
    "a pipe",
    "a name no file can have",
]


@pytest.mark.parametrize("name", REFUSED_BY_COMMANDS)
def test_a_command_refuses_it_in_one_message_and_writes_nothing(cases, name, tmp_path, capsys):
    (case,) = (case for case in cases if case.name == name)
    out = tmp_path / "out"
    argv = ["tokenizer", "train", *case.paths, "--output_dir", out, "--on_bad_rows", "error"]
    assert re.match(case.pattern, failure(capsys, run_cli, *argv))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gzip cut off", "parquet with text not UTF-8"])
def test_pretraining_refuses_it_and_leaves_nothing_a_later_run_would_take_for_whole(
    cases, name, tmp_path, monkeypatch, capsys, tokenizer_dir
):
    (case,) = (case for case in cases if case.name == name)
    argv = [
        *short_run(tmp_path / "out", block_size=32),
        "--model_config",
        write_model(tmp_path / "model.json"),
    ]
    argv += ["--tokenizer", str(tokenizer_dir), "--train_files", *case.paths]
    message = failure(capsys, run_script, monkeypatch, "pretrain", *argv)
    assert re.match(case.pattern, message.splitlines()[0])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("manifest.json"))
