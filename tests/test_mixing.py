import numpy as np
import pytest

from minimind.common.errors import UserError
from minimind.data.mixing import Source, mixture, parse_sources, rows_per_epoch


@pytest.mark.parametrize(
    ("words", "sources"),
    [
        (["a.jsonl", "b/"], [Source(["a.jsonl", "b/"])]),
        (["a.jsonl:0.7", "b:0.3"], [Source(["a.jsonl"], weight=0.7), Source(["b"], weight=0.3)]),
        (["a.jsonl:2x", "b", "c"], [Source(["b", "c"]), Source(["a.jsonl"], epochs=2)]),
        (["a:0.5x"], [Source(["a"], epochs=0.5)]),
        (["C:\\data\\a.jsonl"], [Source(["C:\\data\\a.jsonl"])]),
        (["*.jsonl:3"], [Source(["*.jsonl"], weight=3)]),
    ],
)
def test_the_weight_or_passes_of_a_source_follow_its_path(words, sources):
    assert parse_sources(words) == sources


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path):
    path = tmp_path / "a:1"
    path.write_text("x")
    assert parse_sources([str(path)]) == [Source([str(path)])]
    assert parse_sources([f"{path}:2"]) == [Source([str(path)], weight=2)]


@pytest.mark.parametrize(
    ("words", "temperature", "message"),
    [
        (["a:0.7", "b"], None, "b has no weight and a has one"),
        (["a:0.7", "b:2x"], None, "b has no weight"),
        (["a:0"], None, "found the number 0, expected one above 0"),
        (["a:-1x"], None, "found the number -1"),
        (["a:nan"], None, "found the number nan"),
        (["a:1", "b:1"], 2.0, "leave the :numbers"),
        (["a", "b"], 0.0, "--mixing_temperature 0: expected a number above 0"),
    ],
)
def test_an_impossible_mixture_is_refused(words, temperature, message):
    with pytest.raises(UserError, match=message):
        parse_sources(words, temperature)


def shares(counts):
    return [count / sum(counts) for count in counts]


def test_weights_are_shares_and_no_row_is_repeated_unless_requested():
    sources = parse_sources(["a:0.7", "b:0.3"])
    counts = rows_per_epoch(sources, [1000, 9000])
    assert counts == [1000, 429]
    assert shares(counts) == pytest.approx([0.7, 0.3], abs=1e-3)
    counts = rows_per_epoch(sources, [1000, 9000], stopping="all_exhausted")
    assert counts == [21000, 9000]
    assert rows_per_epoch(parse_sources(["a:7", "b:3"]), [1000, 9000]) == [1000, 429]


def test_a_temperature_of_one_mixes_by_size_and_a_high_one_all_alike():
    sources = parse_sources(["a", "b"], temperature=1)
    assert rows_per_epoch(sources, [100, 900], 1) == [100, 900]
    assert rows_per_epoch(sources, [100, 900], 1e9) == [100, 100]
    assert rows_per_epoch(sources, [100, 900], 2) == [100, 300]  # the square roots are 10 and 30


def test_an_epoch_passes_over_a_source_as_often_as_its_number_says():
    assert rows_per_epoch(parse_sources(["a", "b:2.5x"]), [100, 10]) == [100, 25]


def test_an_unknown_way_to_stop_is_refused():
    with pytest.raises(UserError, match="first_exhausted, all_exhausted"):
        rows_per_epoch([Source(["a"], weight=1)], [1], stopping="never")


def test_a_mixture_takes_complete_passes_and_a_random_part_of_one_more():
    rows = mixture([4, 3], [10, 2], seed=1)
    first, second = rows[rows < 4], rows[rows >= 4]
    counts = np.bincount(first, minlength=4)
    assert len(first) == 10
    assert set(counts.tolist()) == {2, 3}
    assert len(set(second.tolist())) == 2
    assert set(second.tolist()) <= {4, 5, 6}
    assert mixture([4, 3], [10, 2], seed=1).tolist() == rows.tolist()
    assert any(
        mixture([4, 3], [10, 2], seed=seed).tolist() != rows.tolist() for seed in range(2, 9)
    )
