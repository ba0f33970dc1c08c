"""Busy ranges are joined by others, and moves come to an end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.dice import Dice
from protocol.instants import SECOND_NS
from routing.chains.plan import Holder, ModelShape, Room, Speed
from routing.chains.rebalance import BalancePolicy, Balancer

MS = 1_000_000
SHAPE = ModelShape([10] * 8, 0, 0)
FIRST, SECOND = (0, 4), (4, 8)
MINUTE = 60 * SECOND_NS
HOUR = 60 * MINUTE


class Network:
    """Islands with 4 slots each; `demand`: sessions per range, spread evenly. Moves take `loading` rounds."""

    def __init__(self, held, rooms=0, loading=3):
        self.at = {f"p{n}": span for n, span in enumerate(held)}
        self.rooms = [f"r{n}" for n in range(rooms)]
        self.coming = []
        self.loading = loading
        self.balancer = Balancer()
        self.history = []

    def holders(self, demand):
        out = []
        for span, sessions in demand.items():
            peers = [peer for peer, held in self.at.items() if held == span]
            for n, peer in enumerate(peers):
                active = sessions // len(peers) + (n < sessions % len(peers))
                out.append(Holder(peer, *span, Speed(MS), 4, active))
        return out

    def step(self, now, demand):
        self.coming = [(rounds - 1, peer, span) for rounds, peer, span in self.coming]
        for rounds, peer, span in self.coming:
            if rounds <= 0:
                self.at[peer] = span
                if peer in self.rooms:
                    self.rooms.remove(peer)
        self.coming = [each for each in self.coming if each[0] > 0]
        holders = self.holders(demand)
        self.balancer.watch(now, holders)
        moves = self.balancer.moves(now, SHAPE, [Room(r, 40, Speed(MS)) for r in self.rooms], holders)
        for move in moves:
            self.history.append((now, move))
            self.coming.append((self.loading, move.peer, (move.first, move.last)))
        return moves

    def count(self, span):
        return sum(held == span for held in self.at.values())


def test_a_busy_range_is_joined_by_islands_with_room():
    net = Network([FIRST] * 4 + [SECOND] * 4, rooms=4)
    for minute in range(120):
        net.step(minute * MINUTE, {FIRST: 16, SECOND: 4})
    assert net.count(FIRST) > 4
    assert {move.leaves for _, move in net.history} == {None}
    assert 16 * 1000 // (4 * net.count(FIRST)) < 700  # busy no more


def test_without_room_somebody_comes_from_where_there_is_plenty():
    net = Network([FIRST] * 2 + [SECOND] * 8)
    for minute in range(240):
        net.step(minute * MINUTE, {FIRST: 8, SECOND: 8})
    assert net.count(FIRST) >= 3
    assert {move.leaves for _, move in net.history} == {SECOND}
    assert net.count(SECOND) >= 2


@pytest.mark.parametrize("demand", [{FIRST: 8, SECOND: 8}, {FIRST: 30, SECOND: 30}, {FIRST: 31, SECOND: 6}])
@pytest.mark.parametrize("held", [(2, 8), (5, 5), (9, 3)])
def test_under_constant_load_moves_end(demand, held):
    net = Network([FIRST] * held[0] + [SECOND] * held[1], rooms=2)
    for minute in range(48 * 60):
        net.step(minute * MINUTE, demand)
    assert len(net.history) <= 10
    assert all(now < 12 * HOUR for now, _ in net.history)  # of two days
    peers = [move.peer for _, move in net.history]
    assert len(set(peers)) == len(peers)  # nobody went twice


def test_noise_and_swings_move_nobody_more_than_once_per_dwell():
    net, dice = Network([FIRST] * 6 + [SECOND] * 6, rooms=2), Dice(5)
    for step in range(6 * 60 * 4):
        swing = 14 if step // 240 % 2 else 6  # an hour this way, an hour that way
        net.step(step * 15 * SECOND_NS, {FIRST: swing + dice.below(9), SECOND: 20 - swing + dice.below(9)})
    policy = BalancePolicy()
    last = {}
    for now, move in net.history:
        assert now - last.get(move.peer, -policy.dwell_ns) >= policy.dwell_ns
        last[move.peer] = now
    assert len(net.history) <= 14  # 12 Islands, six hours: it could be 48 each quarter


def test_a_short_burst_moves_nobody():
    net = Network([FIRST] * 4 + [SECOND] * 4, rooms=4)
    for step in range(240):
        burst = 16 if 100 <= step < 108 else 2
        net.step(step * 5 * SECOND_NS, {FIRST: burst, SECOND: 2})
    assert net.history == []


def test_who_is_on_the_way_counts_already():
    """One more would do; while it loads, no further one is sent."""
    net = Network([FIRST] * 4 + [SECOND] * 4, rooms=6, loading=1000)
    for minute in range(25):
        net.step(minute * MINUTE, {FIRST: 13, SECOND: 1})
    assert len(net.history) == 1


def test_only_islands_with_enough_room_are_sent():
    balancer = Balancer()
    holders = [Holder("a", 0, 4, Speed(MS), 1, 3), Holder("b", 4, 8, Speed(MS), 1, 0)]
    small, slow, quick = (
        Room("small", 39, Speed(MS)),
        Room("slow", 50, Speed(9 * MS)),
        Room("quick", 40, Speed(MS)),
    )
    for minute in range(60):
        balancer.watch(minute * MINUTE, holders)
    assert balancer.moves(HOUR, SHAPE, [small], holders) == ()
    suspect = replace(quick, suspect=True)
    moves = balancer.moves(HOUR, SHAPE, [small, slow, suspect], holders)
    assert [move.peer for move in moves] == ["slow"]


def test_the_mean_follows_slowly():
    balancer = Balancer(BalancePolicy(smoothing_ns=100 * SECOND_NS))
    holders = [Holder("a", 0, 4, Speed(MS), 4, 4)]
    balancer.watch(0, holders)
    assert balancer.demand_milli(0, 4) == 0
    balancer.watch(100 * SECOND_NS, holders)
    assert balancer.demand_milli(0, 4) == 2000
    balancer.watch(200 * SECOND_NS, [])
    assert balancer.demand_milli(0, 4) == 0


def test_the_mean_is_the_same_however_often_is_looked():
    """An Island's news come many times a second under load; a little of a small change is still something."""
    holders = [Holder("a", 0, 4, Speed(MS), 2, 2)]
    seldom, often = (Balancer(BalancePolicy(smoothing_ns=120 * SECOND_NS)) for _ in range(2))
    for second in range(0, 361, 5):
        seldom.watch(second * SECOND_NS, holders)
    for look in range(361 * 20):
        often.watch(look * 50 * MS, holders)
    assert abs(seldom.demand_milli(0, 4) - often.demand_milli(0, 4)) < 50
    assert often.demand_milli(0, 4) > 1800  # of 2000


