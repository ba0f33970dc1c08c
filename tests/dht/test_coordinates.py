from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.coordinates import COORDINATE_BITS, UNIT_BITS, UNKNOWN, Vivaldi, estimate_ns, pack, unpack
from protocol.dice import Dice

MS = 1_000_000
UNIT = 1 << UNIT_BITS
_ns = st.floats(-500e6, 500e6)


@given(_ns, _ns, _ns, st.floats(0, 500e6))
def test_packing_keeps_a_coordinate_to_half_a_unit(x: float, y: float, z: float, height: float) -> None:
    packed = pack(x, y, z, height)
    assert UNKNOWN < packed < 1 << COORDINATE_BITS
    for before, after in zip((x, y, z, height), unpack(packed), strict=True):
        assert abs(before - after) <= UNIT / 2


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12))
def test_what_lies_outside_is_moved_to_the_border(x: float, height: float) -> None:
    assert UNKNOWN < pack(x, x, x, height) < 1 << COORDINATE_BITS


@given(_ns, _ns, _ns, _ns)
def test_estimates_are_symmetric_and_at_least_both_heights(a: float, b: float, c: float, d: float) -> None:
    here, there = pack(a, b, 0, 3 * MS), pack(c, d, 0, 4 * MS)
    assert estimate_ns(here, there) == estimate_ns(there, here)
    assert estimate_ns(here, there) >= 7 * MS - 2 * UNIT
    flat = math.dist((a, b), (c, d))
    assert estimate_ns(here, there) == pytest.approx(flat + 7 * MS, abs=6 * UNIT)


class Plane:
    """Nodes on a plane, each behind an access link."""

    def __init__(self, nodes: int, seed: int = 1) -> None:
        dice = Dice(seed, 9)
        self.spots = [(dice.unit() * 120, dice.unit() * 120, 1 + dice.unit() * 12) for _ in range(nodes)]
        self.nodes = [Vivaldi() for _ in range(nodes)]
        self.dice = Dice(seed, 10)

    def rtt_ns(self, a: int, b: int) -> int:
        one, two = self.spots[a], self.spots[b]
        return int((math.dist(one[:2], two[:2]) + one[2] + two[2]) * MS)

    def round(self, times: int, liars: range = range(0)) -> None:
        count = len(self.nodes)
        for _ in range(times):
            for node in range(count):
                peer = self.dice.below(count)
                if peer == node:
                    continue
                if peer in liars:
                    there, error, rtt = pack(-500 * MS, 500 * MS, 0, 0), 0, self.rtt_ns(node, peer)
                else:
                    remote = self.nodes[peer]
                    there, error, rtt = remote.packed, remote.error_parts, self.rtt_ns(node, peer)
                self.nodes[node].sample(there, error, rtt, self.dice)

    def median_error(self, nodes: range) -> float:
        errors = []
        for _ in range(400):
            a = nodes[self.dice.below(len(nodes))]
            b = nodes[self.dice.below(len(nodes))]
            if a != b:
                true = self.rtt_ns(a, b)
                errors.append(abs(estimate_ns(self.nodes[a].packed, self.nodes[b].packed) - true) / true)
        return sorted(errors)[len(errors) // 2]


def test_coordinates_converge() -> None:
    plane = Plane(60)
    assert plane.median_error(range(60)) > 0.5
    plane.round(40)
    assert plane.median_error(range(60)) < 0.08
    assert sum(node.error for node in plane.nodes) / 60 < 0.25


def test_a_latecomer_finds_its_place_in_twenty_samples() -> None:
    plane = Plane(60)
    late = plane.nodes[0]
    plane.round(60)
    fresh = plane.nodes[0] = Vivaldi()
    for i in range(1, 21):
        peer = plane.nodes[i * 2]
        fresh.sample(peer.packed, peer.error_parts, plane.rtt_ns(0, i * 2), plane.dice)
    errors = [
        abs(estimate_ns(fresh.packed, plane.nodes[i].packed) - plane.rtt_ns(0, i)) / plane.rtt_ns(0, i)
        for i in range(1, 60)
    ]
    assert sorted(errors)[30] < 0.25
    assert fresh is not late


def test_liars_that_claim_certainty_do_not_move_a_settled_network() -> None:
    plane = Plane(60)
    plane.round(60)
    before = plane.median_error(range(12, 60))
    plane.round(60, liars=range(12))
    assert plane.median_error(range(12, 60)) < before + 0.05


def test_a_node_that_really_moved_follows() -> None:
    """Samples far off its estimate are not followed at first, but cost it its certainty."""
    plane = Plane(40)
    plane.round(60)
    plane.spots[0] = (600.0, 600.0, 5.0)
    for _ in range(400):
        peer = 1 + plane.dice.below(39)
        remote = plane.nodes[peer]
        plane.nodes[0].sample(remote.packed, remote.error_parts, plane.rtt_ns(0, peer), plane.dice)
    errors = [
        abs(estimate_ns(plane.nodes[0].packed, plane.nodes[i].packed) - plane.rtt_ns(0, i)) / plane.rtt_ns(0, i)
        for i in range(1, 40)
    ]
    assert sorted(errors)[20] < 0.3


@pytest.mark.parametrize("rtt_ns", [0, -5, 999, 10**12])
def test_impossible_round_trips_are_not_followed(rtt_ns: int) -> None:
    node = Vivaldi()
    assert not node.sample(pack(5 * MS, 0, 0, MS), 100, rtt_ns, Dice(1))
    assert node.error == 1.0


def test_unknown_places_are_not_followed() -> None:
    assert not Vivaldi().sample(UNKNOWN, 100, 5 * MS, Dice(1))


def test_one_sample_moves_a_node_a_bounded_way() -> None:
    node = Vivaldi()
    here = node.packed
    node.sample(pack(400 * MS, 400 * MS, 400 * MS, 400 * MS), 0, MS, Dice(1))
    assert estimate_ns(here, node.packed) < 105 * MS
    node.place(here, 0.1)
    node.sample(pack(10 * MS, 0, 0, MS), 0, 49 * MS, Dice(1))
    assert 2 * MS < estimate_ns(here, node.packed) < 20 * MS


def test_the_same_samples_give_the_same_bits() -> None:
    one, two = Plane(10, seed=4), Plane(10, seed=4)
    one.round(10)
    two.round(10)
    assert [n.packed for n in one.nodes] == [n.packed for n in two.nodes]
    assert len({n.packed for n in one.nodes}) == 10
