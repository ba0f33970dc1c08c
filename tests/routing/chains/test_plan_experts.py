"""What spreading experts would cost: against a count of all choices, and where it pays."""

from __future__ import annotations

import itertools

import pytest

from routing.chains.experts import (
    ExpertShape,
    allocate_mixture,
    busiest_ns,
    cost_ns,
    farthest_ns,
    place_experts,
)
from routing.chains.plan import Allocation, ModelShape, NoAllocation, Room, Speed

MS = 1_000_000


def shape(**changes):
    said = {
        "layers": 32,
        "experts": 8,
        "chosen": 2,
        "dense_bytes": 100,
        "expert_bytes": 100,
        "dense_permille": 300,
    }
    return ExpertShape(**{**said, **changes})


def apart(rtt_ns):
    return lambda a, b: rtt_ns


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_farthest_hit_is_as_in_a_count_of_all_choices(chosen):
    ways = [(10 * MS, 2), (40 * MS, 1), (20 * MS, 2)]  # and one expert at home
    homes = [0] + [ns for ns, count in ways for _ in range(count)]
    choices = list(itertools.combinations(homes, chosen))
    expected = sum(max(choice) for choice in choices) / len(choices)
    assert farthest_ns(shape(experts=6, chosen=chosen), ways) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_busiest_is_as_in_a_count_of_all_choices(chosen):
    takes = [(3 * MS, 1), (2 * MS, 3), (5 * MS, 2)]
    homes = [n for n, (_, count) in enumerate(takes) for _ in range(count)]
    choices = list(itertools.combinations(homes, chosen))
    expected = sum(max(choice.count(n) * takes[n][0] for n in choice) for choice in choices) / len(choices)
    assert busiest_ns(shape(experts=6, chosen=chosen), takes) == pytest.approx(expected, rel=1e-6)


def test_every_layer_pays_its_round_trip():
    rooms = [(Room("host", 0, Speed(MS)), 4), (Room("helper", 0, Speed(MS)), 4)]
    near, waiting_near = cost_ns(shape(), rooms, apart(0))
    far, waiting_far = cost_ns(shape(), rooms, apart(20 * MS))
    # 2 of 8 are chosen; with 4 at home, 22 of 28 pairs need the helper.
    assert waiting_near == 0
    assert waiting_far == pytest.approx(32 * 20 * MS * 22 / 28, rel=1e-6)
    assert far - near == waiting_far


def test_experts_go_to_the_nearest_until_all_have_a_place():
    places = {"host": 0, "near": 1, "next": 2, "far": 50}
    rooms = [
        Room("host", 300, Speed(MS)),
        Room("near", 350, Speed(MS)),
        Room("next", 900, Speed(MS)),
        Room("far", 900, Speed(9 * MS)),
    ]
    plan = place_experts(shape(), rooms, lambda a, b: abs(places[a] - places[b]) * MS)
    assert plan is not None
    assert sum(part.experts for part in plan.parts) == 8
    assert "far" not in {part.peer for part in plan.parts}
    assert place_experts(shape(), rooms[:2], apart(0)) is None


def both(rtt_ns, layers_room):
    rooms = [Room(f"p{n}", layers_room, Speed(4 * MS, 0, MS)) for n in range(4)]
    by_layers = ModelShape([100 + 8 * 100 // 32] * 32, 0, 0)
    return allocate_mixture(by_layers, shape(dense_bytes=3200), rooms, [], apart(rtt_ns))


def test_over_the_internet_layers_win_by_far():
    layers, experts = both(40 * MS, 3700)
    assert isinstance(layers, Allocation)
    assert experts is None


def test_on_one_switch_experts_may_win():
    layers, experts = both(MS // 5, 3500)
    assert isinstance(layers, Allocation)
    assert experts is not None
    assert len(experts.parts) == 4
    assert experts.token_ns < layers.cost.token_ns  # the two chosen experts compute at the same time


def test_experts_are_the_way_where_layers_do_not_fit():
    rooms = [Room("host", 3500, Speed(4 * MS)), *(Room(f"p{n}", 100, Speed(4 * MS)) for n in range(8))]
    layers, experts = allocate_mixture(
        ModelShape([125] * 32, 0, 0), shape(dense_bytes=3200), rooms, [], apart(MS)
    )
    assert isinstance(layers, NoAllocation)
    assert experts is not None


def test_more_chosen_than_there_are_is_refused():
    with pytest.raises(ValueError, match="experts"):
        shape(chosen=9)