def test_what_was_seen_holds_until_something_else_is_seen():
    """Looks come when a session ends and when the next one takes its slot: five seconds count as full, and the
    tenth of a second in between as empty.
    """
    balancer = Balancer(BalancePolicy(smoothing_ns=60 * SECOND_NS))
    for turn in range(100):
        balancer.watch(turn * 5100 * MS, [Holder("a", 0, 4, Speed(MS), 1, 1)])
        balancer.watch(turn * 5100 * MS + 5000 * MS, [Holder("a", 0, 4, Speed(MS), 1, 0)])
    assert 950 < balancer.demand_milli(0, 4) < 1000


def busy(balancer, holders, minutes=60):
    for minute in range(minutes + 1):
        balancer.watch(minute * MINUTE, holders)


def test_who_left_or_refused_is_not_waited_for():
    holders = [Holder("a", 0, 4, Speed(MS), 1, 2), Holder("b", 4, 8, Speed(MS), 1, 0)]
    rooms = [Room("c", 40, Speed(MS)), Room("d", 40, Speed(2 * MS))]
    balancer = Balancer(BalancePolicy(max_moves=1))
    busy(balancer, holders)
    assert [move.peer for move in balancer.moves(HOUR, SHAPE, rooms, holders)] == ["c"]
    # It is on its way: two slots for two sessions are still too few, but only one more is.
    assert [move.peer for move in balancer.moves(HOUR + 1, SHAPE, rooms, holders)] == ["d"]
    assert balancer.moves(HOUR + 2, SHAPE, rooms, holders) == ()
    later = [Room("e", 40, Speed(MS))]
    assert [move.peer for move in balancer.moves(HOUR + 3, SHAPE, [*later, rooms[1]], holders)] == [
        "e"
    ]  # c died
    balancer.refused("e", stays=False)
    assert [move.peer for move in balancer.moves(HOUR + 4, SHAPE, [*later, rooms[1]], holders)] == ["e"]


