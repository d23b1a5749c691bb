"""The choice of the held-out rows."""

import pytest

from minimind.data.held_out import HoldOut


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_about_the_requested_share_is_held_out_whatever_the_order_of_the_rows(ratio):
    texts = [f"row {number}" for number in range(2000)]
    chosen = []
    for order in (texts, texts[::-1]):
        hold_out = HoldOut(ratio, 300)
        trained = [row for text in order for row in hold_out.offer(text, text)]
        chosen.append(set(hold_out.chosen()))
        assert sorted([*trained, *hold_out.chosen()]) == sorted(texts)
    assert chosen[0] == chosen[1]
    assert abs(len(chosen[0]) - min(ratio * 2000, 300)) < 80
    assert len(chosen[0]) <= 300
