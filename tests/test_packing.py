import itertools

import numpy as np
import pytest
import torch

from minimind.common.errors import UserError
from minimind.data import packing
from minimind.data.packing import (
    BestFit,
    BlockCollator,
    PackedRows,
    Wrapped,
    best_fit,
    is_target,
    packer,
)

EOS = 2


def split(rows):
    """Rows -> lists of ids."""
    return (
        [part.tolist() for part in np.split(rows.ids, np.cumsum(rows.lengths)[:-1])]
        if len(rows.lengths)
        else []
    )


def packed(packer, documents, at_a_time=2):
    """All rows of some documents, which reach the packer a few at a time."""
    rows = []
    for start in range(0, len(documents), at_a_time):
        stream = [i for document in documents[start : start + at_a_time] for i in (*document, EOS)]
        rows += split(packer.add(np.array(stream)))
    return rows + split(packer.finish())


@pytest.mark.parametrize(
    ("documents", "rows"),
    [
        ([[5, 6, 7], [8], [9, 9]], [[5, 6, 7, 2], [8, 2, 9, 9]]),
        ([[5, 6, 7]], [[5, 6, 7, 2]]),
        ([[5, 6]], []),
        ([[5], [6], [7], [8]], [[5, 2, 6, 2], [7, 2, 8, 2]]),
        ([[5, 6, 7, 8, 9, 10, 11, 12, 13], [14]], [[5, 6, 7, 8], [9, 10, 11, 12], [13, 2, 14, 2]]),
        ([[], [5], []], [[2, 5, 2, 2]]),
        ([], []),
    ],
)
@pytest.mark.parametrize("at_a_time", [1, 2, 1000])
def test_wrapped_documents_are_joined_in_order_with_eos_and_only_the_tail_is_lost(
    documents, rows, at_a_time
):
    assert packed(Wrapped(4), documents, at_a_time) == rows


@pytest.fixture
def documents():
    generator = np.random.default_rng(0)
    # Each token stands for one document, so that it is seen where the document went; some are
    # longer than two rows.
    return [
        [10 + number] * int(length)
        for number, length in enumerate(generator.integers(0, 40, size=300))
    ]


@pytest.mark.parametrize("window", [64, 2**22])
def test_best_fit_loses_no_token_and_cuts_only_documents_longer_than_a_row(
    documents, window, monkeypatch
):
    monkeypatch.setattr(packing, "WINDOW", window)
    rows = packed(BestFit(16, EOS), documents, at_a_time=5)
    assert max(map(len, rows)) <= 16
    pieces = [tuple(i for i in piece if i != EOS) for row in rows for piece in _documents_of(row)]
    for number, document in enumerate(documents):
        ours = [piece for piece in pieces if 10 + number in piece]
        assert [i for piece in ours for i in piece] == document
        assert len(ours) == -(-(len(document) + 1) // 16) or not document or len(document) % 16 == 0
    assert sum(row.count(EOS) for row in rows) == len(documents)
    assert sum(map(len, rows)) == sum(len(document) + 1 for document in documents)


def _documents_of(row):
    ends = [i + 1 for i, token in enumerate(row) if token == EOS]
    return [part.tolist() for part in np.split(np.array(row), ends) if len(part)]


def test_best_fit_uses_the_fewest_bins_where_that_can_be_counted():
    generator = np.random.default_rng(1)
    for _ in range(200):
        lengths = generator.integers(1, 11, size=6)
        bins = best_fit(lengths, 10)
        assert sorted(item for items in bins for item in items) == list(range(6))
        assert all(lengths[items].sum() <= 10 for items in bins)
        # By trying all orders with next-fit, the fewest bins possible; best-fit decreasing needs at
        # most 11/9 of them.
        fewest = min(_next_fit(order) for order in itertools.permutations(lengths.tolist()))
        assert len(bins) <= 11 / 9 * fewest + 6 / 9


def _next_fit(lengths):
    bins, space = 1, 10
    for length in lengths:
        if length > space:
            bins, space = bins + 1, 10
        space -= length
    return bins


def test_best_fit_packs_as_tightly_as_trls(documents):
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    theirs = _pack_bfd(
        pa.table({"input_ids": [[*document, EOS] for document in documents]}), 16, "split"
    )
    assert len(packed(BestFit(16, EOS), documents, at_a_time=1000)) == len(theirs)


def test_an_unknown_strategy_is_refused_with_those_there_are():
    with pytest.raises(
        UserError, match=r"--packing_strategy ffd: expected one of wrapped, bfd_split"
    ):
        packer("ffd", 16, EOS)


def test_the_targets_are_counted_by_hand():
    rows = PackedRows(np.array([5, 6, EOS, 7, 8, EOS, 9]), np.array([5, 2]))
    assert is_target(rows, False, EOS).tolist() == [False, True, True, True, True, False, True]
    assert is_target(rows, True, EOS).tolist() == [False, True, True, False, True, False, False]


def test_collated_rows_are_padded_and_only_what_is_used_has_labels():
    rows = [{"input_ids": np.array(ids)} for ids in ([5, 6, EOS, 7, EOS], [8, 9])]
    batch = BlockCollator(0, EOS)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7, 2], [8, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 2, 7, 2], [8, 9, -100, -100, -100]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    batch = BlockCollator(0, EOS, document_mask=True)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 2, -100, 2], [8, 9, -100, -100, -100]]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_with_a_document_mask_loss_and_gradients_are_those_of_separate_rows(
    model, strategy, attn_implementation
):
    model.set_attn_implementation(attn_implementation)
    generator = np.random.default_rng(2)
    documents = [
        generator.integers(3, 100, size=size).tolist() for size in (5, 9, 3, 14, 2, 7, 11, 4)
    ]
    rows = packed(packer(strategy, 16, EOS), documents)
    batch = BlockCollator(0, EOS, document_mask=True)(
        [{"input_ids": np.array(row)} for row in rows]
    )
    model.train()
    model(**batch, use_cache=False).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pieces = [piece for row in rows for piece in _documents_of(row) if len(piece) > 1]
    targets = sum(len(piece) - 1 for piece in pieces)
    for piece in pieces:
        ids = torch.tensor([piece])
        (model(input_ids=ids, labels=ids).loss * (len(piece) - 1) / targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
