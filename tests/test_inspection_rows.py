"""Rows beside one another: copies, pairs, cuts, and their lengths."""

import numpy as np
import pytest
from inspecting import CONVERSATIONS, chat, finding, inspected, names, tokenized

from minimind.inspection.lengths import describe_lengths


def test_copies_are_found_within_the_rows_and_between_the_parts(bytewise):
    rows = tokenized(
        [chat("a", "same"), chat("b", "other"), chat("a", "same"), chat("a", "same")], bytewise
    )
    held_out = tokenized([chat("c", "new"), chat("b", "other")], bytewise)
    report = inspected(rows, bytewise, where=[f"t:{i}" for i in range(1, 5)], held_out=held_out)
    copies, both = finding(report, "duplicate_rows"), finding(report, "held_out_rows_trained")
    assert (copies["count"], copies["places"]) == (2, ["t:3 (as t:1)", "t:4 (as t:1)"])
    assert (both["count"], both["places"]) == (1, ["row 2 (as t:2)"])


def test_a_finding_names_five_places_and_counts_all(bytewise):
    report = inspected(tokenized([chat("a", "same")] * 9, bytewise), bytewise)
    copies = finding(report, "duplicate_rows")
    assert (copies["count"], len(copies["places"])) == (8, 5)


def pairs(tokenizer, *replies):
    rows = [
        row for two in replies for row in tokenized([chat("q", reply) for reply in two], tokenizer)
    ]
    return rows, [f"pairs.jsonl:{i // 2 + 1}" for i in range(len(rows))]


def test_pairs_that_are_identical_contrary_or_copies_are_found(bytewise):
    rows, where = pairs(
        bytewise,
        ("yes", "nope"),
        ("same", "same"),
        ("nope", "yes"),
        ("yes", "nope"),
        ("a b", "cde"),
    )
    report = inspected(rows, bytewise, "dpo", where)
    assert finding(report, "identical_pairs")["places"] == ["pairs.jsonl:2"]
    assert finding(report, "contradicting_pairs")["places"] == [
        "pairs.jsonl:1",
        "pairs.jsonl:3",
        "pairs.jsonl:4",
    ]
    assert finding(report, "duplicate_rows")["places"] == ["pairs.jsonl:4 (as pairs.jsonl:1)"]
    assert report["lengths"]["chosen"]["mean"] == np.mean([4, 5, 5, 4, 4]).round(1)
    assert report["lengths"]["rejected"]["mean"] == np.mean([5, 5, 4, 5, 4]).round(1)
    assert names(report, "error") == []


@pytest.mark.parametrize(("longer", "found"), [(30, True), (20, False), (10, True)])
def test_pairs_that_length_alone_tells_apart_are_found(bytewise, longer, found):
    rows, where = pairs(
        bytewise, *((f"{i:04}" * (2 if i < longer else 1), f"{i:05}") for i in range(40))
    )
    assert ("length_bias" in names(inspected(rows, bytewise, "dpo", where))) is found


def test_rows_that_were_cut_are_counted_with_the_tokens_lost(bytewise):
    rows = tokenized(CONVERSATIONS, bytewise)
    lengths = np.array([len(row["input_ids"]) for row in rows]) + np.array([7, 0, 5, 0])
    report = inspected(rows, bytewise, lengths_before=lengths, lengths_read=lengths[:, None])
    assert (report["truncated_rows"], report["truncated_tokens"]) == (2, 12)
    assert finding(report, "truncated_rows")["places"] == ["row 1", "row 3"]
    assert report["lengths"]["percentiles"]["100"] == lengths.max()


def test_a_conversation_split_over_rows_has_lost_nothing(bytewise):
    rows = tokenized(CONVERSATIONS, bytewise)
    lengths = [len(row["input_ids"]) for row in rows]
    before = np.array([lengths[0] + lengths[1]] * 2 + lengths[2:])
    report = inspected(rows, bytewise, where=["a:1", "a:1", "a:2", "a:3"], lengths_before=before)
    assert (report["truncated_rows"], report["truncated_tokens"]) == (0, 0)


def brute_force_best_fit(lengths, window):
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= window]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return len(rows)


def test_percentiles_histogram_and_windows_are_those_of_a_slow_count():
    lengths = np.random.default_rng(1).lognormal(5, 0.8, 300).astype(int) + 2
    told = describe_lengths(lengths)
    ordered = sorted(lengths.tolist())
    for name, value in told["percentiles"].items():
        assert value == ordered[-(-len(ordered) * int(name) // 100) - 1]
    edges, counts = told["histogram"]["edges"], told["histogram"]["counts"]
    assert len(edges) == len(counts) + 1
    assert edges[-1] == ordered[-1]
    for low, high, count in zip(edges[:-1], [*edges[1:-1], edges[-1] + 1], counts, strict=True):
        assert count == sum(low <= length < high for length in ordered)
    assert sum(counts) == len(lengths)
    for window in told["windows"]:
        size = window["max_length"]
        fitting = [length for length in ordered if length <= size]
        assert window["rows_share"] == round(len(fitting) / 300, 4)
        assert window["tokens_share"] == round(sum(fitting) / sum(ordered), 4)
        assert window["packed_rows"] == brute_force_best_fit(fitting, size)
        assert window["packed_padding"] == round(
            1 - sum(fitting) / (window["packed_rows"] * size), 4
        )
    suggested = told["suggested_max_length"]
    assert suggested % 64 == 0
    assert np.mean(lengths <= suggested) >= 0.99 > np.mean(lengths <= suggested - 64)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [2, 2049], [1] * 100])
def test_few_or_equal_lengths_are_described_too(lengths):
    told = describe_lengths(np.array(lengths))
    assert sum(told["histogram"]["counts"]) == len(lengths)
    assert told["percentiles"]["100"] == max(lengths)
