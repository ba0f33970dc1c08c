"""A price is shared exactly, in proportion to work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.chains.costs import VOCABULARY_LAYERS
from routing.chains.shares import StageDone, shares, split_exactly


@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**9), min_size=1, max_size=32))
def test_parts_are_whole_and_within_one_of_their_due(total, weights):
    parts = split_exactly(total, weights)
    assert sum(parts) == total
    if any(weights):
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part * sum(weights) - total * weight) < sum(weights)
            assert weight or not part


def test_layers_rows_and_the_head_are_paid():
    done = [StageDone(10, 100), StageDone(10, 100), StageDone(20, 100, sampled=50)]
    works = [1000, 1000, 2000 + 50 * VOCABULARY_LAYERS]
    assert shares(sum(works), done) == tuple(works)


def test_who_was_lost_is_paid_for_what_it_kept_and_no_more():
    assert shares(100, [StageDone(5, 0), StageDone(5, 30), StageDone(5, 30)]) == (0, 50, 50)


def test_equal_remainders_go_to_the_first():
    assert split_exactly(5, [1, 1, 1]) == (2, 2, 1)
    assert shares(7, [StageDone(1, 0), StageDone(3, 0)]) == (2, 5)  # nothing measured: by layers


@pytest.mark.parametrize(("total", "weights"), [(-1, [1]), (1, []), (1, [1, -1])])
def test_nonsense_is_refused(total, weights):
    with pytest.raises(ValueError, match="share"):
        split_exactly(total, weights)


def test_negative_work_is_refused():
    with pytest.raises(ValueError, match="negative"):
        shares(1, [StageDone(1, -1)])
