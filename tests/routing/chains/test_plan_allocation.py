"""Who should hold which layers: against every possible choice, order and cut; spares; and large networks."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from protocol.dice import Dice
from routing.chains.costs import cost_of
from routing.chains.plan import Allocation, Holder, ModelShape, NoAllocation, Room, Speed, allocate

MS = 1_000_000
MIB = 1 << 20

#: Without shrinking: the brute force is slow in worlds that are nearly minimal.
FAST = (Phase.explicit, Phase.reuse, Phase.generate)


def line(places):
    return lambda a, b: (abs(places[a] - places[b]) + 2) * MS


def nowhere(a, b):
    return 10 * MS


@st.composite
def worlds(draw, *, uneven):
    layers = draw(st.integers(2, 8))
    sizes = [draw(st.integers(5, 15))] * layers
    if uneven:
        sizes = [draw(st.integers(5, 15)) for _ in range(layers)]
    shape = ModelShape(sizes, draw(st.integers(0, 20)), draw(st.integers(0, 20)))
    count = draw(st.integers(2, 6))
    rooms, holders, places = [], [], {}
    for number in range(count):
        peer = f"p{number}"
        places[peer] = draw(st.integers(0, 60))
        speed = Speed(draw(st.integers(1, 20)) * MS, 0, draw(st.integers(1, 40)) * MS)
        if draw(st.integers(0, 3)):
            rooms.append(Room(peer, draw(st.integers(10, 60)), speed))
        else:
            first = draw(st.integers(0, layers - 1))
            holders.append(Holder(peer, first, draw(st.integers(first + 1, layers)), speed))
    return shape, rooms, holders, line(places)


def every_cost(shape, rooms, holders, rtt_of):
    """Token times of all chains there could be: every choice, order and cut."""

    def longer(at, chain, left):
        if at == shape.layers:
            if len(chain) > 1:
                yield cost_of(chain, rtt_of).token_ns
            return
        for n, each in enumerate(left):
            rest = left[:n] + left[n + 1 :]
            if isinstance(each, Holder):
                ends = [each.last] if each.first == at else []
            else:
                ends = [
                    end for end in range(at + 1, shape.layers + 1) if shape.bytes_of(at, end) <= each.room_bytes
                ]
            for end in ends:
                yield from longer(end, [*chain, (each.peer, each.speed, end - at, 0)], rest)

    return longer(0, [], [*rooms, *holders])


def check(shape, rooms, holders, found):
    """Every stage holds what it can, each layer once."""
    room_of = {room.peer: room.room_bytes for room in rooms}
    ranges = {holder.peer: (holder.first, holder.last) for holder in holders}
    at = 0
    for stage in found.stages:
        assert stage.first == at < stage.last
        at = stage.last
    assert at == shape.layers
    assert 2 <= len(found.stages) <= 8
    for each in (*found.stages, *found.spares):
        if each.is_new:
            assert shape.bytes_of(each.first, each.last) <= room_of[each.peer]
        else:
            assert (each.first, each.last) == ranges[each.peer]
    peers = [each.peer for each in (*found.stages, *found.spares)]
    assert len(set(peers)) == len(peers)
    spans = {(stage.first, stage.last) for stage in found.stages}
    assert all((spare.first, spare.last) in spans for spare in found.spares)


# `exact_islands` 0: the search for large networks, where its answer can still be checked. Its layers are alike,
# as those of real models nearly are: it is not made for packing few layers of any size into the smallest rooms.
# It is a search, so some world may be made up in which it misses by more: always the same ones are tried.
@pytest.mark.parametrize("exact_islands", [6, 0])
def test_within_five_percent_of_every_choice_order_and_cut(exact_islands):
    @settings(max_examples=80, deadline=None, derandomize=exact_islands == 0, phases=FAST)
    @given(worlds(uneven=exact_islands > 0))
    def of_a_world(world):
        shape, rooms, holders, rtt_of = world
        found = allocate(shape, rooms, holders, rtt_of, load_ns_per_mib=0, exact_islands=exact_islands)
        best = min(every_cost(shape, rooms, holders, rtt_of), default=None)
        if best is None:
            assert isinstance(found, NoAllocation)
            return
        assert isinstance(found, Allocation)
        check(shape, rooms, holders, found)
        assert best <= found.cost.token_ns <= best * 105 // 100

    of_a_world()


def uniform(layers, layer_bytes=10):
    return ModelShape([layer_bytes] * layers, 0, 0)


def test_equal_islands_get_equal_parts():
    found = allocate(uniform(30), [Room(f"p{n}", 155, Speed(MS, 0, MS)) for n in range(3)], [], nowhere)
    assert isinstance(found, Allocation)
    assert [stage.last - stage.first for stage in found.stages] == [15, 15]
    assert found.spares[0].peer not in {stage.peer for stage in found.stages}
    tight = allocate(uniform(30), [Room(f"p{n}", 145, Speed(MS, 0, MS)) for n in range(3)], [], nowhere)
    assert isinstance(tight, Allocation)
    assert [stage.last - stage.first for stage in tight.stages] == [11, 10, 9]
    assert tight.cost.bottleneck_ns == 11 * MS  # ten layers and the head


def test_the_ends_need_their_room():
    shape = ModelShape([10] * 4, 50, 100)
    rooms = [Room("small", 30, Speed(MS)), Room("embeds", 70, Speed(MS)), Room("heads", 120, Speed(MS))]
    found = allocate(shape, rooms, [], nowhere)
    assert isinstance(found, Allocation)
    assert [stage.peer for stage in found.stages] == ["embeds", "heads"]


def test_what_is_held_already_is_kept_and_the_gap_is_filled():
    shape = ModelShape([400 * MIB] * 8, 0, 0)
    held = [Holder("a", 0, 3, Speed(MS)), Holder("c", 5, 8, Speed(MS))]
    rooms = [Room(f"r{n}", 3000 * MIB, Speed(MS)) for n in range(3)]
    found = allocate(shape, rooms, held, nowhere)
    assert isinstance(found, Allocation)
    assert len(found.stages) == 2  # less is fetched with three, but a hop of 5 ms is dearer than that
    near = allocate(shape, rooms, held, lambda a, b: 0)
    assert isinstance(near, Allocation)
    assert [(s.peer, s.is_new) for s in near.stages] == [("a", False), ("r0", True), ("c", False)]
    ordered = near.orders[0]
    assert (ordered.peer, ordered.first, ordered.last) == ("r0", 3, 5)


def test_too_little_room_is_said():
    found = allocate(uniform(80, MIB), [Room("a", 30 * MIB), Room("b", 30 * MIB)], [], nowhere)
    assert isinstance(found, NoAllocation)
    assert (found.needed_bytes, found.room_bytes) == (80 * MIB, 60 * MIB)
    assert "80 MiB" in found.detail
    assert isinstance(allocate(uniform(4), [], [], nowhere), NoAllocation)


def test_spares_go_where_they_are_missed_most():
    shape = uniform(4)
    rooms = [
        Room("a", 20, Speed(MS), karma_milli=9000),
        Room("b", 20, Speed(MS), karma_milli=1000),
        Room("s1", 20, Speed(30 * MS)),
        Room("s2", 20, Speed(40 * MS)),
        Room("tiny", 5, Speed(30 * MS)),
    ]
    found = allocate(shape, rooms, [], nowhere, spares=1)
    assert isinstance(found, Allocation)
    place_of = {(stage.first, stage.last): stage.peer for stage in found.stages}
    # The quicker spare stands by for who has less karma.
    assert [(place_of[spare.first, spare.last], spare.peer) for spare in found.spares] == [
        ("b", "s1"),
        ("a", "s2"),
    ]
    held = [Holder("h", *next(span for span, peer in place_of.items() if peer == "b"), Speed(99 * MS))]
    other = allocate(shape, rooms, held, nowhere, spares=1)
    assert isinstance(other, Allocation)
    assert [place_of[spare.first, spare.last] for spare in other.spares] == ["a"]


def test_suspects_are_used_only_if_nobody_else_can():
    rooms = [
        Room("bad", 20, Speed(MS), suspect=True),
        Room("a", 20, Speed(9 * MS)),
        Room("b", 20, Speed(9 * MS)),
    ]
    found = allocate(uniform(4), rooms, [], nowhere)
    assert isinstance(found, Allocation)
    assert {stage.peer for stage in found.stages} == {"a", "b"}
    assert found.spares == ()
    assert isinstance(allocate(uniform(4), rooms[:2], [], nowhere), Allocation)


def test_a_thousand_islands_and_eighty_layers():
    dice = Dice(3)
    places = {f"p{n}": dice.below(200) for n in range(1000)}
    shape = ModelShape([500] * 80, 500, 600)
    rooms = [
        Room(peer, (4 + dice.below(12)) * 1000, Speed((2 + dice.below(9)) * MS, 0, 8 * MS)) for peer in places
    ]
    found = allocate(shape, rooms, [], line(places))
    assert isinstance(found, Allocation)
    check(shape, rooms, [], found)
    assert allocate(shape, rooms, [], line(places)) == found
    # The quickest would take 168 ms for 80 layers and the head; hops cost less than half of that.
    assert found.cost.token_ns < 240 * MS
    assert len(found.spares) == len(found.stages)