def test_one_that_stays_where_it_is_counts_there_and_is_left_alone():
    net = Network([FIRST] * 2 + [SECOND] * 3)
    for minute in range(60):
        moves = net.step(minute * MINUTE, {FIRST: 8, SECOND: 1})
        if moves:
            break
    (move,) = moves
    net.coming = []
    net.balancer.refused(move.peer, stays=True)
    holders = net.holders({FIRST: 8, SECOND: 1})
    assert move.peer not in {m.peer for m in net.balancer.moves((minute + 1) * MINUTE, SHAPE, [], holders)}


def test_who_was_sent_by_others_is_left_there():
    holders = [Holder("a", 0, 4, Speed(MS), 1, 2), *(Holder(p, 4, 8, Speed(MS), 1, 0) for p in "bcd")]
    balancer = Balancer()
    busy(balancer, holders)
    assert balancer.moves(HOUR, SHAPE, [], holders, ordered={"b", "c", "d"}) == ()
    assert [move.leaves for move in balancer.moves(HOUR, SHAPE, [], holders, ordered={"b", "c"})] == [SECOND]


def test_one_more_chain_where_nobody_has_room_for_a_busy_range():
    balancer = Balancer()
    holders = [Holder("a", 0, 4, Speed(MS), 4, 4), Holder("b", 4, 8, Speed(MS), 4, 4)]
    idle = [replace(holder, active=1) for holder in holders]
    small = [Room(f"s{n}", 30, Speed(MS)) for n in range(4)]  # three layers each, the ranges have four

    def nowhere(a, b):
        return 10 * MS

    for minute in range(60):
        balancer.watch(minute * MINUTE, holders)
    assert balancer.moves(HOUR, SHAPE, small, holders) == ()
    found = balancer.further(HOUR, SHAPE, small, holders, nowhere)
    assert found[0].first == 0
    assert sum(move.last - move.first for move in found) == 8
    assert len(found) == 3
    # It counts while it is loading: half of all slots are free then.
    assert balancer.further(HOUR + MINUTE, SHAPE, small, holders, nowhere) == ()
    calm = Balancer()
    for minute in range(60):
        calm.watch(minute * MINUTE, idle)
    assert calm.further(HOUR, SHAPE, small, idle, nowhere) == ()


def test_one_busy_range_does_not_make_a_chain_if_its_layers_are_free_elsewhere():
    balancer = Balancer()
    holders = [
        Holder("a", 0, 4, Speed(MS), 4, 4),
        Holder("b", 4, 8, Speed(MS), 4, 4),
        Holder("c", 0, 3, Speed(MS), 16, 0),
        Holder("d", 3, 8, Speed(MS), 16, 0),
    ]
    for minute in range(60):
        balancer.watch(minute * MINUTE, holders)
    rooms = [Room(f"s{n}", 30, Speed(MS)) for n in range(4)]
    assert balancer.further(HOUR, SHAPE, rooms, holders, lambda a, b: MS) == ()
