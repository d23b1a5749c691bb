"""The recipe on datatrove's local executor gives what `minimind clean` gives."""

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="the extra data-cluster is not installed")

from cleaning_corpus import ALL, corpus, output, procedure

from minimind.cleaning import clean
from minimind.cleaning.cluster import clean_with_datatrove, stages


@pytest.fixture
def files(write_jsonl):
    """Three files, of which the last has rows of its own and copies of earlier ones, one with a
    change."""
    rows = corpus(90)
    copies = [
        {**rows[0], "id": "copy"},
        {**rows[5], "id": "near", "text": rows[5]["text"].replace("old", "new")},
    ]
    parts = [
        rows[:40],
        rows[40:],
        [*copies, {"id": "own", "text": "一篇与其他文章都不相同的短文，说的是海边的灯塔。"}],
    ]
    return [write_jsonl(f"{number}.jsonl", part) for number, part in enumerate(parts)]


def texts(rows):
    return Counter(json.dumps({**row, "id": None}, sort_keys=True) for row in rows)


def test_steps_for_single_rows_and_exact_dedup_give_the_same_rows(tmp_path, files):
    steps = [{step.name: None} for step in ALL.steps if step.name != "near_dedup"]
    clean(files, tmp_path / "here", procedure(*steps), 1)
    clean_with_datatrove(
        files, tmp_path / "working", tmp_path / "there", procedure(*steps), tasks=2, workers=1
    )
    assert texts(output(tmp_path / "there")) == texts(output(tmp_path / "here"))
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_near_dedup_finds_the_copies_across_tasks(tmp_path, write_jsonl):
    rows = [
        {"id": n, "text": "".join(chr(0x4E00 + 311 * n + 7 * m) for m in range(300))}
        for n in range(20)
    ]
    copies = [{"id": row["id"] + 100, "text": row["text"][:290] + "另一个结尾"} for row in rows[:7]]
    files = [write_jsonl("a.jsonl", rows), write_jsonl("b.jsonl", copies)]
    clean_with_datatrove(
        files,
        tmp_path / "working",
        tmp_path / "out",
        procedure("near_dedup", "length"),
        tasks=2,
        workers=1,
    )
    assert sorted(row["id"] % 100 for row in output(tmp_path / "out")) == list(range(20))


def test_the_jobs_name_their_tasks_and_bad_rows_are_left_out(tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", ["bad", {"text": "a  good row"}, {"text": "short"}])
    jobs = stages([path], tmp_path / "working", tmp_path / "out", ALL, tasks=3)
    assert [(job.name, job.tasks) for job in jobs] == [
        ("rows-0", 3),
        ("exact_dedup-1", 3),
        ("exact_dedup-2", 1),
        ("rows-1", 3),
        ("near_dedup-1", 3),
        ("near_dedup-2", 16),
        ("near_dedup-3", 1),
        ("rows-2", 3),
    ]
    steps = procedure("whitespace", {"length": {"min_chars": 8}})
    clean_with_datatrove([path], tmp_path / "working", tmp_path / "out", steps, tasks=2, workers=1)
    assert output(tmp_path / "out") == [{"text": "a good row"}]
    # None for the idle task
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["data-00000.jsonl"]
    stats = json.loads(Path(tmp_path / "working" / "logs" / "rows-0" / "stats.json").read_text())
    counted = {name: value for block in stats for name, value in block["stats"].items()}
    assert counted["bad"] == 1 == counted["length: fewer than 8 chars"]
