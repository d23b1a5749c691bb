import logging

import pytest
from reading import GOOD, refusal, rows_of, write

from minimind.common.errors import BadRowError
from minimind.data.bad_rows import BadRows
from minimind.data.files import read_rows


@pytest.mark.parametrize("policy", [None, "skip"])
def test_reading_is_refused_if_no_usable_row_is_left(tmp_path, policy):
    path = write(tmp_path / "a.jsonl", "no\nnor this\n")
    message = refusal(lambda: list(read_rows([path], policy)))
    assert message.startswith(f"{path}:1: found 'no'")
    assert "No usable row is left of 2" in message


@pytest.mark.parametrize(
    ("bad", "good", "accepted"), [(1, 998, False), (1, 999, True), (2, 1997, False)]
)
def test_without_a_policy_at_most_one_row_in_a_thousand_may_be_bad(
    tmp_path, caplog, bad, good, accepted
):
    path = write(tmp_path / "a.jsonl", GOOD + "no\n" * bad + GOOD * (good - 1))
    if accepted:
        assert len(list(read_rows([path]))) == good
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"skipped {bad} of 1,000 rows: {path}:2: found 'no'")
    else:
        message = refusal(lambda: list(read_rows([path])))
        assert message.startswith(f"{path}:2: found 'no'")
        assert f"{bad} of {bad + good:,} rows are bad" in message


def test_the_first_bad_row_is_described_in_full_and_the_next_by_their_places(tmp_path):
    paths = [
        write(tmp_path / "a.jsonl", GOOD + "no\n" * 2),
        write(tmp_path / "b.jsonl", "no\n" * 6),
    ]
    message = refusal(lambda: list(read_rows(paths)))
    a, b = paths
    assert message.startswith(f"{a}:2: found 'no', which is not JSON")
    assert f"(and 7 more: {a}:3, {b}:1, {b}:2, {b}:3, ...)\n8 of 9 rows are bad" in message


def test_skipping_keeps_the_good_rows_and_logs_it_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "no\n" + GOOD + "nor\n" + GOOD)
    assert [where for where, _ in rows_of(path, on_bad_rows="skip")] == ["2", "4"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "skipped 2 of 4 rows"
    ]


def test_a_reader_that_stops_early_still_logs_what_was_skipped(tmp_path, caplog):
    rows = read_rows([write(tmp_path / "a.jsonl", "no\n" + GOOD * 3)])
    next(rows)
    rows.close()
    assert "skipped 1 of 2 rows" in caplog.text


def test_rows_that_the_caller_refuses_are_bad_rows_too(tmp_path):
    def convert(data):
        raise BadRowError("found a colour, expected a number")

    path = write(tmp_path / "a.jsonl", GOOD)
    message = refusal(lambda: list(read_rows([path], "error", convert)))
    assert message.startswith(f"{path}:1: found a colour, expected a number")


def test_an_unknown_policy_is_refused():
    assert "found 'ignore', expected error, skip" in refusal(lambda: BadRows("ignore"))
