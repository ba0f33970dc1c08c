"""Sampling against a plain reference written out over the whole vocabulary."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos.runtimes.llama.sampling import (
    DRAW_STREAM,
    REDRAW_STREAM,
    BadLogits,
    History,
    adjusted,
    choose,
    choose_constrained,
    log_probabilities,
)
from protocol.dice import draw_unit
from protocol.work import Sampling

N = 5000


def logits_of(seed: int, n: int = N) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * 3).astype(np.float32)


def reference_ids(row: np.ndarray, s: Sampling) -> list[int]:
    """Who survives the filters, slowly."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if s.top_k > 0:
        order = order[: s.top_k]
    peak = float(row[order[0]])
    if s.top_p < 1.0:
        weights = [math.exp(float(row[i]) - peak) for i in order]
        goal, total, kept = s.top_p * sum(weights), 0.0, []
        for i, weight in zip(order, weights, strict=True):
            kept.append(i)
            total += weight
            if total >= goal:
                break
        order = kept
    if s.min_p > 0:
        order = [i for i in order if row[i] >= peak + math.log(s.min_p)]
    return sorted(order)


def reference(row: np.ndarray, s: Sampling, index: int) -> int:
    ids = reference_ids(row, s)
    peak = float(row.max())
    weights = [math.exp((float(row[i]) - peak) / s.temperature) for i in ids]
    goal, total = draw_unit(s.seed, DRAW_STREAM, index) * sum(weights), 0.0
    for i, weight in zip(ids, weights, strict=True):
        total += weight
        if total > goal:
            return i
    return ids[-1]


FILTERS = [
    {},
    {"top_k": 40},
    {"top_k": 1},
    {"top_k": 900},
    {"top_p": 0.9},
    {"top_p": 0.2},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_equals_the_reference(filters: dict, temperature: float):
    row = logits_of(3)
    agree = 0
    for index in range(40):
        sampling = Sampling(seed=9, temperature=temperature, **filters)
        agree += choose(row, sampling, index) == reference(row, sampling, index)
    assert agree >= 39  # sums in another order may move one border by a rounding


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals():
    row = np.zeros(N, np.float32)
    row[[700, 90, 4000]] = 5.0
    assert choose(row, Sampling(seed=1, temperature=0.0), 0) == 90


@given(st.integers(0, 2**53 - 1), st.integers(0, 10_000))
def test_is_a_function_of_its_arguments(seed: int, index: int):
    row = logits_of(5, 300)
    sampling = Sampling(seed=seed, temperature=1.3, top_p=0.95)
    assert choose(row, sampling, index) == choose(row.copy(), sampling, index)


def test_frequencies_follow_the_probabilities():
    row = np.full(200, -np.inf, np.float32)
    row[[3, 64, 65, 199]] = np.log([0.1, 0.2, 0.3, 0.4])
    draws = Counter(choose(row, Sampling(seed=4), index) for index in range(4000))
    assert set(draws) == {3, 64, 65, 199}
    for token, share in ((3, 0.1), (64, 0.2), (65, 0.3), (199, 0.4)):
        assert abs(draws[token] / 4000 - share) < 0.03  # four standard deviations


def test_tiny_temperatures_are_nearly_greedy():
    row = logits_of(8)
    assert choose(row, Sampling(seed=1, temperature=1e-9), 7) == int(row.argmax())


def test_bias_ban_and_penalties():
    row = np.array([1.0, 2.0, -1.0, 4.0, 0.5], np.float32)
    history = History([0, 2])
    for token in (1, 1, 3):
        history.add(token)
    s = Sampling(
        seed=1,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repeat_penalty=2.0,
        logit_bias=((4, 3.0),),
    )
    out = adjusted(row, s, history, banned=[3])
    assert out.tolist() == [0.5, 2.0 / 2 - 2 * 0.25 - 0.5, -2.0, -math.inf, 3.5]
    assert row[3] == 4.0  # the model's own logits stay


def test_no_adjustment_makes_no_copy():
    row = logits_of(1, 100)
    assert adjusted(row, Sampling(seed=1), History()) is row


def test_history_grows_past_its_first_room():
    history = History(range(100))
    for token in range(50, 300):
        history.add(token)
    assert history.ids.tolist() == list(range(300))
    assert history.counts.tolist() == [0.0] * 50 + [1.0] * 250


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float):
    row = logits_of(1, 100)
    row[17] = bad
    with pytest.raises(BadLogits):
        choose(row, Sampling(seed=1), 0)


def test_log_probabilities():
    row = logits_of(2)
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    own, top = log_probabilities(row, 1234, 20)
    assert own == pytest.approx(exact[1234], abs=1e-4)
    order = sorted(range(N), key=lambda i: (-row[i], i))[:20]
    assert [i for i, _ in top] == order
    assert [p for _, p in top] == pytest.approx(exact[order].tolist(), abs=1e-4)
    assert log_probabilities(row, 5, 0)[1] == []


class OnlyThese:
    """A grammar that admits a fixed set."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.asked = 0

    def admits(self, token: int) -> bool:
        return token in self.ids

    def admitted(self, tokens: np.ndarray) -> np.ndarray:
        self.asked = max(self.asked, len(tokens))
        return np.isin(tokens, self.ids)


def test_constraint_keeps_an_admitted_choice():
    row = logits_of(6)
    sampling = Sampling(seed=2)
    free = choose(row, sampling, 11)
    grammar = OnlyThese([free, 1, 2])
    assert choose_constrained(row, sampling, 11, grammar) == free
    assert grammar.asked == 0


def test_constraint_distribution_is_the_renormalised_one():
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    draws = Counter(choose_constrained(row, Sampling(seed=3), i, OnlyThese([1, 3])) for i in range(4000))
    assert set(draws) == {1, 3}
    assert abs(draws[1] / 4000 - 0.75) < 0.03


def test_constraint_finds_the_one_improbable_token():
    row = logits_of(6)
    worst = int(row.argmin())
    for temperature in (0.0, 1.0):
        grammar = OnlyThese([worst])
        assert choose_constrained(row, Sampling(seed=2, temperature=temperature), 0, grammar) == worst
        assert grammar.asked == N


def test_constraint_that_admits_nothing():
    assert choose_constrained(logits_of(6), Sampling(seed=2), 0, OnlyThese([])) is None


def test_second_draw_is_independent_of_the_first():
    s = Sampling(seed=3)
    assert draw_unit(s.seed, DRAW_STREAM, 5) != draw_unit(s.seed, REDRAW_STREAM, 5)
