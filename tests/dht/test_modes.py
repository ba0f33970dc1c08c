"""Optimistic provide, disjoint paths, full tables, RTT-aware buckets: what each is for, in one network each."""

from __future__ import annotations

import pytest

from dht import events as e
from dht import messages as m
from dht.machine import DhtMachine
from dht.policy import DhtPolicy
from protocol.instants import SECOND_NS
from protocol.machine import Received, Send


def test_the_size_of_the_network_is_estimated(network, key) -> None:
    world = network(100, settle=30)
    for i in range(8):
        world.order_of(5, e.FindClosest(i, key(f"size {i}")))
        world.result(5, i)
    assert 50 <= world.machines[5].size_estimate() <= 200
    small = network(6)
    assert [machine.size_estimate() for machine in small.machines.values()] == [6] * 6


@pytest.mark.parametrize("optimistic", [False, True])
def test_what_is_provided_lies_at_the_closest_either_way(network, key, *, optimistic: bool) -> None:
    world = network(100, DhtPolicy(optimistic_provide=optimistic), settle=30)
    at_closest = []
    for i in range(6):
        where = key(f"cargo {i}")
        world.order_of(i, e.Provide(i, where))
        assert world.result(i, i).copies >= 15
        world.run(3)
        truth = world.closest(where, 20, without=[i])
        holders = [n for n in truth if world.machines[n]._serving.providers_of(where, 0)[0]]
        at_closest.append(len(holders))
    assert sum(at_closest) >= 0.85 * 20 * 6


def test_optimistic_provide_is_sooner_done(network, key) -> None:
    took = {}
    for optimistic in (False, True):
        world = network(110, DhtPolicy(optimistic_provide=optimistic), settle=30)
        times = []
        for i in range(10):
            world.order_of(i, e.Provide(i, key(f"cargo {i}")))
            times.append(world.result(i, i).cost.took_ns)
            world.run(3)
        took[optimistic] = sorted(times)[5]
    assert took[True] < 0.8 * took[False]


def test_disjoint_paths_find_through_a_wall_of_liars(network, key) -> None:
    """A third of all nodes names only its own kind: three paths rarely all follow it."""
    right = {}
    for paths in (1, 3):
        world = network(90, DhtPolicy(disjoint_paths=paths), settle=20)
        liars = list(range(0, 90, 3))

        def collude(asker: int, query: m.DhtMessage, world=world, liars=liars):
            if isinstance(query, m.Ping):
                return [(asker, m.Pong(query.call, 0, 1, False))]
            target = getattr(query, "target", getattr(query, "key", 0))
            told = [n for _, n in sorted((world.book.keys[n] ^ target, n) for n in liars)][:20]
            return [(asker, m.Nodes(query.call, 0, 1, False, tuple(told), (0,) * len(told)))]

        for liar in liars:
            world.liars[liar] = collude
        right[paths] = 0
        for i in range(30):
            target = key(f"wall {i}")
            asker = 1 + 3 * (i % 20)
            world.order_of(asker, e.FindClosest(i, target))
            found = world.result(asker, i)
            honest = [n for n in world.closest(target, 40, without=[asker]) if n % 3][:5]
            right[paths] += len(set(found.closest) & set(honest))
    assert right[3] >= right[1]
    assert right[3] >= 0.9 * 30 * 5


def test_full_tables_make_one_hop(network, key) -> None:
    world = network(70, DhtPolicy(full_table=True), settle=150)
    members = [machine.full_table_members for machine in world.machines.values()]
    assert sum(members) >= 0.98 * 70 * 69
    for i in range(10):
        target = key(f"t{i}")
        world.order_of(i, e.FindClosest(i, target))
        found = world.result(i, i)
        assert found.cost.hops == 1
        assert found.closest[:5] == tuple(world.closest(target, 5, without=[i]))


