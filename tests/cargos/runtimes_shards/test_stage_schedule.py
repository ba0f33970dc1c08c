"""Which rows are computed when, and in what order: pure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cargos.runtimes.shards.engine import GRID, grid_step
from cargos.runtimes.shards.pace import Meter
from cargos.runtimes.shards.resident import Resident
from cargos.runtimes.shards.schedule import Waiting, choose, groups


def waiting(key: int, rows: int, *, front: int = 0, prompting: bool = False, since: int = 0) -> Waiting:
    return Waiting(key, rows, front or rows, prompting, since)


def test_answers_come_before_prompts_and_who_waits_longest_is_first():
    shares = choose(
        [
            waiting(1, 300, prompting=True, since=1),
            waiting(2, 1, since=9),
            waiting(3, 5, since=4),
        ],
        room=63,
        urgent=32,
        prefill_tps=1e6,
    )
    assert shares == [(3, 5), (2, 1), (1, 57)]


def test_a_token_and_its_drafts_are_computed_together_or_later():
    shares = choose([waiting(n, 12, since=n) for n in range(4)], room=63, urgent=32, prefill_tps=0)
    assert shares == [(0, 12), (1, 12)]
    # Two feeds of one session: the first now.
    assert choose([waiting(1, 9, front=4)], room=63, urgent=32, prefill_tps=0) == [(1, 4)]
    # A long replay behind the prompt goes in pieces, as a prompt does.
    assert choose([waiting(1, 500)], room=63, urgent=32, prefill_tps=1e6) == [(1, 63)]


def test_on_slow_machines_prompts_go_in_small_pieces_while_others_wait_for_tokens():
    prompts = [waiting(1, 100, prompting=True), waiting(2, 1)]
    assert choose(prompts, room=63, urgent=32, prefill_tps=200) == [(2, 1), (1, 20)]


def test_groups_are_neighbours_with_as_many_rows_each():
    made = groups([(5, 2), (0, 1), (1, 4), (2, 1)])
    assert [(g.first, g.count, g.each) for g in made] == [(0, 3, 1), (1, 1, 3), (5, 1, 2)]


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 20), max_size=8))
def test_groups_hold_each_row_once_in_order(shares):
    done: dict[int, int] = {}
    for group in groups(shares.items()):
        for place in range(group.first, group.first + group.count):
            done[place] = done.get(place, 0) + group.each
    assert done == shares


@given(st.integers(1, 200))
def test_the_grid_is_that_of_a_whole_model(prompt):
    have, steps = 0, []
    while have < prompt + 3:
        steps.append(grid_step(have, prompt))
        have += steps[-1]
    assert steps == [GRID] * (prompt // GRID) + [prompt % GRID] * (prompt % GRID > 0) + [1, 1, 1]


def rows(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_feed_takes_the_place_of_what_waits_behind_it():
    resident = Resident(1, "f32", 3, deterministic=False)
    resident.feed(0, rows(0, 1, 2), 10)
    resident.feed(3, rows(3, 4, 5), 20)
    assert (resident.until, resident.front, resident.since_ns) == (6, 3, 10)
    resident.feed(4, rows(44, 55, 66), 30)
    assert resident.until == 7
    assert resident.take(7).tolist() == [0, 1, 2, 3, 44, 55, 66]
    assert resident.pending == 0
    resident.have = 7
    resident.feed(2, rows(22), 40)  # back into what is in memory
    assert (resident.have, resident.until) == (2, 3)
    with pytest.raises(ValueError, match="3 is next"):
        resident.feed(4, rows(1), 50)


def test_rows_are_taken_across_feeds_in_pieces():
    resident = Resident(1, "f32", 9, deterministic=False)
    resident.feed(0, rows(0, 1, 2), 10)
    resident.feed(3, rows(3, 4), 20)
    assert resident.take(2).tolist() == [0, 1]
    assert resident.front == 1
    assert resident.take(2).tolist() == [2, 3]
    assert (resident.pending, resident.since_ns) == (1, 20)


def test_a_measurement_taken_on_a_busy_machine_wears_off():
    meter = Meter(layers=10)
    meter.note(1, 0, 5_000)
    meter.vocabulary_ns = 15_000
    assert (meter.pace.layer_ns, meter.prefill_tps) == (500, 0.0)
    for _ in range(200):
        meter.note(1, 1, 4_000)  # it was five times as slow
    assert meter.pace.layer_ns == pytest.approx(100, rel=0.2)
    assert meter.pace.vocabulary_ns == pytest.approx(3_000, rel=0.2)
    meter.note(32, 1, 16 * 3_200 + meter.vocabulary_ns)
    assert meter.pace.prefill_layer_ns == 160
    assert meter.prefill_tps == pytest.approx(1e9 / 1_600)
    before = meter.pace
    meter.note(5, 0, 10**9)  # neither alone nor many
    assert meter.pace == before
