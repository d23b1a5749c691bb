import os
from pathlib import Path

import datasets
import pytest
from reading import GOOD, TWO, refusal, write

from minimind.data.files import read_documents, read_rows
from minimind.data.sources import expand


def test_a_saved_dataset_of_several_splits_is_refused_with_their_names(tmp_path):
    split = datasets.Dataset.from_list(TWO)
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "saved")
    message = refusal(lambda: expand([str(tmp_path / "saved")]))
    assert all(str(tmp_path / "saved" / name) in message for name in ("train", "test"))
    assert list(read_documents([str(tmp_path / "saved" / "train")])) == ["一", "two"]


def test_files_directories_and_globs_mix_and_yield_each_file_once(tmp_path):
    names = ["b.jsonl", "a.jsonl", "deep/er/c.csv", "README.md", ".hidden/d.jsonl", "deep/.e.jsonl"]
    for name in names:
        write(tmp_path / name, GOOD)
    given = [
        str(tmp_path / "b.jsonl"),
        str(tmp_path / "*.jsonl"),
        str(tmp_path),
        str(tmp_path / "**" / "*.csv"),
    ]
    assert [str(path.relative_to(tmp_path)) for path in expand(given)] == [
        "b.jsonl",
        "a.jsonl",
        "deep/er/c.csv",
    ]


def test_links_are_followed_and_yield_each_file_once_even_in_a_loop(tmp_path):
    write(tmp_path / "store" / "a.jsonl", GOOD)
    write(tmp_path / "store" / "deep" / "b.jsonl", GOOD)
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "store")
    (data / "linked-again").symlink_to(tmp_path / "store")
    (data / "c.jsonl").symlink_to(tmp_path / "store" / "a.jsonl")
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    (tmp_path / "store" / "self").symlink_to(tmp_path / "store")
    for given in ([str(data)], [str(data), str(tmp_path)], [f"{tmp_path}/**"], [f"{data}/*"]):
        assert {file.resolve().name for file in expand(given)} == {"a.jsonl", "b.jsonl"}
        assert len(expand(given)) == 2


def test_a_glob_gives_directories_as_a_shell_would_and_hidden_names_only_where_it_spells_them(
    tmp_path,
):
    for name in ["one/a.jsonl", ".hidden/b.jsonl", "two.jsonl/c.csv", "two.jsonl/.d.csv"]:
        write(tmp_path / name, GOOD)
    expected = {
        "*": ["a.jsonl", "c.csv"],
        "*.jsonl": ["c.csv"],
        ".hid*/*": ["b.jsonl"],
        ".hidden/*": ["b.jsonl"],
    }
    assert {
        pattern: [f.name for f in expand([f"{tmp_path}/{pattern}"])] for pattern in expected
    } == expected


def test_a_directory_that_cannot_be_opened_is_refused_and_not_left_out(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", GOOD)
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def no_permission(path):  # modes do not bind every user who runs tests
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", no_permission)
    message = refusal(lambda: expand([str(tmp_path)]))
    assert message.startswith(f"{tmp_path}: cannot be looked up")
    assert "Permission denied" in message
    assert str(closed) in message


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    assert [path.name for path in expand([write(tmp_path / "a[1].jsonl", GOOD)])] == ["a[1].jsonl"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("absent.jsonl", ["does not exist", "expected a file, directory or glob"]),
        ("none", ["found no data file", ".jsonl", ".parquet"]),
        ("*.jsonlines", ["found no data file", "expected files with"]),
        ("notes.md", ["extension '.md'", "expected .jsonl"]),
        ("empty.jsonl", ["empty file", "expected rows"]),
    ],
)
def test_a_path_without_data_is_named_with_what_was_expected(tmp_path, given, words):
    (tmp_path / "none").mkdir()
    write(tmp_path / "notes.md", "notes")
    write(tmp_path / "empty.jsonl", "")
    message = refusal(lambda: read_rows([str(tmp_path / given)]))  # at once, not at the first row
    assert message.startswith(str(tmp_path / given))
    assert all(word in message for word in words)


def test_no_paths_at_all_are_refused():
    assert "expected at least one file" in refusal(lambda: expand([]))


def test_a_directory_keeps_the_parts_that_are_named_for_evaluation_out(tmp_path, caplog):
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation", "contest", "x_eval"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    assert [path.stem for path in expand([str(tmp_path)])] == ["contest", "train-00000-of-00001"]
    assert (
        "left out 3 of 5 files, which are named as held-out data: test-00000-of-00001.jsonl"
        in caplog.text
    )
    assert [path.stem for path in expand([str(tmp_path / "validation.jsonl")])] == ["validation"]
    only = tmp_path / "contest.jsonl"
    for path in tmp_path.iterdir():
        if "test-" in path.name or path == only or "train" in path.name:
            path.unlink()
    assert [path.stem for path in expand([str(tmp_path)])] == ["validation", "x_eval"]