def test_full_tables_forget_the_dead_and_stay_within_their_bound(network) -> None:
    world = network(40, DhtPolicy(full_table=True), settle=120)
    dead = set(range(0, 40, 4))
    world.dead |= dead
    world.run(240)
    live = [machine for n, machine in world.machines.items() if n not in dead]
    kept = [peer for machine in live for peer in machine._full.members]
    assert sum(peer in dead for peer in kept) <= 0.05 * len(kept)
    crowded = network(40, DhtPolicy(full_table=True, full_table_nodes=20), settle=60)
    assert all(machine.full_table_members <= 26 for machine in crowded.machines.values())


def test_inventions_do_not_spread_through_full_tables(network) -> None:
    world = network(30, DhtPolicy(full_table=True), settle=60)
    fakes = sorted((world.book.add() for _ in range(60)), key=lambda n: world.book.keys[n])
    world.dead.update(fakes)

    def lie(asker: int, q: m.DhtMessage):
        if isinstance(q, m.GetPage):
            yield asker, m.Page(q.call, 0, 1, False, tuple(fakes), (0,) * 60, True)
        elif isinstance(q, m.CompareTables):
            yield asker, m.Differences(q.call, 0, 1, False, tuple(range(256)))
        elif isinstance(q, m.Ping):
            yield asker, m.Pong(q.call, 0, 1, False)
        else:
            yield asker, m.Nodes(q.call, 0, 1, False, (), ())

    world.liars[3] = lie
    world.run(300)
    for n, machine in world.machines.items():
        if n == 3:
            continue
        asked = machine.receive(world.now, Received(5 + (n == 5), m.GetPage(1, 0, 1, False, 0, 1 << 256)))
        (page,) = [x.message for x in asked if isinstance(x, Send) and isinstance(x.message, m.Page)]
        assert not set(page.contacts) & set(fakes)


def test_the_clients_full_table_stays_off(network) -> None:
    world = network(10)
    number = world.add(DhtPolicy(full_table=True), client=True)
    world.order_of(number, e.Join((1,)))
    world.run(60)
    assert world.machines[number].full_table_members == 0


def mean_rtt_ms(machines: list[DhtMachine], buckets: range) -> float:
    rtts = [
        rtt / 1000
        for machine in machines
        for bucket in buckets
        for rtt in machine.table.rtts_us[machine.table.starts[bucket] : machine.table.starts[bucket + 1]]
    ]
    return sum(rtts) / len(rtts)


def test_far_buckets_of_an_rtt_aware_table_hold_nearer_peers_at_no_more_messages(network) -> None:
    rtts, sent = {}, {}
    for aware in (False, True):
        policy = DhtPolicy(k=6, rtt_aware=aware, senior_entries=1)
        world = network(80, policy, settle=300)
        rtts[aware] = mean_rtt_ms(list(world.machines.values()), range(2))
        world.sent.clear()
        world.run(100)
        sent[aware] = sum(world.sent.values())
        own = [
            {machine.table.peers[p] for p in machine.table.closest(world.book.keys[n], 6)}
            == set(world.closest(world.book.keys[n], 6, without=[n]))
            for n, machine in world.machines.items()
        ]
        assert sum(own) >= 77
    assert rtts[True] < 0.75 * rtts[False]
    assert sent[True] <= 1.05 * sent[False]


def test_round_trips_seen_elsewhere_count(network) -> None:
    world = network(10, DhtPolicy(rtt_from_first_answer=False))
    machine = world.machines[3]
    entry = next(iter(machine.table))
    assert entry.rtt_ns == 0
    world.order_of(3, e.RoundTripSeen(entry.peer, 30_000_000))
    assert machine.rtt_estimate_ns(entry.peer) == 30_000_000
    assert machine.coordinate_error < 1.0
    world.order_of(3, e.RoundTripSeen(entry.peer, -1))
    world.order_of(3, e.RoundTripSeen(entry.peer, 10**15))
    assert machine.rtt_estimate_ns(entry.peer) == 30_000_000
    assert machine.rtt_estimate_ns(3) is None


def test_policies_out_of_range_are_refused() -> None:
    for wrong in ({"k": 0}, {"k": 65}, {"alpha": 0}, {"disjoint_paths": 9}, {"senior_entries": 21}):
        with pytest.raises(ValueError, match="must lie"):
            DhtPolicy(**wrong)
    assert DhtPolicy().ping_interval_ns == 3 * SECOND_NS
